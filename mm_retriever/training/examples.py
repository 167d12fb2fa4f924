"""Queries and images to train and to evaluate on: checked whole before any model is loaded, and split by image.

`Vectors` has those of a model while it is trained, and the figures of held-out queries.
"""

from __future__ import annotations

import os
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from cachetools import LRUCache
from numpy.typing import NDArray

from mm_retriever.embedders.embedder import Content, Embedder, Pixels
from mm_retriever.errors import ImageLoadError, QueryError, one_line
from mm_retriever.evaluation.datasets import LabelledQuery, read_queries
from mm_retriever.evaluation.metrics import REMOVED, Evaluation, evaluate
from mm_retriever.evaluation.runs import ranked_rows
from mm_retriever.images import opened_image, pixel_digest
from mm_retriever.threads import in_threads
from mm_retriever.training.card import TEMPERATURE

_NAMED = 5


@dataclass(frozen=True)
class Examples:
    """What is trained on and what is evaluated on; they have no image in common.

    Args:
        train: queries.
        held_out: queries.
        counts: what was done to them, for the model card.
    """

    train: Sequence[LabelledQuery]
    held_out: Sequence[LabelledQuery]
    counts: Mapping[str, int] = field(default_factory=dict)


def read_examples(
    path: str | os.PathLike[str], *, held_out: str | os.PathLike[str] | None = None, share: float, seed: int
) -> Examples:
    """Return the queries of a file, with every image decoded once and equal images under one path.

    Args:
        path: as of `read_queries`.
        held_out: another such file to evaluate on; None: part of the first.
        share: of the queries that are held out, where there is no other file.
        seed: of the split.

    Raises:
        QueryError: a wrong line, an image that is missing, unreadable or on both sides, or a set that cannot be split.
    """
    files = [read_queries(path)] + ([read_queries(held_out)] if held_out is not None else [])
    digests = _digests({image for queries in files for query in queries for image in query.images})
    first: dict[str, Path] = {}
    for image in sorted(digests):
        first.setdefault(digests[image], image)
    same = {image: first[digest] for image, digest in digests.items()}
    merged = [_merged(queries, same) for queries in files]
    counts = {"lines": sum(map(len, files)), "images": len(digests), "copies of images": len(digests) - len(first)}
    counts["lines merged into a query of the same words and image"] = counts["lines"] - sum(map(len, merged))
    if held_out is None:
        train, evaluated = _split(merged[0], share, seed)
    else:
        train, evaluated = merged
        if both := _searched(train) & _searched(evaluated):
            raise QueryError(
                f"{len(both)} images are trained on and evaluated on, such as {str(min(both))!r}: a model would be "
                "praised for what it was shown; take them out of one of the two files"
            )
    return _apart(train, evaluated, counts)


def images_of(queries: Iterable[LabelledQuery]) -> list[Path]:
    """Every image that queries name, once, in a fixed order."""
    return sorted({image for query in queries for image in query.images})


def _digests(images: Iterable[Path]) -> dict[Path, str]:
    """The digest of the pixels of each image.

    Raises:
        QueryError: says how many cannot be read, and which and why.
    """

    def digest(image: Path) -> str | ImageLoadError:
        try:
            with opened_image(image) as opened:
                return pixel_digest(opened)
        except ImageLoadError as error:
            return error

    names = sorted(images)
    digests = dict(zip(names, in_threads(digest, names), strict=True))
    wrong = [digests[image] for image in names if isinstance(digests[image], ImageLoadError)]
    if wrong:
        named = "; ".join(one_line(error, 200) for error in wrong[:_NAMED])
        more = f"; and {len(wrong) - _NAMED} more" if len(wrong) > _NAMED else ""
        raise QueryError(f"{len(wrong)} of {len(names)} images cannot be read: {named}{more}")
    return {image: digest for image, digest in digests.items() if isinstance(digest, str)}


def _merged(queries: Iterable[LabelledQuery], same: Mapping[Path, Path]) -> list[LabelledQuery]:
    """The queries by distinct words (in any case and spacing) and image: what is right for one line is for others."""
    by_query: dict[tuple[Path | None, str], LabelledQuery] = {}
    for query in queries:
        image = None if query.image is None else same[query.image]
        targets, negatives = (tuple(same[name] for name in part) for part in (query.targets, query.negatives))
        words = unicodedata.normalize("NFC", " ".join(query.text.split()).casefold())
        known = by_query.get((image, words))
        if known is not None:
            targets, negatives = (*known.targets, *targets), (*known.negatives, *negatives)
        if image in targets:
            raise QueryError(f"{query.place}: a target has the very pixels of the query image, and would find itself")
        targets = tuple(dict.fromkeys(targets))
        if both := set(targets) & set(negatives):
            raise QueryError(f"{query.place}: {str(min(both))!r} is right by one line, and wrong by another")
        by_query[image, words] = replace(
            known or query, image=image, targets=targets, negatives=tuple(dict.fromkeys(negatives))
        )
    return list(by_query.values())


def _searched(queries: Iterable[LabelledQuery]) -> set[Path]:
    """Query images and right images."""
    return {image for query in queries for image in (query.image, *query.targets) if image is not None}


def _split(
    queries: Sequence[LabelledQuery], share: float, seed: int
) -> tuple[list[LabelledQuery], list[LabelledQuery]]:
    """Queries to train on and to evaluate on; those that share a query image or a right image stay together."""
    parent: dict[Path, Path] = {}

    def root(image: Path) -> Path:
        while parent.setdefault(image, image) != image:
            parent[image] = image = parent[parent[image]]
        return image

    for query in queries:
        for image in (*query.targets[1:], *(() if query.image is None else (query.image,))):
            parent[root(image)] = root(query.targets[0])
    groups: dict[Path, list[LabelledQuery]] = defaultdict(list)
    for query in queries:
        groups[root(query.targets[0])].append(query)
    wanted = max(1, round(share * len(queries)))
    names = sorted(groups)
    held: set[Path] = set()
    count = 0
    for place in np.random.default_rng(seed).permutation(len(names)):
        size = len(groups[names[place]])
        if count + size <= wanted:
            held.add(names[place])
            count += size
    if count < max(1, wanted // 2):
        largest = max(map(len, groups.values()))
        raise QueryError(
            f"{wanted} of {len(queries)} queries should be held out, but {largest} hang together by images that they "
            "share: give the queries that are held out in a file of their own"
        )
    return (
        [query for query in queries if root(query.targets[0]) not in held],
        [query for query in queries if root(query.targets[0]) in held],
    )


def _apart(train: Sequence[LabelledQuery], evaluated: Sequence[LabelledQuery], counts: dict[str, int]) -> Examples:
    """Without the negatives that the other side searches for, or has as negatives too."""
    if len(train) < 2:
        raise QueryError(f"{len(train)} queries are left to train on; two are the least")
    searched = _searched(evaluated)
    kept = [
        replace(query, negatives=tuple(name for name in query.negatives if name not in searched)) for query in train
    ]
    trained = {image for query in kept for image in query.images}
    own = [
        replace(query, negatives=tuple(name for name in query.negatives if name not in trained)) for query in evaluated
    ]
    before, after = (sum(len(query.negatives) for query in part) for part in ([*train, *evaluated], [*kept, *own]))
    counts |= {"negatives left out because the other side has them": before - after}
    counts |= {"queries trained on": len(kept), "queries held out": len(own)}
    counts |= {"images trained on": len(images_of(kept)), "images held out": len(images_of(own))}
    return Examples(kept, own, counts)


MEASURES = ("Recall@1", "Recall@5", "Recall@10", "MRR")
FIRST = f"Recall@1, {REMOVED}"
CHOSEN = f"MRR, {REMOVED}"
"""The measure by which the best weights are chosen; where no query has an image, there is none to remove."""

_TIE = 1e-6  # of the share, beside the measure

_BATCH = 32
_RANKED = 100  # images of a ranking that are kept
_CACHE_BYTES = 512 * 2**20


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
        fresh = dict(zip(paths, in_threads(self._prepare, paths), strict=True))
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
