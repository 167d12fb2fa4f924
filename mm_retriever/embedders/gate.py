"""Checks that a faster form of a model keeps the model's vectors: the sample images, and the measure.

Half of the images calibrate a quantisation; the others, which it never saw, measure it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mm_retriever.demo.catalogue import catalogue, draw_product
from mm_retriever.embedders.embedder import Content, Embedder
from mm_retriever.errors import ImageLoadError, QueryError
from mm_retriever.images import is_image_path, load_image

CALIBRATED = 120
HELD_OUT = 128
LEAST_IMAGES = 64
"""Images in each half; a folder with fewer is filled up with drawn images."""
MOST_LISTED = 100_000  # files of a folder that are chosen from
LEAST_COSINE = 0.995
LEAST_SAME = 0.98
TOP = 10

Images: TypeAlias = str | os.PathLike[str] | Sequence[Image.Image | str | os.PathLike[str]] | None
"""A folder of images, images, or paths of images; None: the drawn catalogue."""


@dataclass(frozen=True)
class Samples:
    """Contents for calibration and measurement, prepared for a model.

    Args:
        calibration: texts, images and pairs that calibrate a quantisation.
        held_out: those that measure it.
        source: the origin of the images, for people.
    """

    calibration: list[Content]
    held_out: list[Content]
    source: str


@dataclass(frozen=True)
class Gate:
    """The distance of vectors from those in float32, over held-out texts, images and pairs.

    Args:
        least_cosine: the least cosine of a vector with the same vector in float32.
        mean_cosine: the mean cosine.
        same_top: share of each query's nearest images that are its nearest in float32 too.
        images: number of images that were searched.
        source: the origin of the images.
    """

    least_cosine: float
    mean_cosine: float
    same_top: float
    images: int
    source: str

    @property
    def passes(self) -> bool:
        """Whether a collection in float32 may be searched and extended with these vectors."""
        return self.least_cosine >= LEAST_COSINE and self.same_top >= LEAST_SAME

    def __str__(self) -> str:
        return (
            f"least cosine {self.least_cosine:.4f} (at least {LEAST_COSINE}), mean {self.mean_cosine:.4f}, "
            f"{self.same_top:.1%} of the top {TOP} the same (at least {LEAST_SAME:.0%}), on {self.images} held-out "
            f"images of {self.source}"
        )


def measure(
    reference: NDArray[np.float32], vectors: NDArray[np.float32], held_out: Sequence[Content], source: str
) -> Gate:
    """Return the gate of (B, D) vectors of the held-out contents against (B, D) in float32."""
    cosines = np.sum(reference.astype(np.float64) * vectors, axis=1)
    images = [row for row, content in enumerate(held_out) if content.image is not None and not content.text]
    same = np.mean(
        [
            len(nearest & of_float) / TOP
            for nearest, of_float in zip(_nearest(vectors, images), _nearest(reference, images), strict=True)
        ]
    )
    return Gate(float(cosines.min()), float(cosines.mean()), float(same), len(images), source)


def _nearest(vectors: NDArray[np.float32], images: Sequence[int]) -> Iterator[set[int]]:
    """Yield the nearest images of every content, without the content itself."""
    scores = vectors @ vectors[images].T
    for place, row in enumerate(images):
        scores[row, place] = -np.inf
    for row in np.argsort(-scores, axis=1, kind="stable")[:, :TOP]:
        yield set(row.tolist())


def samples(embedder: Embedder, calibration: Images) -> Samples:
    """Return the contents on which a model is quantised and measured.

    Args:
        embedder: the model; kinds of content that it cannot embed are left out.
        calibration: a folder of images, or images (or their paths); default: the drawn catalogue.

    Raises:
        QueryError: `calibration` is a path, but not a folder.
    """
    wanted = CALIBRATED + HELD_OUT
    images, source = _own(embedder, calibration, wanted)
    products = catalogue()[:wanted]
    if len(images) < 2 * LEAST_IMAGES:
        source = f"{source} and the drawn catalogue" if images else "the drawn catalogue"
        for product in products[len(images) :]:
            drawn = draw_product(product.kind, product.pattern, product.colour, product.seed)
            images.append(embedder.prepare(drawn))
    kinds = _kinds(embedder, images[0])
    order = np.random.default_rng(0).permutation(len(images)).tolist()  # own and drawn ones in both halves
    half = len(images) * CALIBRATED // wanted
    parts = []
    for rows in (order[:half], order[half:]):
        contents = [Content(image=images[row]) for row in rows]
        contents += [Content(products[row].description) for row in rows] if "text" in kinds else []
        contents += [Content(products[-row].description, images[row]) for row in rows[::2]] if "pair" in kinds else []
        parts.append(contents)
    return Samples(parts[0], parts[1], source)


def _kinds(embedder: Embedder, image: Any) -> set[str]:
    """The kinds of content that a model embeds besides images."""
    trials = {"text": Content("a mug"), "pair": Content("a mug", image)}
    kinds = set()
    for kind, content in trials.items():
        try:
            embedder.encode([content])
        except QueryError:
            continue
        kinds.add(kind)
    return kinds


def _own(embedder: Embedder, given: Images, wanted: int) -> tuple[list[Any], str]:
    """Distinct prepared images of the caller, and the name of their source."""
    if given is None:
        return [], ""
    if not isinstance(given, str | os.PathLike):
        loaded = (load_image(image) if isinstance(image, str | os.PathLike) else image for image in given)
        return list(_different(embedder, loaded, wanted)), "the images given"
    folder = Path(given).expanduser()
    if not folder.is_dir():
        raise QueryError(f"calibration={os.fspath(given)!r} is no folder: give one of images, or the images")
    below = (Path(place, name) for place, _, names in os.walk(folder) for name in names if is_image_path(name))
    listed = sorted(islice(below, MOST_LISTED))
    # from the whole folder, with spares for files that cannot be read or are copies
    chosen = [listed[row] for row in np.random.default_rng(0).permutation(len(listed))[: 2 * wanted]]
    failed: list[Path] = []
    images = list(_different(embedder, _read(chosen, failed), wanted))
    unread = f", {len(failed)} unreadable left out" if failed else ""
    return images, f"{str(folder)!r}{unread}"


def _read(paths: Sequence[Path], failed: list[Path]) -> Iterator[Image.Image]:
    for path in paths:
        try:
            yield load_image(path)
        except ImageLoadError:
            failed.append(path)


def _different(embedder: Embedder, images: Iterable[Image.Image], wanted: int) -> Iterator[Any]:
    known: set[bytes] = set()
    for image in images:
        prepared = embedder.prepare(image)
        if (content := prepared.tobytes()) not in known:
            known.add(content)
            yield prepared
        if len(known) == wanted:
            return
