"""The state of a collection of images, without labels: copies, hubs, unreadable files, and shortcuts of queries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mm_retriever.errors import ImageLoadError, QueryError
from mm_retriever.evaluation.comparison import mean_figure, part_values
from mm_retriever.evaluation.datasets import EvaluationSet
from mm_retriever.evaluation.metrics import Figure
from mm_retriever.evaluation.runs import gallery_vectors, main_way, query_vectors, retrieved, ways_of

if TYPE_CHECKING:
    from mm_retriever.embedding import ComposedEmbedding

NEAR_DUPLICATE = 0.98
"""The cosine from which two images count as near duplicates. Our choice; models differ."""
NEIGHBOURS = 10
"""Nearest neighbours of each image, for hubness."""
_LISTED = 20
_BLOCK = 512


@dataclass(frozen=True)
class Shortcut:
    """How far one part of a query answers it alone.

    Args:
        use: "text" or "image": the part that was searched with alone.
        same_first: share of queries whose first image is that of the whole query; needs no labels.
        reached: the data set's first measure with that part alone; None without labels.
        whole: the same measure with the whole query; None without labels.
    """

    use: str
    same_first: float
    reached: Figure | None
    whole: Figure | None


@dataclass(frozen=True)
class Health:
    """The state of a collection.

    Args:
        images: number of images that could be read.
        dead: files that cannot be read, with the reason.
        near_duplicates: number of pairs with a cosine of at least `NEAR_DUPLICATE`.
        nearest_pairs: the first of them, the nearest first.
        hubness: skewness of the numbers of images among whose nearest 10 an image is; above 1 a few images are found
            for everything. Source: Radovanović, Nanopoulos and Ivanović, Hubs in Space, JMLR 11 (2010).
        hubs: the images with the highest of these numbers, with the number.
        never_found: share of images that are among the nearest 10 of no other image.
        shortcuts: for queries of text and image.
    """

    images: int
    dead: tuple[tuple[str, str], ...]
    near_duplicates: int
    nearest_pairs: tuple[tuple[str, str, float], ...]
    hubness: float
    hubs: tuple[tuple[str, int], ...]
    never_found: float
    shortcuts: tuple[Shortcut, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as JSON takes them."""
        return asdict(self)


def nearest(vectors: NDArray[np.float32], count: int) -> tuple[NDArray[np.intp], NDArray[np.float32]]:
    """Return (N, count): the rows nearest to each row but itself, and their cosines, nearest first.

    Args:
        vectors: (N, D) of length 1.
        count: less than N.
    """
    return _compared(vectors, count)[:2]


def _compared(
    vectors: NDArray[np.float32], count: int
) -> tuple[NDArray[np.intp], NDArray[np.float32], int, list[tuple[int, int, float]]]:
    """The rows and cosines of `nearest`, the number of near duplicate pairs, and the nearest of these."""
    rows = np.zeros((len(vectors), count), np.intp)
    cosines = np.zeros((len(vectors), count), np.float32)
    number = 0
    listed: list[tuple[int, int, float]] = []
    for start in range(0, len(vectors), _BLOCK):
        scores = vectors[start : start + _BLOCK] @ vectors.T
        firsts, seconds = np.nonzero(scores >= NEAR_DUPLICATE)
        above = seconds > firsts + start  # each pair once
        number += int(above.sum())
        pair_scores = scores[firsts[above], seconds[above]]
        best = np.argsort(-pair_scores, kind="stable")[:_LISTED]
        places = zip(firsts[above][best], seconds[above][best], pair_scores[best], strict=True)
        listed += [(int(first) + start, int(second), float(cosine)) for first, second, cosine in places]
        own = np.arange(len(scores))
        scores[own, start + own] = -np.inf
        best = np.argpartition(-scores, count - 1, axis=1)[:, :count] if count else rows[:0]
        order = np.take_along_axis(best, np.argsort(-np.take_along_axis(scores, best, 1), 1, kind="stable"), 1)
        rows[start : start + len(scores)] = order
        cosines[start : start + len(scores)] = np.take_along_axis(scores, order, 1)
    return rows, cosines, number, sorted(listed, key=lambda pair: -pair[2])[:_LISTED]


def readable_vectors(
    model: ComposedEmbedding, paths: Sequence[Path], *, show_progress: bool = False
) -> tuple[list[Path], NDArray[np.float32], list[tuple[str, str]]]:
    """Return the images that can be read, their vectors (N, D), and the others with the reason.

    Args:
        model: loaded.
        paths: of the images.
        show_progress: draw a progress bar.

    Raises:
        QueryError: fewer than two can be read.
    """
    from tqdm.auto import tqdm

    kept: list[Path] = []
    dead: list[tuple[str, str]] = []
    vectors: list[NDArray[np.float32]] = []
    size = model.embed_batch_size
    for start in tqdm(range(0, len(paths), size), desc="Embedding images", disable=not show_progress):
        batch = list(paths[start : start + size])
        try:
            vectors.append(model.embed(images=list(map(str, batch))))
            kept += batch
        except ImageLoadError:
            for path in batch:
                try:
                    vectors.append(model.embed(images=[str(path)]))
                    kept.append(path)
                except ImageLoadError as error:
                    dead.append((str(path), error.reason or str(error)))
    if len(kept) < 2:
        raise QueryError(f"{len(kept)} of {len(paths)} images can be read: two are needed at least")
    return kept, np.concatenate(vectors), dead


def folder_health(model: ComposedEmbedding, paths: Sequence[Path], *, show_progress: bool = False) -> Health:
    """Return the state of images without queries.

    Args:
        model: loaded.
        paths: of the images.
        show_progress: draw a progress bar.

    Raises:
        QueryError: fewer than two can be read.
    """
    kept, vectors, dead = readable_vectors(model, paths, show_progress=show_progress)
    return health_of([str(path) for path in kept], vectors, dead)


def set_health(model: ComposedEmbedding, data: EvaluationSet, *, show_progress: bool = False) -> Health:
    """Return the state of the gallery of a data set, and the shortcuts of its queries.

    Raises:
        ImageLoadError: names the first image that cannot be read.
    """
    gallery = gallery_vectors(model, data, show_progress=show_progress)
    return replace(health_of(data.gallery, gallery, ()), shortcuts=shortcuts_of(model, data, gallery))


def health_of(names: Sequence[str], vectors: NDArray[np.float32], dead: Sequence[tuple[str, str]]) -> Health:
    """Return the state of a collection of at least two images.

    Args:
        names: of the images.
        vectors: (N, D) of length 1.
        dead: files that cannot be read, with the reason.
    """
    count = min(NEIGHBOURS, len(vectors) - 1)
    rows, _, number, pairs = _compared(vectors, count)
    times = np.bincount(rows.ravel(), minlength=len(vectors)).astype(np.float64)
    spread = float(times.std())
    skewness = float(((times - times.mean()) ** 3).mean() / spread**3) if spread else 0.0
    hubs = np.argsort(-times, kind="stable")[:5]
    return Health(
        images=len(vectors),
        dead=tuple(dead),
        near_duplicates=number,
        nearest_pairs=tuple((names[first], names[second], cosine) for first, second, cosine in pairs),
        hubness=skewness,
        hubs=tuple((names[row], int(times[row])) for row in hubs),
        never_found=float((times == 0).mean()),
    )


def shortcuts_of(model: ComposedEmbedding, data: EvaluationSet, gallery: NDArray[np.float32]) -> tuple[Shortcut, ...]:
    """Return how far the text alone, and the image alone, answer queries that have both; () if there are none.

    Args:
        model: loaded.
        data: a part of a data set.
        gallery: (G, D) of its gallery.
    """
    both = tuple(query for query in data.queries if query.words["text"] and query.image)
    if not both:
        return ()
    part = replace(data, queries=both)
    way, ways = main_way([part]), ways_of([part])
    runs = {
        use: retrieved(part, gallery, query_vectors(model, part, use=use), ways) for use in ("both", "text", "image")
    }
    figures = {
        use: mean_figure([part_values(run, way, data.measures[0])]) if data.labelled else None
        for use, run in runs.items()
    }
    firsts = {use: [next(iter(run.rankings[way][query.id]), "") for query in both] for use, run in runs.items()}
    return tuple(
        Shortcut(
            use,
            float(np.mean([first == other for first, other in zip(firsts[use], firsts["both"], strict=True)])),
            figures[use],
            figures["both"],
        )
        for use in ("text", "image")
    )
