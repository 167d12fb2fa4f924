"""How many of the nearest rows a collection's index finds, measured on its own vectors."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mm_retriever.store.collection import Collection
from mm_retriever.store.schema import ID_FIELD, VECTOR_FIELD

QUERIES = 100
TOP = 10
_TIE = 1e-5  # scores this near are equal: sums in another order differ by as much
_PAGE_ROWS = 2_000


@dataclass(frozen=True)
class Recall:
    """What searches with a collection's own vectors find.

    Attributes:
        rows: in the collection.
        queries: vectors of it that were searched with.
        recall: share of the nearest rows that were found.
        milliseconds: of one search, the median.
        index: what the vectors are indexed by.
    """

    rows: int
    queries: int
    recall: float
    milliseconds: float
    index: str

    def __str__(self) -> str:
        if not self.queries:
            return f"{self.index}: no rows to measure"
        return (
            f"{self.index} finds {self.recall:.1%} of the {TOP} nearest, by {self.queries} of {self.rows} own vectors; "
            f"{self.milliseconds:.1f} ms a search"
        )


def measure_recall(collection: Collection) -> Recall:
    """The recall of an open collection; reads all of its vectors once, in pages."""
    chooser = random.Random(0)  # noqa: S311 - the same rows every time
    chosen: list[str] = []
    rows = 0
    for page in collection.scan((), ""):
        for row in page:  # a reservoir: each row is as likely as any other
            rows += 1
            if len(chosen) < QUERIES:
                chosen.append(row[ID_FIELD])
            elif (place := chooser.randrange(rows)) < QUERIES:
                chosen[place] = row[ID_FIELD]
    stored = collection.columns(chosen, (VECTOR_FIELD,))
    queries = [[float(number) for number in row[VECTOR_FIELD]] for row in stored.values()]
    if not queries:
        return Recall(rows, 0, 0.0, 0.0, collection.index_type)
    least = _least_scores(np.array(queries, dtype=np.float32), _vectors(collection), collection.metric == "COSINE")
    found, taken = 0, []
    for query, bound in zip(queries, least, strict=True):
        start = time.perf_counter()
        hits = collection.search(query, "", min(TOP, rows), ())
        taken.append(1_000 * (time.perf_counter() - start))
        found += sum(float(hit["distance"]) >= bound - _TIE for hit in hits)
    share = found / (len(queries) * min(TOP, rows))
    return Recall(rows, len(queries), share, statistics.median(taken), collection.index_type)


def _vectors(collection: Collection) -> Iterator[NDArray[np.float32]]:
    for page in collection.scan((VECTOR_FIELD,), "", page_rows=_PAGE_ROWS):
        yield np.array([row[VECTOR_FIELD] for row in page], dtype=np.float32)


def _least_scores(
    queries: NDArray[np.float32], pages: Iterator[NDArray[np.float32]], cosine: bool
) -> NDArray[np.float32]:
    """Of each query, the score of the last of the nearest rows, by comparing it with every row."""
    best = np.full((len(queries), 0), -np.inf, dtype=np.float32)
    if cosine:
        queries = queries / np.linalg.norm(queries, axis=1, keepdims=True)
    for vectors in pages:
        if cosine:
            vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        scores = np.concatenate((best, queries @ vectors.T), axis=1)
        best = -np.sort(-scores, axis=1)[:, :TOP]
    least: NDArray[np.float32] = best[:, -1]
    return least
