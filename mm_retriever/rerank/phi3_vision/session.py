"""One query before Phi-3 Vision: it says what is wanted, judges the candidates, and says why one fits.

The conversation about the query is computed once; captions, every window of candidates and every reason continue it.
Whatever logits the model emits, each way to judge gives every candidate it saw one finite value.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mm_retriever.errors import PromptError, RerankError
from mm_retriever.images.sheet import contact_sheet
from mm_retriever.phi3_vision.decoding import TOKENS_AT_ONCE, finite, label_sequences, rank_at_once, rank_by_generation
from mm_retriever.phi3_vision.model import Prefix
from mm_retriever.phi3_vision.processor import Slot, Turn
from mm_retriever.rerank.candidates import Candidate
from mm_retriever.rerank.order import best_first, reciprocal_ranks, shuffled, windows
from mm_retriever.rerank.phi3_vision.conversation import Conversation, SharedModel
from mm_retriever.rerank.scorer import Meter, Query

YES = ("yes", "Yes", "YES")
NO = ("no", "No", "NO")
SMALLEST_WINDOW = 2


@dataclass(frozen=True, kw_only=True)
class Options:
    """How candidates are judged; see `Phi3VisionRerank`."""

    mode: Literal["likelihood", "sheet", "pictures", "pointwise"]
    ranking: Literal["single_pass", "generated"]
    caption: bool
    window: int
    stride: int
    passes: int
    seed: int
    num_crops: int
    sheet_crops: int
    max_new_tokens: int


@dataclass(frozen=True)
class Shown:
    """How a candidate appears in a prompt: its picture's slot and features, or its text."""

    part: str | Slot
    features: tuple[Tensor, ...]


class RerankSession:
    """See the module's docstring.

    Args:
        shared: The model.
        say: A prompt by name, with its blanks filled in.
        options: How to judge.
        meter: Tokens and time.
        query: What is asked.
        candidates: In the order of retrieval.
    """

    def __init__(
        self,
        shared: SharedModel,
        say: Callable[..., str],
        options: Options,
        meter: Meter,
        query: Query,
        candidates: Sequence[Candidate],
    ) -> None:
        self.shared, self.meter, self.query = shared, meter, query
        self.candidates, self.options = candidates, options
        self.processor = shared.with_crops(options.num_crops)
        self.encode = self.processor.encode_turns
        self.caption = self.wanted = ""
        self._say = say
        self._shown: dict[int, Shown] = {}
        self._end = self.processor.token_id("<|end|>")
        self._stops = frozenset(self.processor.stop_ids)
        # a caption and a description are one line each
        self._line_stops = self._stops.union(self._behind_caption[:1], shared.following("\n")[:1])
        self._ask = self._question()
        self.window, total_length = self._plan()
        self.talk = Conversation(shared, meter, total_length)

    # ------------------------------------------------------------------ the query

    @property
    def _behind_caption(self) -> list[int]:
        return self.shared.following(self._say("answer_wanted"))

    def _question(self) -> list[int]:
        """The question and the first word of the answer."""
        image, text = self.query.image, self.query.text
        if image is None:
            parts: list[str | Slot] = [self._say("ask_text", query=text)]
        else:
            ask = self._say("ask_composed", query=text) if text else self._say("ask_picture")
            parts = [Slot(self.processor.image_tokens(*image.size)), ask]
        captioned = image is not None and self.options.caption
        answer = self._say("answer_picture") if captioned else self._say("answer_wanted").strip()
        return self.encode([Turn("user", parts)], answer=answer)

    def understand(self, known_caption: Sequence[int] | None = None) -> list[int]:
        """Fill in `caption` and `wanted`; ids of the caption come back, to be given as `known_caption` another time."""
        image, limit = self.query.image, self.options.max_new_tokens
        features = [] if image is None else self.shared.features([image], self.options.num_crops, self.meter)
        self.talk.say(self._ask, features)
        caption: list[int] = []
        opening: list[int] = []
        if image is not None and self.options.caption:
            if known_caption is None:
                caption = self.talk.write((), stop_ids=self._line_stops, max_new_tokens=limit)
            else:
                caption = list(known_caption)
                self.talk.put((), caption)
            self.caption = self._text(caption)
            opening = self._behind_caption
        wanted = self.talk.write(opening, stop_ids=self._line_stops, max_new_tokens=limit)
        self.wanted = self._text(wanted) or self.query.text or self.caption
        return caption

    # ------------------------------------------------------------------ judging

    def judge(self) -> list[float | None]:
        """A value for every candidate that could be shown and for which there was time; higher is better."""
        values: list[float | None] = [None] * len(self.candidates)
        for position, value in self._judged():
            values[position] = value
        return values

    def _judged(self) -> Iterator[tuple[int, float]]:
        if self.options.mode == "likelihood":
            return self._likelihoods()
        if self.options.mode == "pointwise":
            return self._yes_or_no()
        return self._listwise()

    def _likelihoods(self) -> Iterator[tuple[int, float]]:
        """Log P(wanted description | candidate), pictures and texts each behind a shared beginning."""
        pictures = [i for i, candidate in enumerate(self.candidates) if candidate.image is not None]
        texts = [i for i, candidate in enumerate(self.candidates) if candidate.text]
        for group in (pictures, texts):
            prompts, targets = [], []
            for i in group:
                turn = self._describe(i)
                whole = self.encode([turn], answer=self.wanted)
                behind = _common(whole, self.encode([turn]))
                prompts.append(whole[:behind])
                targets.append([*whole[behind:], self._end])
            yield from self._scored(group, prompts, targets)

    def _describe(self, position: int) -> Turn:
        candidate = self.candidates[position]
        if candidate.image is None:
            return Turn("user", [self._say("describe_text", text=candidate.text)])
        slot = Slot(self.processor.image_tokens(*candidate.image.size))
        return Turn("user", [self._say("describe"), slot])

    def _scored(
        self, group: Sequence[int], prompts: Sequence[list[int]], targets: Sequence[list[int]]
    ) -> Iterator[tuple[int, float]]:
        if not group:
            return
        head = _beginning(prompts)
        longest = max(len(prompt) + len(target) for prompt, target in zip(prompts, targets, strict=True))
        prefix = self.shared.beginning(prompts[0][:head], longest, self.meter) if head else None
        at_once = max(1, TOKENS_AT_ONCE // longest)
        for start in range(0, len(group), at_once):
            if self.meter.out_of_time():
                return
            some = slice(start, start + at_once)
            shown = self._show(group[some])
            assert prefix is not None  # a prompt starts with a control token at least
            scores = self.shared.log_probs(
                prefix,
                [prompt[head:] for prompt in prompts[some]],
                [one.features for one in shown],
                targets[some],
                self.meter,
            )
            yield from zip(group[some], scores, strict=True)

    def _yes_or_no(self) -> Iterator[tuple[int, float]]:
        """Log-odds that the model answers yes; candidates whose prompts are equally long go in one batch."""
        group = [i for i, candidate in enumerate(self.candidates) if not candidate.missing]
        if not group:
            return
        yes, no, undecided = self._answers()
        turns = [Turn("user", [self._part(i), self._say("ask_fits")]) for i in group]
        prompts = [self.encode([turn], first=False, answer=YES[0])[:-undecided] for turn in turns]
        head = _beginning(prompts)
        talk = self.talk.fork()
        talk.say(prompts[0][:head])
        lengths = sorted({len(prompt) for prompt in prompts})
        for length in lengths:
            same = [k for k, prompt in enumerate(prompts) if len(prompt) == length]
            at_once = max(1, TOKENS_AT_ONCE // (talk.prefix.length + length))
            for start in range(0, len(same), at_once):
                if self.meter.out_of_time():
                    return
                some = same[start : start + at_once]
                features = [feature for one in self._show([group[k] for k in some]) for feature in one.features]
                ids = torch.tensor([prompts[k][head:] for k in some])
                logits = finite(self.shared.extend(talk.prefix, ids, features, self.meter).logits).cpu().double()
                odds = logits[:, yes].logsumexp(-1) - logits[:, no].logsumexp(-1)
                yield from zip([group[k] for k in some], odds.tolist(), strict=True)

    def _answers(self) -> tuple[list[int], list[int], int]:
        """Ids that decide for yes and for no, in any case, and how many ids of a "yes" are behind the decision."""
        said = {word: self.encode([Turn("user", [""])], first=False, answer=word) for word in YES + NO}
        fork = _common(said[YES[0]], said[NO[0]])
        beginning = said[YES[0]][:fork]
        firsts = [
            {said[word][fork] for word in words if said[word][:fork] == beginning and len(said[word]) > fork}
            for words in (YES, NO)
        ]
        yes, no = sorted(firsts[0] - firsts[1]), sorted(firsts[1] - firsts[0])
        if not yes or not no:
            raise RerankError('this tokenizer cannot tell "yes" from "no"; use another mode than "pointwise"')
        return yes, no, len(said[YES[0]]) - fork

    # ------------------------------------------------------------------ lists

    def _listwise(self) -> Iterator[tuple[int, float]]:
        """Rankings of windows, over one or several shuffled orders."""
        shown = [not candidate.missing for candidate in self.candidates]
        count = len(self.candidates)
        if sum(shown) == 1:
            yield shown.index(True), 0.0
            return
        if self.options.ranking == "single_pass" and self.options.passes == 1 and count <= self.window:
            if sum(shown) and not self.meter.out_of_time():
                yield from self._window(range(count)).items()
            return
        orders: list[list[int]] = []
        for order in shuffled(count, self.options.passes, self.options.seed):
            finished = self._slide(order)
            if finished or (finished is None and not orders):
                orders.append(order)
        ranks = reciprocal_ranks(orders, count) if orders else []
        for position, value in enumerate(ranks):
            if shown[position]:
                yield position, math.log(value)

    def _slide(self, order: list[int]) -> bool | None:
        """Improve an order in place; False: there was no time for it at all, None: not for all of it."""
        finished: bool | None = False
        for start, end in windows(len(order), self.window, min(self.options.stride, self.window - 1)):
            if self.meter.out_of_time():
                return finished
            finished = None
            items = order[start:end]
            values = self._window(items) if sum(not self.candidates[i].missing for i in items) > 1 else {}
            missing = [self.candidates[i].missing for i in items]
            order[start:end] = [items[k] for k in best_first([values.get(i, 0.0) for i in items], missing)]
        return True

    def _window(self, items: Sequence[int]) -> dict[int, float]:
        """A value for each of these candidates that can be shown, from one look at all of them."""
        talk = self.talk.fork()
        ids, features = self._list_turn(items)
        talk.say(ids, features)
        positions = [i for i in items if not self.candidates[i].missing]
        labels = [str(number) for number, i in enumerate(items, start=1) if not self.candidates[i].missing]
        sequences = label_sequences(self.processor.encode_literal, labels)
        model = _Counted(self.shared, self.meter)
        if self.options.ranking == "single_pass":
            scores = rank_at_once(model, talk.prefix, sequences).tolist()
            return dict(zip(positions, scores, strict=True))
        ranked = rank_by_generation(model, talk.prefix, sequences)
        fed_first = len({sequence[0] for sequence in sequences}) == 1  # what all numbers start with is not chosen
        chosen = model.calls if fed_first else model.calls + 1
        self.meter.generated += chosen
        self.meter.prefilled -= chosen - 1  # each step feeds what was chosen in the one before
        return {positions[k]: float(-rank) for rank, k in enumerate(ranked.order)}

    def _list_turn(self, items: Sequence[int]) -> tuple[list[int], list[Tensor]]:
        """The candidates and the question, up to where the numbers begin."""
        parts: list[str | Slot] = []
        if self.options.mode == "sheet":
            sheet = contact_sheet([self.candidates[i].picture() for i in items], self.query.image)
            features = self.shared.features([sheet], self.options.sheet_crops, self.meter)
            tokens = self.shared.with_crops(self.options.sheet_crops).image_tokens(*sheet.size)
            parts = [Slot(tokens), self._say("rank_sheet", count=len(items))]
        else:
            shown = [i for i in items if not self.candidates[i].missing]
            found = dict(zip(shown, self._show(shown), strict=True))
            features = [feature for one in found.values() for feature in one.features]
            for number, i in enumerate(items, start=1):
                parts += [f"\n{number}: " if parts else f"{number}: ", found[i].part if i in found else "missing"]
            parts.append(self._say("rank_pictures", count=len(items)))
        return self.encode([Turn("user", parts)], first=False, answer=self._say("answer_ranking")), features

    # ------------------------------------------------------------------ reasons

    def reasons(self, positions: Sequence[int]) -> dict[int, str]:
        """Why candidates fit, in one sentence each; none for what cannot be shown, or where there is no time."""
        asked = [i for i in positions if not self.candidates[i].missing]
        if not asked or self.meter.out_of_time():
            return {}
        shown = self._show(asked)
        ask = self._say("ask_reason")
        turns = [self.encode([Turn("user", [one.part, ask])], first=False) for one in shown]
        said = self.talk.answers(
            turns,
            [one.features for one in shown],
            stop_ids=self._stops,
            max_new_tokens=self.options.max_new_tokens,
        )
        return {i: reason for i, ids in zip(asked, said, strict=True) if (reason := self._text(ids))}

    # ------------------------------------------------------------------ pieces

    def _part(self, position: int) -> str | Slot:
        candidate = self.candidates[position]
        return candidate.text if candidate.image is None else Slot(self.processor.image_tokens(*candidate.image.size))

    def _show(self, positions: Sequence[int]) -> list[Shown]:
        """Features of those that are pictures, computed together and once."""
        todo = [i for i in positions if i not in self._shown and self.candidates[i].image is not None]
        images = [image for i in todo if (image := self.candidates[i].image) is not None]
        found = dict(zip(todo, self.shared.features(images, self.options.num_crops, self.meter), strict=True))
        for i in positions:
            if i not in self._shown:
                self._shown[i] = Shown(self._part(i), (found[i],) if i in found else ())
        return [self._shown[i] for i in positions]

    def _text(self, ids: Sequence[int]) -> str:
        return " ".join(self.processor.decode(ids).split())

    def _plan(self) -> tuple[int, int]:
        """How many candidates go into one prompt, and the most tokens that any prompt will have."""
        most = int(self.shared.model.config.max_position_embeddings)
        sentence = self.options.max_new_tokens
        answers = len(self._ask) + 2 * sentence + len(self._behind_caption)
        costs = sorted((self._cost(candidate) for candidate in self.candidates), reverse=True)
        single = costs[0] + self._words("ask_fits", "ask_reason") + sentence
        window = min(self.options.window, max(SMALLEST_WINDOW, len(costs)))
        while True:
            longest = answers + max(single, self._list_cost(costs[:window]))
            if longest <= most:
                return window, longest
            if self.options.mode != "pictures" or window <= SMALLEST_WINDOW:
                raise PromptError(
                    f"the query and its candidates take up to {longest} tokens, more than the {most} that fit: "
                    f"shorten the query ({len(self._ask)} tokens), or lower num_crops={self.options.num_crops}, "
                    f"sheet_crops={self.options.sheet_crops} or max_new_tokens={sentence}"
                )
            window -= 1

    def _list_cost(self, costs: Sequence[int]) -> int:
        if self.options.mode == "sheet":
            side = self.processor.tokens_per_side
            crops = self.options.sheet_crops + 1 if self.processor.use_hd_transform else 1
            return crops * side * (side + 1) + 1 + self._words("rank_sheet") + 4 * len(costs)
        if self.options.mode == "pictures":
            return sum(costs) + self._words("rank_pictures") + 12 * len(costs)
        return 0

    def _cost(self, candidate: Candidate) -> int:
        if candidate.image is not None:
            return self.processor.image_tokens(*candidate.image.size)
        return len(self.processor.encode_literal(candidate.text))

    def _words(self, *prompts: str) -> int:
        """Tokens of the longest of these prompts and what surrounds it."""
        return 16 + max(len(self.processor.encode_literal(self._say(name, count=99))) for name in prompts)


class _Counted:
    """The model for decoding, with every token counted."""

    def __init__(self, shared: SharedModel, meter: Meter) -> None:
        self._shared, self._meter = shared, meter
        self.calls = 0

    def extend(self, prefix: Prefix, input_ids: Sequence[int] | Tensor, /) -> Prefix:
        self.calls += 1
        return self._shared.extend(prefix, input_ids, (), self._meter)


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Length of what two runs of ids start with."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _beginning(prompts: Sequence[Sequence[int]]) -> int:
    """Length of what all start with, before the first picture and leaving something of each."""
    length = min(_common(prompts[0], prompt) for prompt in prompts)
    slots = [i for i, token in enumerate(prompts[0]) if token < 0]
    return min([length, len(prompts[0]) - 1, *slots[:1], *(len(prompt) - 1 for prompt in prompts)])
