"""How a query vector is made of several, and moved: means, balance, feedback. Plain numpy on vectors of length 1."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

BETA, GAMMA = 0.75, 0.15
"""How far liked results pull, and disliked ones push: the values that the textbook recommends."""

AVOID = 0.5
"""How far words to avoid push. Our choice: at 1, the query itself no longer counts for more than they do."""

Vector = NDArray[np.float32]


def unit(vector: NDArray[np.floating]) -> Vector:
    """(D,) of length 1; a vector of zeros stays as it is."""
    length = float(np.linalg.norm(vector))
    return (vector / length if length > 0 else vector).astype(np.float32)


def mean(vectors: NDArray[np.floating]) -> Vector:
    """(D,) of length 1, in the middle of vectors (N, D)."""
    return unit(np.asarray(vectors, dtype=np.float64).mean(axis=0))


def balanced(image: Vector, both: Vector, text: Vector, balance: float) -> Vector:
    """(D,): what is like the image (0), the model's own vector of both (0.5), or like the words (1).

    Between them it moves along straight lines: `2b * both + (1 - 2b) * image` up to the middle, and likewise to `text`
    beyond it; then it gets length 1. Our choice: the middle is exactly what the model makes of an image with a text.

    Args:
        image: (D,) of the image alone.
        both: (D,) of the image with the text.
        text: (D,) of the text alone.
        balance: 0 to 1.
    """
    end, share = (image, 1 - 2 * balance) if balance <= 0.5 else (text, 2 * balance - 1)
    return unit((1 - share) * both.astype(np.float64) + share * end.astype(np.float64))


def rocchio(
    query: Vector,
    liked: NDArray[np.floating],
    disliked: NDArray[np.floating],
    *,
    beta: float = BETA,
    gamma: float = GAMMA,
) -> Vector:
    """(D,): the query, nearer to what is liked and farther from what is not: `q + beta * mean(L) - gamma * mean(D)`.

    Source: J. J. Rocchio, Relevance feedback in information retrieval (1971); equation 9.3 of Manning, Raghavan and
    Schütze, Introduction to Information Retrieval (2008), which recommends 1, 0.75 and 0.15. There the weights of words
    stay positive; vectors of a model have no such bound. The result gets length 1.

    Args:
        query: (D,).
        liked: (N, D); N may be 0.
        disliked: (M, D); M may be 0.
        beta: weight of the mean of `liked`.
        gamma: weight of the mean of `disliked`.
    """
    moved = query.astype(np.float64)
    if len(liked):
        moved = moved + beta * np.asarray(liked, dtype=np.float64).mean(axis=0)
    if len(disliked):
        moved = moved - gamma * np.asarray(disliked, dtype=np.float64).mean(axis=0)
    return unit(moved)


def avoiding(query: Vector, avoided: NDArray[np.floating], *, weight: float = AVOID) -> Vector:
    """(D,): the query without what it shares with vectors of words (M, D): `q - weight * mean(avoided)`, length 1.

    Rocchio's formula with words in the place of disliked results, and a weight that shows with a single word.
    """
    return rocchio(query, avoided[:0], avoided, gamma=weight)
