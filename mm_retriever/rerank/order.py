"""Orders and scores: windows over long lists, rank fusion, fusion with the retrieval score. Plain Python, no models."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from statistics import fmean, pstdev
from typing import Literal

Fusion = Literal["zscore", "minmax", "sum"]
RANK_CONSTANT = 60  # of reciprocal rank fusion, as in Cormack et al., SIGIR 2009
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


def shuffled(count: int, passes: int, seed: int) -> Iterator[list[int]]:
    """`passes` orders of ``range(count)``: as it is, then shuffled, the same for the same seed."""
    for number in range(passes):
        order = list(range(count))
        if number:
            random.Random(f"{seed} {number}").shuffle(order)  # noqa: S311 - no secret
        yield order


def reciprocal_ranks(orders: Sequence[Sequence[int]], count: int) -> list[float]:
    """Scores of ``range(count)`` by reciprocal rank fusion: the mean of 1 / (60 + rank) over the orders."""
    scores = [0.0] * count
    for order in orders:
        for rank, position in enumerate(order, start=1):
            scores[position] += 1 / (RANK_CONSTANT + rank) / len(orders)
    return scores


def fuse(model: Sequence[float], retrieval: Sequence[float | None], weight: float, fusion: Fusion) -> list[float]:
    """Model score + `weight` times retrieval score, each normalised over the list as `fusion` says.

    Args:
        model: Any numbers; see `finite`.
        retrieval: None or not finite: as little as the least.
        weight: 0 leaves the retrieval score out.
        fusion: "zscore": mean 0, deviation 1; "minmax": from 0 to 1; "sum": as they are.
    """
    known = [score for score in retrieval if score is not None and math.isfinite(score)]
    least = min(known, default=0.0)
    prior = [finite(score if score is not None and math.isfinite(score) else least) for score in retrieval]
    own = _normalised([finite(value) for value in model], fusion)
    return [a + weight * b for a, b in zip(own, _normalised(prior, fusion), strict=True)]


def _normalised(values: Sequence[float], fusion: Fusion) -> list[float]:
    if fusion == "sum" or not values:
        return list(values)
    if fusion == "zscore":
        centre, scale = fmean(values), pstdev(values)
    else:
        centre, scale = min(values), max(values) - min(values)
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
