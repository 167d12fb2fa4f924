"""Milvus Lite files: where they are, and whose turn it is.

A Milvus Lite file is a folder. Milvus Lite lets one process at a time into it. Knows nothing of connections.
"""

from __future__ import annotations

import threading
from pathlib import Path

from mm_retriever.errors import StoreError


def lite_path(place: str) -> str:
    """Return the absolute path of a Milvus Lite file; its folder is made.

    Raises:
        StoreError: Milvus would not take the path for one of its files, or the folder cannot be made.
    """
    if "\0" in place:
        raise StoreError("a path holds no NUL byte")
    if not place.endswith(".db"):
        raise StoreError(
            f"{place!r} is neither a server (http://, https://, tcp://, unix:) nor a Milvus Lite file: Milvus knows "
            f"its files by a name that ends in '.db', in small letters; try {place.rstrip('/') + '.db'!r}"
        )
    try:
        path = Path(place).expanduser().resolve()
        is_file = path.is_file()
    except (OSError, RuntimeError) as error:  # a folder that may not be entered, links in a circle, no such user
        raise StoreError(f"cannot open {place!r}: {getattr(error, 'strerror', None) or error}") from error
    if is_file:
        raise StoreError(f"{path} is a file, as Milvus Lite 2 wrote it; Milvus Lite 3 keeps a folder: index anew")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(f"cannot make the folder of {path}: {error.strerror or error}") from error
    return str(path)


class Turn:
    """A lock that nobody can keep from the others by coming back at once; not to be taken twice by one thread."""

    def __init__(self) -> None:
        self._next, self._held = threading.Lock(), threading.Lock()

    def __enter__(self) -> None:
        with self._next:  # who has just let go waits here, behind the one who waits already
            self._held.acquire()

    def __exit__(self, *_: object) -> None:
        self._held.release()
