"""Orders and scores: windows over long lists, scores of ranks, fusion with the retrieval score. No models."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from statistics import fmean, pstdev

RANK_CONSTANT = 60  # of reciprocal ranks, as in Cormack et al., SIGIR 2009
_LIMIT = 1e30


def windows(count: int, size: int, stride: int) -> Iterator[tuple[int, int]]:
    """(start, end) of the windows over a list of `count`, from its end to its beginning, overlapping.

    Each window's best move on into the next one, so that the best of all arrive at the front; windows differ by
    `stride`, and `size - stride` move on. Source: RankGPT, arXiv:2304.09542.
    """
    end = count
    while True:
        start = max(0, end - size)
        yield start, end
        if start == 0:
            return
        end -= stride


def rank_scores(order: Sequence[int]) -> dict[int, float]:
    """A score for each position in an order: the log of its reciprocal rank, 1 / (60 + rank)."""
    return {position: -math.log(RANK_CONSTANT + rank) for rank, position in enumerate(order, start=1)}


def fuse(model: Sequence[float], retrieval: Sequence[float | None], weight: float) -> list[float]:
    """Model score + `weight` times retrieval score, each with mean 0 and deviation 1 over the list.

    Args:
        model: any numbers; see `finite`.
        retrieval: None or not finite: as little as the least.
        weight: 0 leaves the retrieval score out.
    """
    known = [score for score in retrieval if score is not None and math.isfinite(score)]
    least = min(known, default=0.0)
    prior = [finite(score if score is not None and math.isfinite(score) else least) for score in retrieval]
    own = _normalised([finite(value) for value in model])
    return [a + weight * b for a, b in zip(own, _normalised(prior), strict=True)]


def _normalised(values: Sequence[float]) -> list[float]:
    centre, scale = (fmean(values), pstdev(values)) if values else (0.0, 0.0)
    return [(value - centre) / scale if scale > 0 else 0.0 for value in values]


def best_first(values: Sequence[float | None], last: Sequence[bool]) -> list[int]:
    """All positions: by value, higher first; then those without a value; then those that `last` names.

    Equals stay in the order they came in.
    """

    def key(position: int) -> tuple[bool, bool, float]:
        value = values[position]
        return last[position], value is None, -(value or 0.0)

    return sorted(range(len(values)), key=key)


def shares(values: Sequence[float | None], last: Sequence[bool]) -> list[float]:
    """The softmax of the values: from 0 to 1, together 1, in the same order; 0 for those without one and the `last`."""
    judged = [value for value, out in zip(values, last, strict=True) if value is not None and not out]
    top = max(judged, default=0.0)
    total = sum(math.exp(value - top) for value in judged) or 1.0
    return [
        0.0 if value is None or out else math.exp(value - top) / total for value, out in zip(values, last, strict=True)
    ]


def finite(value: float) -> float:
    """The value, or a very large or small number where it is none: nothing a model emits may break an order."""
    return -_LIMIT if math.isnan(value) else min(max(value, -_LIMIT), _LIMIT)
