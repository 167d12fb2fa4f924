"""What a query is trained on: its right image and wrong ones, or candidates with what a reranker says of them.

Source of the rule that a mined image as near as the right one is no wrong one: NV-Retriever (arXiv:2407.15831), which
takes those with at most 95% of the right one's score. Source of the query image among the wrong ones: MegaPairs
(arXiv:2412.14475).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from llama_index.core.schema import ImageNode, NodeWithScore, QueryBundle
from numpy.typing import NDArray

from mm_retriever.errors import QueryError
from mm_retriever.evaluation.datasets import LabelledQuery
from mm_retriever.evaluation.runs import ranked_rows
from mm_retriever.rerank.reranker import Reranker
from mm_retriever.rerank.scorer import RERANK_MODEL_SCORE
from mm_retriever.training.examples import Vectors, images_of

MOST_OF_RIGHT = 0.95
JUDGED = 8  # candidates of each query that the teacher judges
_LEAST = 1e-6  # of a share or a score from 0 to 1: its logarithm is finite


@dataclass(frozen=True)
class Row:
    """One query as it is trained on.

    Args:
        query: number of the query.
        images: the right one, then the wrong ones; with a teacher all candidates, its best first.
        shares: what the teacher gives each of the images, together 1; empty without a teacher.
    """

    query: int
    images: tuple[Path, ...]
    shares: tuple[float, ...] = ()


def mined_rows(queries: Sequence[LabelledQuery], vectors: Vectors, count: int) -> list[Row]:
    """A row for each query and right image: the query image, the wrong images given, and those that look right.

    All rows have as many images: where the pool of all images of the queries is small, fewer than `count` + 1.

    Args:
        queries: to train on.
        vectors: of the model before it is trained.
        count: of wrong images.
    """
    pool = images_of(queries)
    places = {image: place for place, image in enumerate(pool)}
    stored = vectors.images(pool)
    triples: list[tuple[int, Path, list[Path]]] = []
    for number, (scores, best) in enumerate(ranked_rows(vectors.queries(queries), stored)):
        query = queries[number]
        right = min(float(scores[places[target]]) for target in query.targets)
        limit = right - (1 - MOST_OF_RIGHT) * abs(right)
        given = [*([] if query.image is None else [query.image]), *query.negatives]
        taken = {*query.targets, *given}
        others = [place for place in best if pool[place] not in taken]
        # where too few are surely wrong, the rest are those that look least right
        others = [place for place in others if scores[place] <= limit] + [
            place for place in reversed(others) if scores[place] > limit
        ]
        wrong = (given + [pool[place] for place in others[:count]])[:count]
        triples += [(number, target, wrong) for target in query.targets]
    least = min(len(wrong) for _, _, wrong in triples)
    return [Row(number, (target, *wrong[:least])) for number, target, wrong in triples]


def judged_rows(
    queries: Sequence[LabelledQuery], vectors: Vectors, teacher: Reranker, progress: Callable[[], object]
) -> list[Row]:
    """A row for each query: what the model finds among all images of the queries, as a reranker judges it.

    The query image is not judged: it stands last, with no share. What the file says is right plays no part.

    Args:
        queries: to train on.
        vectors: of the model before it is trained.
        teacher: whose scores are learned.
        progress: called after each query.

    Raises:
        QueryError: fewer than two candidates a query, or a candidate without a score.
    """
    pool = images_of(queries)
    stored = vectors.images(pool)
    rows = []
    for number, (scores, order) in enumerate(ranked_rows(vectors.queries(queries), stored)):
        query = queries[number]
        best = [place for place in order if pool[place] != query.image][:JUDGED]
        if len(best) < 2:
            raise QueryError(f"{query.place}: {len(best)} images to judge; the queries name too few")
        shares = _shares(query, [(pool[place], float(scores[place])) for place in best], teacher)
        judged = sorted(range(len(best)), key=lambda place: -shares[place])
        images, given = [pool[best[place]] for place in judged], [shares[place] for place in judged]
        if query.image is not None:
            images.append(query.image)
            given.append(0.0)
        rows.append(Row(number, tuple(images), tuple(given)))
        progress()
    return _as_long(rows)


def _as_long(rows: list[Row]) -> list[Row]:
    """All rows with as many images as the shortest."""
    least = min(len(row.images) for row in rows)

    def cut(row: Row) -> Row:
        if len(row.images) == least:
            return row
        middle = least - 1 if row.shares[-1] == 0 else least  # the query image stays
        kept = [*range(middle), *([len(row.images) - 1] if middle < least else [])]
        shares = np.array([row.shares[place] for place in kept])
        return Row(row.query, tuple(row.images[place] for place in kept), tuple((shares / shares.sum()).tolist()))

    return [cut(row) for row in rows]


def _shares(query: LabelledQuery, candidates: Sequence[tuple[Path, float]], teacher: Reranker) -> list[float]:
    """The teacher's softmax over candidates, in their order."""
    nodes = [
        NodeWithScore(node=ImageNode(id_=str(place), image_path=str(image)), score=score)
        for place, (image, score) in enumerate(candidates)
    ]
    image = None if query.image is None else str(query.image)
    result = teacher.rerank(nodes, QueryBundle(query.text, image_path=image))
    scores = {int(node.node.node_id): node.node.metadata.get(RERANK_MODEL_SCORE) for node in result.nodes}
    values = [scores.get(place) for place in range(len(candidates))]
    if missing := [candidates[place][0] for place, value in enumerate(values) if value is None]:
        reason = result.error or "the teacher gives no scores for it"
        raise QueryError(f"{query.place}: {str(missing[0])!r} was not judged: {reason}")
    return _softmax([float(value) for value in values if value is not None], calibrated=_is_calibrated(teacher))


def _is_calibrated(teacher: Reranker) -> bool:
    return bool(getattr(getattr(teacher, "scorer", None), "calibrated", False))


def _softmax(values: Sequence[float], *, calibrated: bool) -> list[float]:
    if calibrated:  # chances from 0 to 1, each by itself: their log-odds are what a softmax takes
        chances = [min(max(value, _LEAST), 1 - _LEAST) for value in values]
        values = [math.log(chance / (1 - chance)) for chance in chances]
    shifted: NDArray[np.float64] = np.exp(np.array(values) - max(values))
    shares: list[float] = (shifted / shifted.sum()).tolist()
    return shares
