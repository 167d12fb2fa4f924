"""Vectors of queries and images while a model is trained, and the figures of held-out queries."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from cachetools import LRUCache
from numpy.typing import NDArray

from mm_retriever.embedders.embedder import Content, Embedder, Pixels
from mm_retriever.evaluation.datasets import LabelledQuery
from mm_retriever.evaluation.metrics import REMOVED, Evaluation, evaluate
from mm_retriever.evaluation.runs import ranked_rows
from mm_retriever.images import opened_image
from mm_retriever.training.examples import images_of
from mm_retriever.training.recipe import TEMPERATURE

MEASURES = ("Recall@1", "Recall@5", "Recall@10", "MRR")
FIRST = f"Recall@1, {REMOVED}"
CHOSEN = f"MRR, {REMOVED}"
"""The measure by which the best weights are chosen; where no query has an image, there is none to remove."""

_TIE = 1e-6  # of the share, beside the measure

_BATCH = 32
_RANKED = 100  # images of a ranking that are kept
_CACHE_BYTES = 512 * 2**20
_READERS = min(4, os.cpu_count() or 1)


class Vectors:
    """Contents and vectors of a model; prepared images are kept in memory as far as they fit.

    Args:
        embedder: the model.
    """

    def __init__(self, embedder: Embedder) -> None:
        self.embedder = embedder
        self._prepared: LRUCache[Path, Pixels] = LRUCache(_CACHE_BYTES, getsizeof=lambda pixels: pixels.nbytes)

    def contents(self, parts: Sequence[tuple[Path | None, str]]) -> list[Content]:
        """Images, by path, and texts as a model takes them."""
        missing = [image for image in dict.fromkeys(image for image, _ in parts) if image not in self._prepared]
        paths = [image for image in missing if image is not None]
        with ThreadPoolExecutor(_READERS, thread_name_prefix="read-image") as readers:
            fresh = dict(zip(paths, readers.map(self._prepare, paths), strict=True))
        made = [
            Content(text, None if image is None else fresh.get(image, self._prepared.get(image)))
            for image, text in parts
        ]
        for image, pixels in fresh.items():
            if pixels.nbytes <= _CACHE_BYTES:
                self._prepared[image] = pixels
        return made

    def images(self, images: Sequence[Path]) -> NDArray[np.float32]:
        """(N, D) of images as they are stored."""
        return self._encode([(image, "") for image in images], query=False)

    def queries(self, queries: Sequence[LabelledQuery]) -> NDArray[np.float32]:
        """(N, D) of queries."""
        return self._encode([(query.image, query.text) for query in queries], query=True)

    def evaluate(self, queries: Sequence[LabelledQuery]) -> tuple[Evaluation, float]:
        """The figures of queries, each of which ranks all images that they name; a ranking has 100 of them.

        The number beside them chooses between weights: the MRR with the query image removed, and between equal ones the
        mean share of right images in the softmax, which also tells apart two that rank everything right.
        """
        gallery = images_of(queries)
        names = [str(image) for image in gallery]
        stored = self.images(gallery)
        places = {image: place for place, image in enumerate(gallery)}
        run: dict[str, dict[str, float]] = {}
        right = 0.0
        for number, (scores, order) in enumerate(ranked_rows(self.queries(queries), stored)):
            query = queries[number]
            shares = np.exp((scores - scores.max()) / TEMPERATURE)
            if query.image is not None:
                shares[places[query.image]] = 0
            right += float(shares[[places[target] for target in query.targets]].sum() / shares.sum()) / len(queries)
            run[str(number)] = {names[place]: float(scores[place]) for place in order[:_RANKED]}
        wanted = {str(n): dict.fromkeys(map(str, query.targets), 1) for n, query in enumerate(queries)}
        references = {str(n): str(query.image or "") for n, query in enumerate(queries)}
        groups = {str(n): str(query.targets[0]) for n, query in enumerate(queries)}  # not independent of each other
        result = evaluate(run, wanted, MEASURES, references=references, groups=groups)
        return result, result.figures[CHOSEN].mean + _TIE * right

    def _prepare(self, image: Path) -> Pixels:
        with opened_image(image, keep_mode=True) as opened:
            return self.embedder.prepare(opened)

    def _encode(self, parts: Sequence[tuple[Path | None, str]], *, query: bool) -> NDArray[np.float32]:
        blocks = [self.embedder.encode(contents, query=query) for contents in self._batches(parts)]
        return np.concatenate(blocks) if blocks else np.empty((0, self.embedder.dimension), np.float32)

    def _batches(self, parts: Sequence[tuple[Path | None, str]]) -> Iterator[list[Content]]:
        for start in range(0, len(parts), _BATCH):
            yield self.contents(parts[start : start + _BATCH])
