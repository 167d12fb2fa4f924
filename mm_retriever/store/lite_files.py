"""Milvus Lite files: where they are, which of them this process has open, and what a killed process left there.

A Milvus Lite file is a folder. Milvus Lite lets one process at a time into it, and survives a kill at nearly any point;
`mend` is for the points where it does not. Knows nothing of connections.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import uuid
from collections import Counter
from pathlib import Path

from mm_retriever.errors import StoreError

logger = logging.getLogger(__name__)


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
                mend(Path(path))
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


def mend(place: Path) -> None:
    """Put right what a process that was killed left half done, in a file that no process has open."""
    import fcntl  # is not there on Windows, where Milvus Lite is not either

    try:
        lock = os.open(place / "LOCK", os.O_RDWR)
    except FileNotFoundError:  # a new file, or a folder of something else
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for folder in (place / "collections").iterdir():
            if (folder / "schema.json").exists():
                _remove_logs_of_stored_rows(folder)
            else:
                _clear_name(folder, place)
    except OSError as error:  # another process has it; or what Milvus Lite itself will say better
        logger.debug("%s is left as it is: %s", place, error)
    finally:
        os.close(lock)


def _remove_logs_of_stored_rows(folder: Path) -> None:
    """Do what Milvus Lite does last when it has put the rows of a log into a segment.

    Killed before that, it would read both, and have each of the rows twice. The manifest names the first log whose rows
    are in no segment yet.
    """
    try:
        first = json.loads((folder / "manifest.json").read_bytes())["active_wal_number"]
    except (OSError, ValueError, KeyError, TypeError):  # no manifest yet, or one that Milvus Lite has a copy of
        return
    for log in sorted(folder.glob("wal/wal_*_*.arrow")):
        number = log.stem.rpartition("_")[2]
        if isinstance(first, int) and number.isdecimal() and int(number) < first:
            log.unlink()


def _clear_name(folder: Path, place: Path) -> None:
    """Move a collection without a schema out of the way: killed while it was made, or dropped.

    Milvus Lite says of it that there is none, and that none can be made.
    """
    if {one.name for one in folder.iterdir()} <= {"schema.json.tmp"}:
        for one in folder.iterdir():
            one.unlink()
        folder.rmdir()
        return
    aside = place / f"{folder.name}.without-schema.{uuid.uuid4().hex[:8]}"
    folder.rename(aside)
    logger.warning(
        "the collection %r has no schema, its rows cannot be read; they were moved to %s", folder.name, aside
    )
