"""`Refinement`: what a person adds to a query while looking at results, and the vector that it makes of the query.

Several images, the balance of image and words, words to avoid, results that were liked or not. The maths is plain
numpy on vectors of length 1. Knows nothing of how results are searched.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real

import numpy as np
from llama_index.core.schema import QueryBundle
from numpy.typing import NDArray

from mm_retriever.embedding import ComposedEmbedding
from mm_retriever.errors import QueryError, shown
from mm_retriever.images import ImageSource
from mm_retriever.store import ImageStore
from mm_retriever.store.schema import VECTOR_FIELD

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


MOST_PARTS = 64


def _is_share(value: object) -> bool:
    """Whether it is a number from 0 to 1, of numpy or not."""
    return not isinstance(value, bool) and isinstance(value, Real) and 0 <= float(value) <= 1


@dataclass(frozen=True)
class Refinement:
    """Changes to a query.

    Args:
        images: further query images; the query is the mean of what it is with each.
        balance: 0: like the images alone; 0.5: the model's vector of images and words; 1: like the words alone. Has a
            meaning where the query has both.
        avoid: words that results should have nothing of.
        liked: ids of stored images that the results should be more like.
        disliked: ids of stored images that the results should be less like.

    Raises:
        QueryError: a balance outside 0 to 1, one thing where a list is asked for, or more than 64 of a kind.
    """

    images: tuple[ImageSource, ...] = ()
    balance: float = 0.5
    avoid: tuple[str, ...] = ()
    liked: tuple[str, ...] = ()
    disliked: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not _is_share(self.balance):
            raise QueryError(f"balance {shown(self.balance)}: give a number from 0 (like the image) to 1 (the words)")
        for name in ("images", "avoid", "liked", "disliked"):
            given = getattr(self, name)
            if isinstance(given, str | bytes | os.PathLike):  # its letters would be words, ids or paths
                raise QueryError(f"{name} is {shown(given)}: give a list, {name}=[...]")
            object.__setattr__(self, name, tuple(given))
            if len(getattr(self, name)) > MOST_PARTS:
                raise QueryError(f"{name}: {len(getattr(self, name))} given, at most {MOST_PARTS} are taken")

    @property
    def is_empty(self) -> bool:
        """Whether it changes no query."""
        return self == Refinement()

    def vector(self, query: QueryBundle, base: Sequence[float], model: ComposedEmbedding, store: ImageStore) -> Vector:
        """(D,) of length 1: the vector of the query with these changes.

        Args:
            query: its words and its image.
            base: (D,) the vector of these.
            model: the model of the base.
            store: where liked and disliked images are.

        Raises:
            QueryError: an id that is not in the store, or nothing is left of the query.
            ImageLoadError: an image cannot or must not be read.
        """
        vector = unit(np.asarray(base, dtype=np.float32))  # a mean of several texts is shorter
        words = query.query_str.strip() if query.query_str else ""
        texts = query.custom_embedding_strs or ([words] if words else [])
        if self.images or (self.balance != 0.5 and texts and query.image_path):
            vector = self._of_parts(texts, query.image_path, vector, model)
        if avoided := [text for text in self.avoid if text.strip()]:
            vector = avoiding(vector, np.array([model.get_query_embedding(text) for text in avoided]))
        if self.liked or self.disliked:
            known = stored_vectors(store, (*self.liked, *self.disliked))
            rows = np.array([known[id_] for id_ in (*self.liked, *self.disliked)], dtype=np.float32)
            vector = rocchio(vector, rows[: len(self.liked)], rows[len(self.liked) :])
        if not math.isclose(float(np.linalg.norm(vector)), 1, abs_tol=1e-3):
            raise QueryError("nothing is left of the query: what it looks for is what it avoids")
        return vector

    def _of_parts(self, texts: Sequence[str], image: str | None, base: Vector, model: ComposedEmbedding) -> Vector:
        images: list[ImageSource] = [image, *self.images] if image else list(self.images)
        if not texts:
            rows = np.array([model.get_image_embedding(source, query=True) for source in images])
            is_given = not image and bool(base.any())  # a query that is nothing but its vector
            return mean(np.vstack([base, rows]) if is_given else rows)
        both = base
        if self.images:
            each = [text for text in texts for _ in images]
            both = mean(np.array(model.get_composed_embedding_batch(each, images * len(texts))))
        if self.balance == 0.5:
            return both
        alone = mean(np.array([model.get_image_embedding(source, query=True) for source in images]))
        words = mean(np.array([model.get_query_embedding(text) for text in texts]))
        return balanced(alone, unit(both), words, self.balance)


def stored_vectors(store: ImageStore, ids: Sequence[str]) -> dict[str, NDArray[np.float32]]:
    """The vectors (D,) of stored images, by id.

    Raises:
        QueryError: an id that is not in the store.
    """
    rows = store.columns(list(dict.fromkeys(ids)), [VECTOR_FIELD])
    if missing := [id_ for id_ in ids if id_ not in rows]:
        raise QueryError(f"no image of the id {shown(missing[0])} is in the store; search again")
    return {id_: np.asarray(row[VECTOR_FIELD], dtype=np.float32) for id_, row in rows.items()}
