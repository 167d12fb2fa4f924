"""Generation under constraint: rankings that cannot lose, repeat or invent a candidate, likelihoods, bounded text.

Works on any model that can continue a computed beginning, as :class:`~mm_retriever.phi3_vision.model.Phi3Vision` can.
Whatever logits it emits, nan and infinities included, a ranking is a permutation.

Two ways to rank. :func:`rank_by_generation` lets the model write the list, where at each step only the labels not yet
written are possible and text without a choice is fed in one piece with the next step. :func:`rank_at_once` reads the
order off the probabilities of the first label, as in FIRST (arXiv:2406.15657): one step, and scores that are
probabilities. :func:`likelihoods` scores by log P(description | candidate), the query likelihood of UPR
(arXiv:2204.07496). Knows nothing of prompts, pictures or LlamaIndex.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from mm_retriever.phi3_vision.model import Phi3Vision, Prefix

TOKENS_AT_ONCE = 16_384  # of all rows of a batch together, shared beginning included: bounds the memory of its cache


class Beginning(Protocol):
    """A computed beginning, as far as decoding reads it."""

    @property
    def logits(self) -> Tensor:
        """(B, V) of the next token."""
        ...


B = TypeVar("B", bound=Beginning)


class Continues(Protocol[B]):
    """A model that continues a beginning."""

    def extend(self, prefix: B, input_ids: Sequence[int] | Tensor, /) -> B:
        """The beginning and what follows it; it stays as it was, and several rows may follow a beginning of one."""
        ...


def finite(logits: Tensor) -> Tensor:
    """The same order without surprises: nan is the least likely, infinities are very large."""
    limit = 1e30  # above what :class:`Suppress` writes, so that what is suppressed stays last
    return logits.float().nan_to_num(nan=-limit).clamp(-limit, limit)


# ------------------------------------------------------------------ labels


def label_sequences(
    encode: Callable[[str], list[int]], labels: Sequence[str], *, separator: str = ","
) -> list[tuple[int, ...]]:
    """Ids of every label as an item of a list, the separator behind it included: " 12,".

    The separator is what tells 1 from 12. Ids are read off in the middle of a list, so they are right for tokenizers
    that put a word's space before it, on its own, or nowhere.

    Raises:
        ValueError: Two labels have the same ids, or one's are the beginning of another's.
    """
    sequences = [tuple(ids_behind(encode, separator, f" {label}{separator}")) for label in labels]
    for shorter, longer in zip(sorted(sequences), sorted(sequences)[1:], strict=False):
        if longer[: len(shorter)] == shorter:
            clash = [label for label, ids in zip(labels, sequences, strict=True) if ids in (shorter, longer)]
            raise ValueError(f"this tokenizer cannot tell the labels {clash} apart; give each a different one")
    return sequences


def ids_behind(encode: Callable[[str], list[int]], before: str, text: str) -> list[int]:
    """Ids of `text` where it stands behind `before`, rather than at the beginning of a text."""
    start, whole = encode(before), encode(before + text)
    return whole[len(start) :] if whole[: len(start)] == start else encode(text)


@dataclass(frozen=True)
class Ranked(Generic[B]):
    """A ranking the model wrote. ``pending`` is text that is decided but not yet fed: put it before what comes next."""

    order: tuple[int, ...]
    prefix: B
    pending: tuple[int, ...]


def rank_by_generation(
    model: Continues[B], prefix: B, sequences: Sequence[Sequence[int]], *, opening: Sequence[int] = ()
) -> Ranked[B]:
    """The permutation of ``range(len(sequences))`` that the model writes, best first.

    Args:
        model: Called once per choice, never where only one label is possible.
        prefix: The prompt.
        sequences: From :func:`label_sequences`.
        opening: Text between prompt and list, fed with the first step.
    """
    remaining = list(range(len(sequences)))
    order: list[int] = []
    pending = list(opening)
    while remaining:
        alive, depth = remaining, 0
        while len(alive) > 1:
            choices = sorted({sequences[i][depth] for i in alive})
            token = choices[0]
            if len(choices) > 1:
                if pending:
                    prefix, pending = model.extend(prefix, pending), []
                token = choices[int(finite(prefix.logits[0, choices]).argmax())]
            pending.append(token)
            alive = [i for i in alive if sequences[i][depth] == token]
            depth += 1
        pending += sequences[alive[0]][depth:]
        order.append(alive[0])
        remaining = [i for i in remaining if i != alive[0]]
    return Ranked(tuple(order), prefix, tuple(pending))


def rank_at_once(
    model: Continues[B],
    prefix: B,
    sequences: Sequence[Sequence[int]],
    *,
    opening: Sequence[int] = (),
    temperature: float = 1.0,
) -> Tensor:
    """(candidates,) log-probabilities that the model names each first; they sum to one. Sort them for the ranking.

    One step for up to nine numbers; with longer ones, one more for each further digit, batched. At every fork only
    labels are possible, and a label's probability is the product of its forks: text that is forced costs nothing, so
    that 12 is not punished for being longer than 3.

    Args:
        model: See :func:`rank_by_generation`.
        prefix: The prompt.
        sequences: From :func:`label_sequences`.
        opening: Text between prompt and list.
        temperature: Above 1: less sure. Does not change the order of single digits.
    """
    scores = torch.zeros(len(sequences), dtype=torch.float64)
    shared = _shared_beginning(sequences)
    forks = _forks(sequences)
    if not forks:
        return scores
    if start := [*opening, *shared]:
        prefix = model.extend(prefix, start)
    for length in sorted({len(path) for path in forks}):
        paths = [path for path in forks if len(path) == length]
        behind = length - len(shared)
        for chunk in (paths[i : i + 8] for i in range(0, len(paths), 8)):
            logits = prefix.logits if not behind else _logits_behind(model, prefix, chunk, behind)
            for path, row in zip(chunk, logits, strict=True):
                choices = sorted({sequences[i][length] for i in forks[path]})
                shares = (finite(row[choices]).cpu().double() / temperature).log_softmax(-1)
                for i in forks[path]:
                    scores[i] += shares[choices.index(sequences[i][length])].item()
    return scores


def _logits_behind(model: Continues[B], prefix: B, paths: Sequence[tuple[int, ...]], count: int) -> Tensor:
    return model.extend(prefix, torch.tensor([path[-count:] for path in paths])).logits


def _shared_beginning(sequences: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """What all sequences start with, when there are at least two."""
    if len(sequences) < 2:
        return ()
    first, last = min(map(tuple, sequences)), max(map(tuple, sequences))
    length = next(i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b)
    return first[:length]


def _forks(sequences: Sequence[Sequence[int]]) -> dict[tuple[int, ...], list[int]]:
    """Every path behind which at least two different ids may follow, and the sequences that go along it."""
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
        prompts: (T, D) embeddings each, from ``model.embed(ids, features)[0]``: typically one candidate's picture.
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


# ------------------------------------------------------------------ bounded text


class LogitFilter(Protocol):
    """A rule for what may be written next."""

    def __call__(self, logits: Tensor, written: Sequence[int], /) -> Tensor:
        """The changed logits (V,) of the next token, knowing the ids written so far."""
        ...


class Suppress:
    """Never these ids: control tokens in an answer, for instance."""

    def __init__(self, ids: Collection[int]) -> None:
        self.ids = torch.tensor(sorted(ids), dtype=torch.long)

    def __call__(self, logits: Tensor, written: Sequence[int]) -> Tensor:
        """The logits with these ids least likely."""
        return logits.index_fill(0, self.ids.to(logits.device), -torch.inf)


class NoRepeat:
    """No run of `length` ids twice: ends the loops that small or confused models fall into."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(self, logits: Tensor, written: Sequence[int]) -> Tensor:
        """The logits with the ids that would complete a repetition least likely."""
        last = self.length - 1
        if len(written) < self.length:
            return logits
        tail = list(written[len(written) - last :])
        seen = [written[i + last] for i in range(len(written) - last) if list(written[i : i + last]) == tail]
        return Suppress(seen)(logits, written) if seen else logits


class Sampler:
    """Chooses the next id. Temperature 0 is the most likely one; ``top_p`` keeps that much probability."""

    def __init__(self, temperature: float = 0.0, top_p: float = 1.0, seed: int | None = None) -> None:
        if temperature < 0 or not 0 < top_p <= 1:
            raise ValueError(f"temperature={temperature!r}, top_p={top_p!r}: give temperature >= 0 and 0 < top_p <= 1")
        self.temperature, self.top_p = temperature, top_p
        self.generator = torch.Generator()
        if seed is not None:
            self.generator.manual_seed(seed)
        else:
            self.generator.seed()

    def __call__(self, logits: Tensor) -> int:
        """An id, from finite logits (V,)."""
        if self.temperature == 0:
            return int(logits.argmax())
        probabilities, ids = (logits.cpu() / self.temperature).softmax(-1).sort(descending=True)
        kept = (probabilities.cumsum(-1) - probabilities) < self.top_p
        return int(ids[torch.multinomial(probabilities * kept, 1, generator=self.generator)])


class TextStream(Generic[B]):
    """Ids of free text, one by one, at most ``max_new_tokens``; a stop id ends it and is not part of it.

    ``finish_reason`` afterwards: "stop", "length", or "interrupted" (``should_stop`` said so). ``prefix`` holds what
    has been fed, which is all but the last id.
    """

    def __init__(
        self,
        model: Continues[B],
        prefix: B,
        *,
        stop_ids: Collection[int],
        max_new_tokens: int,
        filters: Sequence[LogitFilter] = (),
        choose: Callable[[Tensor], int] | None = None,
        should_stop: Callable[[], bool] | None = None,
    ) -> None:
        self.model, self.prefix = model, prefix
        self.stop_ids = frozenset(stop_ids)
        self.max_new_tokens = max_new_tokens
        self.filters, self.choose = tuple(filters), choose or Sampler()
        self.should_stop = should_stop
        self.written: list[int] = []
        self.finish_reason: str | None = None

    def __iter__(self) -> Iterator[int]:
        while (token := self.step()) is not None:
            yield token

    def step(self) -> int | None:
        """The next id, or None at the end."""
        if self.finish_reason is None and len(self.written) >= self.max_new_tokens:
            self.finish_reason = "length"
        if self.finish_reason is None and self.should_stop is not None and self.should_stop():
            self.finish_reason = "interrupted"
        if self.finish_reason is not None:
            return None
        if self.written:
            self.prefix = self.model.extend(self.prefix, self.written[-1:])
        logits = finite(self.prefix.logits[0])
        for apply in self.filters:
            logits = apply(logits, self.written)
        token = self.choose(logits)
        if token in self.stop_ids:
            self.finish_reason = "stop"
            return None
        self.written.append(token)
        return token
