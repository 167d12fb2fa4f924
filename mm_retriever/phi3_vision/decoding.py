"""Generation: text with limits, rankings that cannot lose, repeat or invent a candidate, likelihoods.

Works on any model that continues a computed prefix, as :class:`~mm_retriever.phi3_vision.model.Phi3Vision` does.
Whatever logits it emits, nan and infinities included, a ranking is a permutation.

:class:`TextStream` is the one loop that generates. :func:`rank_by_generation` constrains it to labels that are not yet
written; text without a choice is fed in one piece with the next step. :func:`rank_at_once` reads the order off the
probabilities of the first label, as in FIRST (arXiv:2406.15657): one step, and scores that are probabilities.
:func:`likelihoods` scores by log P(description | candidate), the query likelihood of UPR (arXiv:2204.07496). Knows
nothing of prompts, images or LlamaIndex.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor
from transformers import TemperatureLogitsWarper, TopPLogitsWarper

from mm_retriever.phi3_vision.model import Phi3Vision, Prefix

TOKENS_AT_ONCE = 16_384  # of all rows of a batch together, shared prefix included: bounds the memory of its cache
LogitsProcessor = Callable[[Any, Any], Tensor]
"""One of transformers', or alike: (B, T) ids written so far and (B, V) logits to (B, V) logits."""


class Computed(Protocol):
    """A computed prefix, as far as decoding reads it."""

    @property
    def logits(self) -> Tensor:
        """(B, V) of the next token."""
        ...


B = TypeVar("B", bound=Computed)


class Continues(Protocol[B]):
    """A model that continues a prefix."""

    def extend(self, prefix: B, input_ids: Sequence[int] | Tensor, /) -> B:
        """The prefix and what follows it; it stays as it was, and several rows may follow a prefix of one."""
        ...


def finite(logits: Tensor) -> Tensor:
    """The same order without surprises: nan is the least likely, infinities are very large."""
    limit = 1e30
    return logits.float().nan_to_num(nan=-limit).clamp(-limit, limit)


# ------------------------------------------------------------------ the loop


class Constraint(Protocol):
    """What may be written next."""

    def choices(self) -> Sequence[int]:
        """Ids that may come now; none at the end."""
        ...

    def take(self, token: int) -> None:
        """This one was written."""
        ...


class Sampler:
    """Chooses the next id. Temperature 0 is the most likely one; ``top_p`` keeps that much probability."""

    def __init__(self, temperature: float = 0.0, top_p: float = 1.0, seed: int | None = None) -> None:
        if temperature < 0 or not 0 < top_p <= 1:
            raise ValueError(f"temperature={temperature!r}, top_p={top_p!r}: give temperature >= 0 and 0 < top_p <= 1")
        self._warpers: list[LogitsProcessor] = []
        if temperature:
            self._warpers = [TemperatureLogitsWarper(float(temperature)), TopPLogitsWarper(top_p)]
        self._generator = torch.Generator()
        self._generator.manual_seed(seed) if seed is not None else self._generator.seed()

    def __call__(self, logits: Tensor) -> Tensor:
        """(B,) ids, from finite logits (B, V)."""
        if not self._warpers:
            return logits.argmax(-1)
        logits = logits.cpu()
        for warp in self._warpers:
            logits = warp(None, logits)
        return torch.multinomial(logits.softmax(-1), 1, generator=self._generator)[:, 0]


class TextStream(Generic[B]):
    """Texts of all rows of a prefix, side by side; iterating gives the first row's ids, one by one.

    Args:
        model: called once per step, never where only one id is possible.
        prefix: one row per text.
        stop_ids: end a row and are not part of it.
        max_new_tokens: of each row; None: no limit.
        processors: change the logits, as transformers' processors do.
        choose: gives ids (B,) for logits (B, V).
        should_stop: asked before each step.
        constraint: what may be written, for one row; it ends the text.
        pending: ids that are decided but not yet fed, for one row; they go before the text.

    Attributes:
        rows: the ids of each text.
        prefix: what has been fed.
        pending: what has to be fed before anything else.
        finish_reason: at the end "stop", "length", or "interrupted" (``should_stop`` said so).
    """

    def __init__(
        self,
        model: Continues[B],
        prefix: B,
        *,
        stop_ids: Collection[int] = (),
        max_new_tokens: int | None = None,
        processors: Sequence[LogitsProcessor] = (),
        choose: Callable[[Tensor], Tensor] | None = None,
        should_stop: Callable[[], bool] | None = None,
        constraint: Constraint | None = None,
        pending: Sequence[int] = (),
    ) -> None:
        self.prefix = prefix
        self.rows: list[list[int]] = [[] for _ in prefix.logits]
        self.pending = torch.tensor([list(pending)] * len(self.rows), dtype=torch.long)
        self.finish_reason: str | None = None
        self._model, self._limit = model, max_new_tokens
        self._stop_ids, self._processors = frozenset(stop_ids), tuple(processors)
        self._choose, self._should_stop = choose or Sampler(), should_stop
        self._constraint = constraint

    def __iter__(self) -> Iterator[int]:
        written = torch.empty(len(self.rows), 0, dtype=torch.long)
        going = set(range(len(self.rows)))
        while self.finish_reason is None:
            choices = None if self._constraint is None else self._constraint.choices()
            if choices is not None and not choices:
                self.finish_reason = "stop"
            elif written.shape[1] == self._limit:
                self.finish_reason = "length"
            elif self._should_stop is not None and self._should_stop():
                self.finish_reason = "interrupted"
            else:
                chosen = self._next(written, choices)
                going -= {row for row in going if int(chosen[row]) in self._stop_ids}
                if not going:
                    self.finish_reason = "stop"
                    return
                written = torch.cat([written, chosen[:, None]], 1)  # a row that has ended is fed what nobody reads
                self.pending = torch.cat([self.pending, chosen[:, None]], 1)
                for row in going:
                    self.rows[row].append(int(chosen[row]))
                if self._constraint is not None:
                    self._constraint.take(int(chosen[0]))
                yield int(chosen[0])

    def _next(self, written: Tensor, choices: Sequence[int] | None) -> Tensor:
        """(B,) the next ids."""
        if choices is not None and len(choices) == 1:
            return torch.tensor(choices)
        if self.pending.shape[1]:
            self.prefix = self._model.extend(self.prefix, self.pending)
            self.pending = self.pending[:, :0]
        logits = finite(self.prefix.logits)
        if choices is not None:
            return torch.tensor(choices)[logits[:, list(choices)].argmax(-1).cpu()]
        for process in self._processors:
            logits = process(written.to(logits.device), logits)
        return self._choose(logits).cpu()


# ------------------------------------------------------------------ rankings


def label_sequences(
    encode: Callable[[str], list[int]], labels: Sequence[str], *, separator: str = ","
) -> list[tuple[int, ...]]:
    """Ids of every label as an item of a list, the separator after it included: " 12,".

    The separator is what tells 1 from 12. Ids are read off in the middle of a list, so they are right for tokenizers
    that put a word's space before it, on its own, or nowhere.

    Raises:
        ValueError: Two labels have the same ids, or one's are the beginning of another's.
    """
    sequences = [tuple(ids_after(encode, separator, f" {label}{separator}")) for label in labels]
    for shorter, longer in zip(sorted(sequences), sorted(sequences)[1:], strict=False):
        if longer[: len(shorter)] == shorter:
            clash = [label for label, ids in zip(labels, sequences, strict=True) if ids in (shorter, longer)]
            raise ValueError(f"this tokenizer cannot tell the labels {clash} apart; give each a different one")
    return sequences


def ids_after(encode: Callable[[str], list[int]], before: str, text: str) -> list[int]:
    """Ids of `text` where it stands after `before`, rather than at the beginning of a text."""
    start, whole = encode(before), encode(before + text)
    return whole[len(start) :] if whole[: len(start)] == start else encode(text)


class LabelList:
    """Constrains a text to a list of labels, each of them once. ``chosen``: how many ids were not the only choice.

    Args:
        sequences: from :func:`label_sequences`.
    """

    def __init__(self, sequences: Sequence[Sequence[int]]) -> None:
        self.order: list[int] = []
        self.chosen = 0
        self._sequences = sequences
        self._remaining = self._possible = list(range(len(sequences)))
        self._depth = 0

    def choices(self) -> list[int]:
        """Ids that go on with a label that is not yet written."""
        return sorted({self._sequences[i][self._depth] for i in self._possible})

    def take(self, token: int) -> None:
        """Go on with the labels that have this id here; the only one of full length is the next of the list."""
        possible = [i for i in self._possible if self._sequences[i][self._depth] == token]
        self.chosen += len(possible) < len(self._possible)
        self._possible = possible
        self._depth += 1
        first = self._possible[0]
        if self._depth == len(self._sequences[first]):
            self.order.append(first)
            self._possible = self._remaining = [i for i in self._remaining if i != first]
            self._depth = 0


@dataclass(frozen=True)
class Ranked(Generic[B]):
    """A ranking the model wrote. ``pending`` is text that is decided but not yet fed: put it before what comes next.

    ``chosen``: how many ids the model chose; the others were the only possible ones.
    """

    order: tuple[int, ...]
    prefix: B
    pending: tuple[int, ...]
    chosen: int


def rank_by_generation(
    model: Continues[B], prefix: B, sequences: Sequence[Sequence[int]], *, opening: Sequence[int] = ()
) -> Ranked[B]:
    """The permutation of ``range(len(sequences))`` that the model writes, best first.

    Args:
        model: called once per choice, never where only one label is possible.
        prefix: the prompt.
        sequences: from :func:`label_sequences`.
        opening: text between prompt and list, fed with the first step.
    """
    labels = LabelList(sequences)
    stream = TextStream(model, prefix, constraint=labels, pending=opening)
    for _ in stream:
        pass
    return Ranked(tuple(labels.order), stream.prefix, tuple(stream.pending[0].tolist()), labels.chosen)


def rank_at_once(
    model: Continues[B],
    prefix: B,
    sequences: Sequence[Sequence[int]],
    *,
    opening: Sequence[int] = (),
) -> Tensor:
    """(candidates,) log-probabilities that the model names each first; they sum to one. Sort them for the ranking.

    One step for up to nine numbers; with longer ones, one more for each further digit, batched. At every fork only
    labels are possible, and a label's probability is the product of its forks: text that is forced costs nothing, so
    that 12 is not punished for being longer than 3.

    Arguments are those of :func:`rank_by_generation`.
    """
    scores = torch.zeros(len(sequences), dtype=torch.float64)
    shared = _shared_start(sequences)
    forks = _forks(sequences)
    if not forks:
        return scores
    if start := [*opening, *shared]:
        prefix = model.extend(prefix, start)
    for length in sorted({len(path) for path in forks}):
        paths = [path for path in forks if len(path) == length]
        new = length - len(shared)
        for chunk in (paths[i : i + 8] for i in range(0, len(paths), 8)):
            rows = prefix if not new else model.extend(prefix, torch.tensor([path[-new:] for path in chunk]))
            for path, row in zip(chunk, rows.logits, strict=True):
                choices = sorted({sequences[i][length] for i in forks[path]})
                shares = finite(row[choices]).cpu().double().log_softmax(-1)
                for i in forks[path]:
                    scores[i] += shares[choices.index(sequences[i][length])].item()
    return scores


def _shared_start(sequences: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """What all sequences start with, when there are at least two."""
    if len(sequences) < 2:
        return ()
    first, last = min(map(tuple, sequences)), max(map(tuple, sequences))
    length = next(i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b)
    return first[:length]


def _forks(sequences: Sequence[Sequence[int]]) -> dict[tuple[int, ...], list[int]]:
    """Every path after which at least two different ids may follow, and the sequences that go along it."""
    along: dict[tuple[int, ...], list[int]] = {}
    for i, sequence in enumerate(sequences):
        for length in range(len(sequence)):
            along.setdefault(tuple(sequence[:length]), []).append(i)
    return {path: rows for path, rows in along.items() if len({sequences[i][len(path)] for i in rows}) > 1}


# ------------------------------------------------------------------ likelihood


def likelihoods(
    model: Phi3Vision,
    prefix: Prefix,
    prompts: Sequence[Tensor],
    targets: Sequence[Sequence[int]],
    *,
    tokens_at_once: int = TOKENS_AT_ONCE,
) -> Tensor:
    """(rows,) log P(target | prefix, prompt), summed over the target's tokens; rows are batched.

    Args:
        model: Phi-3 Vision.
        prefix: What all rows share, computed once.
        prompts: (T, D) embeddings each, from ``model.embed(ids, features)[0]``: typically one candidate's image.
        targets: Ids to score; the same description for every row, or one each.
        tokens_at_once: Of all rows of a batch together, prefix included.
    """
    longest = max((len(p) + len(t) for p, t in zip(prompts, targets, strict=True)), default=0)
    rows = max(1, tokens_at_once // (prefix.length + longest + 1))
    scores: list[Tensor] = []
    for start in range(0, len(prompts), rows):
        batch = slice(start, start + rows)
        scores += [row.sum() for row in model.continuation_log_probs(prefix, prompts[batch], targets[batch])]
    return torch.stack(scores).cpu() if scores else torch.empty(0)
