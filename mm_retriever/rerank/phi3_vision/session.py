"""One query to Phi-3 Vision: the model says what is wanted, judges the candidates, and says why they fit.

The dialogue about the query is computed once; captions, every window of candidates and every reason continue it.
Each way of judging gives every candidate that it saw one finite value, whatever logits the model emits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from mm_retriever.errors import PromptError, RerankError
from mm_retriever.images.sheet import contact_sheet
from mm_retriever.phi3_vision.decoding import TOKENS_AT_ONCE, finite, label_sequences, rank_at_once, rank_by_generation
from mm_retriever.phi3_vision.processor import Message, Slot
from mm_retriever.rebuild import Name
from mm_retriever.rerank.phi3_vision.dialogue import Counted, Dialogue, SharedModel
from mm_retriever.rerank.reranker import Reranker
from mm_retriever.rerank.scorer import Candidate, Meter, Query, best_first, rank_scores, windows

YES = ("yes", "Yes", "YES")
NO = ("no", "No", "NO")


class Options(Reranker):
    """The options of `Phi3VisionRerank` beside those of every reranker."""

    mode: Literal["likelihood", "sheet", "pointwise"] = "likelihood"
    ranking: Literal["single_pass", "generated"] = "single_pass"
    """For "sheet": "single_pass" ranks by the logits of one step, "generated" lets the model write the order."""
    caption: bool = True
    """Whether the model first captions the query image; captions are kept by content."""
    reasons: Literal["first", "all", "none"] = "first"
    """Which of the kept nodes get a reason; none when the time budget is spent."""
    window: int = Field(default=9, ge=2, le=99)
    """Candidates on one sheet. Longer lists are ranked from their end to their beginning by overlapping windows."""
    stride: int = Field(default=4, ge=1)
    """Candidates between the starts of two windows; at most window - 1."""
    num_crops: int | None = Field(default=None, ge=0)
    """Most crops of the query image and of single candidates, beside the whole image. More show more detail and cost
    more; 0 costs half of 1, but Phi-3 Vision was not trained on that form of input. By default 1, and 0 where a
    candidate is only scored by likelihood."""
    sheet_crops: int = Field(default=4, ge=1)
    """The most crops of a sheet."""
    max_new_tokens: int = Field(default=60, ge=1)
    """Limit of each sentence."""
    revision: str | None = None
    """Of a hub repository."""
    device: Name = None
    """"cpu", "cuda", ...; by default the fastest there is."""
    dtype: Name = None
    """"float32", "bfloat16", ...; by default that of the stored weights."""
    image_memory: int = Field(default=256 * 2**20, ge=0)
    """Bytes of features of images that are kept for the next query."""

    @property
    def seen_crops(self) -> int:
        """Most crops of an image that the model writes about."""
        return 1 if self.num_crops is None else self.num_crops

    @property
    def scored_crops(self) -> int:
        """Most crops of a candidate whose likelihood is wanted."""
        return self.num_crops or 0


class RerankSession:
    """See the module's docstring.

    Args:
        shared: the model.
        options: how to judge.
        say: returns a prompt by name, with its placeholders filled in.
        meter: counts tokens and limits the time.
        query: a text, an image, or both.
        candidates: in the order of retrieval.
    """

    def __init__(
        self,
        shared: SharedModel,
        options: Options,
        say: Callable[..., str],
        meter: Meter,
        query: Query,
        candidates: Sequence[Candidate],
    ) -> None:
        self.shared, self.options, self.meter = shared, options, meter
        self.query, self.candidates = query, candidates
        self.processor = shared.with_crops(options.seen_crops)
        self.encode = self.processor.encode_messages
        self.caption = self.wanted = ""
        self._say = say
        self._features: dict[tuple[int, int], tuple[Tensor, ...]] = {}
        self._end = self.processor.token_id("<|end|>")
        self._stops = frozenset(self.processor.stop_ids)
        self._after_caption = shared.following(say("answer_wanted"))
        # a caption and a description are one line each
        self._line_stops = self._stops.union(self._after_caption[:1], shared.following("\n")[:1])
        self._ask = self._question()
        self.dialogue = Dialogue(shared, meter, self._longest())

    # ------------------------------------------------------------------ the query

    def _question(self) -> list[int]:
        """The ids of the question and of the beginning of the answer."""
        image, text = self.query.image, self.query.text
        if image is None:
            parts: list[str | Slot] = [self._say("ask_text", query=text)]
        else:
            ask = self._say("ask_composed", query=text) if text else self._say("ask_picture")
            parts = [Slot(self.processor.image_tokens(*image.size)), ask]
        captioned = image is not None and self.options.caption
        answer = self._say("answer_picture") if captioned else self._say("answer_wanted").strip()
        return self.encode([Message("user", parts)], answer=answer)

    def understand(self, known_caption: Sequence[int] | None = None) -> list[int]:
        """Set `caption` and `wanted`, and return the ids of the caption, to be passed as `known_caption` later."""
        image, limit = self.query.image, self.options.max_new_tokens
        features = [] if image is None else self.shared.features([image], self.options.seen_crops, self.meter)
        self.dialogue.say(self._ask, features)
        caption: list[int] = []
        opening: list[int] = []
        if image is not None and self.options.caption:
            if known_caption is None:
                caption = self.dialogue.write((), stop_ids=self._line_stops, max_new_tokens=limit)
            else:
                caption = list(known_caption)
                self.dialogue.put((), caption)
            self.caption = self._text(caption)
            opening = self._after_caption
        wanted = self.dialogue.write(opening, stop_ids=self._line_stops, max_new_tokens=limit)
        self.wanted = self._text(wanted) or self.query.text or self.caption
        return caption

    # ------------------------------------------------------------------ judging

    def judge(self) -> list[float | None]:
        """Return a value for each candidate, higher is better; None if it has nothing to show, or the time was up."""
        values: list[float | None] = [None] * len(self.candidates)
        for position, value in self._judged():
            values[position] = value
        return values

    def _judged(self) -> Iterator[tuple[int, float]]:
        if self.options.mode == "likelihood":
            return self._likelihoods()
        if self.options.mode == "pointwise":
            return self._yes_or_no()
        return self._sheets()

    def _likelihoods(self) -> Iterator[tuple[int, float]]:
        """Log P(wanted description | candidate); images share one beginning of the prompt, texts another."""
        images = [i for i, candidate in enumerate(self.candidates) if candidate.image is not None]
        texts = [i for i, candidate in enumerate(self.candidates) if candidate.text]
        for group in (images, texts):
            prompts, targets = [], []
            for i in group:
                message = self._describe(i)
                whole = self.encode([message], answer=self.wanted)
                start = _common(whole, self.encode([message]))
                prompts.append(whole[:start])
                targets.append([*whole[start:], self._end])
            yield from self._scored(group, prompts, targets)

    def _describe(self, position: int) -> Message:
        candidate = self.candidates[position]
        if candidate.image is None:
            return Message("user", [self._say("describe_text", text=candidate.text)])
        scored = self.shared.with_crops(self.options.scored_crops)
        return Message("user", [self._say("describe"), Slot(scored.image_tokens(*candidate.image.size))])

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
            batch = slice(start, start + at_once)
            assert prefix is not None  # a prompt starts with a control token at least
            scores = self.shared.log_probs(
                prefix,
                [prompt[head:] for prompt in prompts[batch]],
                self._show(group[batch], self.options.scored_crops),
                targets[batch],
                self.meter,
            )
            yield from zip(group[batch], scores, strict=True)

    def _yes_or_no(self) -> Iterator[tuple[int, float]]:
        """Log-odds that the model answers yes; candidates with prompts of equal length form a batch."""
        group = [i for i, candidate in enumerate(self.candidates) if not candidate.missing]
        if not group:
            return
        yes, no, undecided = self._answers()
        messages = [Message("user", [self._part(i), self._say("ask_fits")]) for i in group]
        prompts = [self.encode([message], first=False, answer=YES[0])[:-undecided] for message in messages]
        head = _beginning(prompts)
        dialogue = self.dialogue.fork()
        dialogue.say(prompts[0][:head])
        lengths, crops = sorted({len(prompt) for prompt in prompts}), self.options.seen_crops
        for length in lengths:
            same = [k for k, prompt in enumerate(prompts) if len(prompt) == length]
            at_once = max(1, TOKENS_AT_ONCE // (dialogue.prefix.length + length))
            for start in range(0, len(same), at_once):
                if self.meter.out_of_time():
                    return
                batch = same[start : start + at_once]
                features = [feature for own in self._show([group[k] for k in batch], crops) for feature in own]
                ids = torch.tensor([prompts[k][head:] for k in batch])
                logits = finite(self.shared.extend(dialogue.prefix, ids, features, self.meter).logits).cpu().double()
                odds = logits[:, yes].logsumexp(-1) - logits[:, no].logsumexp(-1)
                yield from zip([group[k] for k in batch], odds.tolist(), strict=True)

    def _answers(self) -> tuple[list[int], list[int], int]:
        """The ids that decide for yes and for no, in any case, and the number of ids of a "yes" from there on."""
        words = {word: self.encode([Message("user", [""])], first=False, answer=word) for word in YES + NO}
        fork = _common(words[YES[0]], words[NO[0]])
        start = words[YES[0]][:fork]
        firsts = [
            {words[word][fork] for word in answer if words[word][:fork] == start and len(words[word]) > fork}
            for answer in (YES, NO)
        ]
        yes, no = sorted(firsts[0] - firsts[1]), sorted(firsts[1] - firsts[0])
        if not yes or not no:
            raise RerankError('this tokenizer cannot tell "yes" from "no"; use another mode than "pointwise"')
        return yes, no, len(words[YES[0]]) - fork

    # ------------------------------------------------------------------ sheets

    def _sheets(self) -> Iterator[tuple[int, float]]:
        """The model's values from one sheet of all candidates, or ranks from sheets of overlapping windows."""
        shown = [not candidate.missing for candidate in self.candidates]
        count, size = len(self.candidates), self.options.window
        if sum(shown) < 2:
            yield from ((i, 0.0) for i in range(count) if shown[i])
            return
        if self.options.ranking == "single_pass" and count <= size:
            if not self.meter.out_of_time():
                yield from self._window(range(count)).items()
            return
        order: list[int] = []
        for start, end in windows(count, size, min(self.options.stride, size - 1)):
            if self.meter.out_of_time():
                break
            order = order or list(range(count))
            items = order[start:end]
            values = self._window(items) if sum(shown[i] for i in items) > 1 else {}
            missing = [not shown[i] for i in items]
            order[start:end] = [items[k] for k in best_first([values.get(i, 0.0) for i in items], missing)]
        yield from ((i, value) for i, value in rank_scores(order).items() if shown[i])

    def _window(self, items: Sequence[int]) -> dict[int, float]:
        """A value for each of these candidates that can be shown, from one sheet of all of them."""
        sheet = contact_sheet([self.candidates[i].tile() for i in items], self.query.image)
        slot = Slot(self.shared.with_crops(self.options.sheet_crops).image_tokens(*sheet.size))
        ask = Message("user", [slot, self._say("rank_sheet", count=len(items))])
        dialogue = self.dialogue.fork()
        dialogue.say(
            self.encode([ask], first=False, answer=self._say("answer_ranking")),
            self.shared.features([sheet], self.options.sheet_crops, self.meter),
        )
        positions = [i for i in items if not self.candidates[i].missing]
        labels = [str(number) for number, i in enumerate(items, start=1) if i in positions]
        sequences = label_sequences(self.processor.encode_literal, labels)
        model = Counted(self.shared, self.meter)
        if self.options.ranking == "single_pass":
            scores = rank_at_once(model, dialogue.prefix, sequences).tolist()
            return dict(zip(positions, scores, strict=True))
        ranked = rank_by_generation(model, dialogue.prefix, sequences)
        self.meter.generated += ranked.chosen
        self.meter.prefilled -= max(0, ranked.chosen - 1)  # all but the last became input, and counted as prompt
        return {positions[k]: float(-rank) for rank, k in enumerate(ranked.order)}

    # ------------------------------------------------------------------ reasons

    def reasons(self, positions: Sequence[int]) -> dict[int, str]:
        """Return a sentence for each candidate on why it fits; none without something to show, or when time is up."""
        explained = [i for i in positions if not self.candidates[i].missing]
        if not explained or self.meter.out_of_time():
            return {}
        ask = self._say("ask_reason")
        turns = [self.encode([Message("user", [self._part(i), ask])], first=False) for i in explained]
        answers = self.dialogue.answers(
            turns,
            self._show(explained, self.options.seen_crops),
            stop_ids=self._stops,
            max_new_tokens=self.options.max_new_tokens,
        )
        return {i: reason for i, ids in zip(explained, answers, strict=True) if (reason := self._text(ids))}

    # ------------------------------------------------------------------ pieces

    def _part(self, position: int) -> str | Slot:
        candidate = self.candidates[position]
        return candidate.text if candidate.image is None else Slot(self.processor.image_tokens(*candidate.image.size))

    def _show(self, positions: Sequence[int], crops: int) -> list[tuple[Tensor, ...]]:
        """The features of each candidate that is an image, computed once and together; none for a text."""
        images = {i: image for i in positions if (image := self.candidates[i].image) is not None}
        missing = {i: image for i, image in images.items() if (i, crops) not in self._features}
        computed = self.shared.features(list(missing.values()), crops, self.meter)
        self._features |= {(i, crops): (features,) for i, features in zip(missing, computed, strict=True)}
        return [self._features.get((i, crops), ()) for i in positions]

    def _text(self, ids: Sequence[int]) -> str:
        return " ".join(self.processor.decode(ids).split())

    def _longest(self) -> int:
        """The most tokens that any prompt will have.

        Raises:
            PromptError: they do not fit into the model.
        """
        options, most = self.options, int(self.shared.model.config.max_position_embeddings)
        costs = [self._cost(candidate) for candidate in self.candidates]
        looks = max(costs) + self._words("ask_fits", "ask_reason") + options.max_new_tokens
        if options.mode == "sheet":
            side = self.processor.tokens_per_side
            crops = options.sheet_crops + 1 if self.processor.use_hd_transform else 1
            numbers = 4 * min(len(costs), options.window)
            looks = max(looks, crops * side * (side + 1) + 1 + self._words("rank_sheet") + numbers)
        longest = len(self._ask) + 2 * options.max_new_tokens + len(self._after_caption) + looks
        if longest > most:
            also = f"num_crops={options.seen_crops}, " if options.seen_crops else ""
            raise PromptError(
                f"the query and its candidates take up to {longest} tokens, more than the {most} that fit: "
                f"shorten the query ({len(self._ask)} tokens), or lower {also}"
                f"sheet_crops={options.sheet_crops} or max_new_tokens={options.max_new_tokens}"
            )
        return longest

    def _cost(self, candidate: Candidate) -> int:
        if candidate.image is not None:
            return self.processor.image_tokens(*candidate.image.size)
        return len(self.processor.encode_literal(candidate.text))

    def _words(self, *prompts: str) -> int:
        """The tokens of the longest of these prompts, with its surrounding tokens."""
        return 16 + max(len(self.processor.encode_literal(self._say(name, count=99))) for name in prompts)


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """The length of the common beginning of two runs of ids."""
    return next(
        (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )


def _beginning(prompts: Sequence[Sequence[int]]) -> int:
    """The length of the common beginning of all prompts, which ends before the first image and before any prompt."""
    length = min(_common(prompts[0], prompt) for prompt in prompts)
    slots = [i for i, token in enumerate(prompts[0]) if token < 0]
    return min([length, len(prompts[0]) - 1, *slots[:1], *(len(prompt) - 1 for prompt in prompts)])
