"""Images read, decoded and cut to what the model sees, ahead of it, by a few threads.

However many and however large the images of a run are, memory holds one for each thread whole.
"""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

from PIL import Image

from mm_retriever.embedding import ComposedEmbedding
from mm_retriever.errors import ImageLoadError, reason_of
from mm_retriever.images import ImagePolicy, ImageSource, file_size, opened_image, read_image_bytes
from mm_retriever.ingest.exif import exif_columns

_LARGE = (2048, 1536)
THREADS = min(4, os.cpu_count() or 1)

T = TypeVar("T")


@dataclass(frozen=True)
class ReadImage:
    """The outcome of reading one image file."""

    digest: str = ""  # SHA-256 of the file
    size: tuple[int, int] = (0, 0)  # width and height, upright
    prepared: Any = None  # the pixels as the model takes them; None if the digest is the known one
    error: str = ""  # why there are no pixels
    exif: dict[str, Any] = field(default_factory=dict)  # columns from the EXIF block, where they are asked for
    spoiled: bool = False  # the bytes are no image, whatever a second try, more memory or another decoder might change
    unread: bool = False  # the machine failed (a disk, a permission, too little memory): nothing is known of the bytes
    length: int = -1  # bytes that were read


def read_image(
    source: ImageSource,
    known_digest: str,
    prepare: Callable[[Image.Image], Any],
    policy: ImagePolicy,
    with_exif: bool = False,
    least_side: int = 0,
) -> ReadImage:
    """Read an image file once, for its digest and for the model; a file with the known digest is not decoded.

    `least_side`: see `opened_image`.
    """
    try:
        data = read_image_bytes(source, policy=policy)
        digest = hashlib.sha256(data).hexdigest()
        exif = exif_columns(data) if with_exif else {}
        if digest == known_digest:
            return ReadImage(digest, exif=exif, length=len(data))
        try:
            # the model resizes grey and CMYK in their own mode
            with opened_image(data, policy=policy, keep_mode=True, least_side=least_side) as image:
                return ReadImage(digest, file_size(data, image), prepare(image), exif=exif, length=len(data))
        except ImageLoadError as error:
            unread = _blames_machine(error.__cause__)
            spoiled = not unread and _blames_bytes(error)
            return ReadImage(error=error.reason or str(error), spoiled=spoiled, unread=unread, length=len(data))
    except ImageLoadError as error:  # reports name the source themselves
        return ReadImage(error=error.reason or str(error), unread=_blames_machine(error.__cause__))
    except Exception as error:  # no single image may end the run
        return ReadImage(error=reason_of(error), unread=_blames_machine(error))


class ImageReader:
    """Reads images for a model.

    Args:
        embed_model: the model.
        policy: what may be read.
        exif: whether to read EXIF blocks.
        exact_pixels: see `ingest_images`.
    """

    def __init__(
        self, embed_model: ComposedEmbedding, policy: ImagePolicy, exif: bool, exact_pixels: bool | None
    ) -> None:
        self.policy = policy
        self._prepare, self._exif = embed_model.prepare_image, exif
        if exact_pixels is None:
            exact_pixels = not getattr(embed_model, "dtype", "").startswith("int8")
        shape = (0, 0) if exact_pixels else self._prepare(Image.new("RGB", _LARGE)).shape
        self._least_side = 2 * min(shape[:2])

    @property
    def notes(self) -> tuple[str, ...]:
        """The notes for the report."""
        reduced = "large JPEG files were decoded at a part of their size, never below twice what the model sees"
        return (reduced,) if self._least_side else ()

    def read(self, source: ImageSource, known_digest: str) -> ReadImage:
        """As `read_image`."""
        return read_image(source, known_digest, self._prepare, self.policy, self._exif, self._least_side)


def _blames_machine(cause: BaseException | None) -> bool:
    return isinstance(cause, MemoryError) or (isinstance(cause, OSError) and bool(cause.errno))


def _blames_bytes(error: ImageLoadError) -> bool:
    """Whether the bytes themselves are at fault, and not one of our limits or a missing decoder."""
    missing = isinstance(error.__cause__, ImportError)
    return not missing and "ImagePolicy." not in str(error) and "not supported" not in str(error)


def read_ahead(
    tasks: Iterator[T], read: Callable[[T], ReadImage], *, ahead: int
) -> Generator[tuple[T, ReadImage], None, None]:
    """Yield each task with its image, in order, while up to `ahead` more are being read."""
    waiting: deque[tuple[T, Future[ReadImage]]] = deque()
    pool = ThreadPoolExecutor(THREADS, thread_name_prefix="read-image")
    try:
        for task in tasks:
            waiting.append((task, pool.submit(read, task)))
            if len(waiting) > ahead:
                first, future = waiting.popleft()
                yield first, future.result()
        while waiting:
            first, future = waiting.popleft()
            yield first, future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
