"""Pictures read, decoded and cut to what the model sees, ahead of it, by a few threads.

Owns the look-ahead: however many and however large the pictures of a run are, one for each thread is in memory whole.
Knows nothing of stores.
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

from mm_retriever.errors import ImageLoadError, reason_of
from mm_retriever.images import ImagePolicy, ImageSource, file_size, opened_image, read_image_bytes
from mm_retriever.ingest.exif import exif_columns

THREADS = min(4, os.cpu_count() or 1)

T = TypeVar("T")


@dataclass(frozen=True)
class ReadPicture:
    """What came of reading one picture file.

    Attributes:
        digest: SHA-256 of the file.
        size: width and height, upright.
        prepared: what the model needs of the pixels; None if the digest is the known one.
        error: why there is none of this; "" if there is.
        exif: columns from the EXIF block; empty where it is not asked for.
        spoiled: whether a decoder looked at all these bytes and found that they are no image; False for whatever a
            second try, more memory or another reader might change.
        length: bytes that were read.
    """

    digest: str = ""
    size: tuple[int, int] = (0, 0)
    prepared: Any = None
    error: str = ""
    exif: dict[str, Any] = field(default_factory=dict)
    spoiled: bool = False
    length: int = -1


def read_picture(
    source: ImageSource,
    known_digest: str,
    prepare: Callable[[Image.Image], Any],
    policy: ImagePolicy,
    with_exif: bool = False,
) -> ReadPicture:
    """Read a picture file once, for its digest and for the model; one of a known digest is not decoded again."""
    try:
        data = read_image_bytes(source, policy=policy)
        digest = hashlib.sha256(data).hexdigest()
        exif = exif_columns(data) if with_exif else {}
        if digest == known_digest:
            return ReadPicture(digest, exif=exif, length=len(data))
        try:
            # the model resizes grey and CMYK in their own mode
            with opened_image(data, policy=policy, keep_mode=True) as image:
                return ReadPicture(digest, file_size(data, image), prepare(image), exif=exif, length=len(data))
        except ImageLoadError as error:
            return ReadPicture(error=error.reason or str(error), spoiled=_is_verdict(error), length=len(data))
    except ImageLoadError as error:
        return ReadPicture(error=error.reason or str(error))  # the name of the source stands beside it in a report
    except Exception as error:  # one picture, whatever is wrong with it, must not end the run
        return ReadPicture(error=reason_of(error))


def _is_verdict(error: ImageLoadError) -> bool:
    """Whether the bytes themselves are at fault, and not the machine, a limit of ours or a reader that is missing."""
    cause = error.__cause__
    machine = isinstance(cause, MemoryError | ImportError) or (isinstance(cause, OSError) and bool(cause.errno))
    return not machine and "ImagePolicy." not in str(error) and "not supported" not in str(error)


def read_ahead(
    tasks: Iterator[T], read: Callable[[T], ReadPicture], *, ahead: int
) -> Generator[tuple[T, ReadPicture], None, None]:
    """Yield each task with its picture, in order, while up to `ahead` more are being read."""
    waiting: deque[tuple[T, Future[ReadPicture]]] = deque()
    pool = ThreadPoolExecutor(THREADS, thread_name_prefix="read-picture")
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
