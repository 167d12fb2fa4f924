"""Milvus Lite files: where they are, and which of them this process has open.

A Milvus Lite file is a folder. Milvus Lite lets one process at a time into it. Knows nothing of connections.
"""

from __future__ import annotations

import threading
from collections import Counter
from pathlib import Path

from mm_retriever.errors import StoreError
from mm_retriever.store.lite_repair import repair

mend = repair


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
    path = Path(place).expanduser().resolve()
    if path.is_file():
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


class LiteFiles:
    """The Milvus Lite files that stores of this process have open, and whose turn it is in each."""

    def __init__(self) -> None:
        self.opening = threading.RLock()  # two threads that open one file at once would lock each other out of it
        self._users: Counter[str] = Counter()
        self._turns: dict[str, Turn] = {}

    def enter(self, path: str) -> Turn:
        """Count one more store of a file; return the lock that all of them share."""
        with self.opening:
            if not self._users[path]:
                repair(Path(path))
            self._users[path] += 1
            return self._turns.setdefault(path, Turn())

    def leave(self, path: str) -> None:
        """Count one store less; a file without any is free for other processes."""
        from milvus_lite.server_manager import server_manager_instance

        with self.opening:
            self._users[path] -= 1
            if not self._users[path]:
                del self._users[path], self._turns[path]
                server_manager_instance.release_server(path)
