"""Vectors on disk by content: an SQLite file that threads and processes may share. Knows nothing of models or images.

A cache must never be the reason for a wrong answer: a key names model and content, a checksum covers key and vector,
and nothing in the file is ever executed. What does not agree with its checksum, is of another length or not finite is
computed again, and counted. Nor for none: where it cannot be written or read just now (a full disk, another writer for
too long) it has forgotten, and says so once. It does not grow without end: beyond `max_bytes` the vectors that were not
used for longest are removed.
"""

from __future__ import annotations

import hashlib
import logging
import os
import sqlite3
import time
import weakref
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from cachetools import LRUCache
from numpy.typing import ArrayLike, NDArray

from mm_retriever.errors import VectorCacheError
from mm_retriever.threads import ForkLock

logger = logging.getLogger(__name__)

FILE_NAME = "vectors.sqlite3"
BUSY_SECONDS = 30.0  # wait for another process that writes
KEYS_A_QUERY = 500  # SQLite takes 999 variables at least
MAX_BYTES = 4 * 2**30
ORIGINS_KEPT = 2**16  # 20 MB

_TABLE = (
    "CREATE TABLE vectors (key BLOB NOT NULL UNIQUE, vector BLOB NOT NULL, checksum INTEGER NOT NULL, "
    "used INTEGER NOT NULL)"
)
_INDEX = "CREATE INDEX vectors_by_use ON vectors (used)"
_OLD_TABLE = "CREATE TABLE vectors (key BLOB PRIMARY KEY, vector BLOB NOT NULL) WITHOUT ROWID"  # had no checksums
_DAY = 86_400
_INHERITED: list[sqlite3.Connection] = []  # of the parent process, kept so that nothing closes them here
_UNIT_TOLERANCE = 0.02  # of half precision


def _close(connection: sqlite3.Connection, connected_in: int) -> None:
    if connected_in == os.getpid():
        connection.close()


class VectorCache:
    """``get`` and ``put`` of float32 vectors of one length, under keys of bytes.

    Args:
        folder: made if it is not there; the file in it may serve several models.
        dimension: length of the vectors.
        unit: whether every vector has the length 1; one that has not is computed again.
        max_bytes: of the file; beyond it, what was not used for longest is removed.

    Attributes:
        damaged: how many vectors were found that are not what was kept; they are computed again.
        removed: how many were removed to make room.

    Raises:
        VectorCacheError: the folder or the file cannot be used.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        dimension: int,
        *,
        unit: bool = False,
        max_bytes: int = MAX_BYTES,
    ) -> None:
        self.path = Path(folder).expanduser() / FILE_NAME
        self.dimension, self.unit, self.max_bytes = dimension, unit, max_bytes
        self.damaged = self.removed = 0
        self._lock = ForkLock()
        self._has_forgotten = False
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._connect()
            self._make_table()
        except (OSError, sqlite3.Error) as error:
            raise VectorCacheError(
                f"{self.path} cannot be used as a cache of vectors: {error}; delete it or choose another folder"
            ) from error

    def _connect(self) -> None:
        self._connected_in = os.getpid()
        self._connection = sqlite3.connect(self.path, timeout=BUSY_SECONDS, check_same_thread=False)
        weakref.finalize(self, _close, self._connection, self._connected_in)  # Python 3.13 warns of an open one
        self._connection.execute("PRAGMA trusted_schema=OFF")
        self._connection.execute("PRAGMA journal_mode=WAL")
        self._connection.execute("PRAGMA synchronous=NORMAL")

    def _own_connection(self) -> sqlite3.Connection:
        """The connection of this process: SQLite's must not be used, nor closed, in a forked child."""
        if self._connected_in != os.getpid():
            _INHERITED.append(self._connection)
            self._connect()
        return self._connection

    def _make_table(self) -> None:
        """Make the table if there is none; a view, a trigger or another table of that name is nothing of ours."""
        if self._tables() == {_TABLE, _INDEX}:
            return
        with self._connection as connection:
            connection.execute("BEGIN IMMEDIATE")  # another process may be here, too
            tables = self._tables()
            if tables == {_OLD_TABLE}:
                connection.execute("DROP TABLE vectors")
                logger.warning("%s was written before vectors had checksums; they are computed again", self.path)
                tables.clear()
            if not tables:
                connection.execute(_TABLE)
                connection.execute(_INDEX)
            elif tables != {_TABLE, _INDEX}:
                raise sqlite3.DatabaseError("its tables are not those of this version")

    def _tables(self) -> set[str]:
        rows = self._connection.execute("SELECT sql FROM sqlite_master WHERE sql IS NOT NULL").fetchall()
        return {" ".join(str(sql).split()) for (sql,) in rows}

    def get(self, keys: Iterable[bytes]) -> dict[bytes, NDArray[np.float32]]:
        """Vectors of those keys that are there, and are what was kept."""
        wanted = list(keys)
        vectors: dict[bytes, NDArray[np.float32]] = {}
        today = int(time.time()) // _DAY
        stale: list[tuple[int, bytes]] = []
        damaged = 0
        for start in range(0, len(wanted), KEYS_A_QUERY):
            part = wanted[start : start + KEYS_A_QUERY]
            marks = ",".join("?" * len(part))
            try:
                query = f"SELECT key, vector, checksum, used FROM vectors WHERE key IN ({marks})"  # noqa: S608 - question marks alone
                rows = self._run(query, part)
            except sqlite3.OperationalError as error:
                self._forget(error)
                break
            for key, blob, checksum, used in rows:
                vector = self._vector(key, blob, checksum)
                if vector is None:
                    damaged += 1
                    continue
                vectors[key] = vector
                if used != today:
                    stale.append((today, key))
        if damaged:
            self._count_damaged(damaged)
        if stale:  # once a day for each
            self._write("UPDATE vectors SET used = ? WHERE key = ?", stale)
        return vectors

    def _vector(self, key: object, blob: object, checksum: object) -> NDArray[np.float32] | None:
        if not isinstance(key, bytes) or not isinstance(blob, bytes) or len(blob) != 4 * self.dimension:
            return None
        if checksum != _checksum(key, blob):
            return None
        vector = np.frombuffer(blob, dtype="<f4").astype(np.float32)
        return vector if self._is_sound(vector) else None

    def _is_sound(self, vector: NDArray[np.float32]) -> bool:
        if not np.isfinite(vector).all():
            return False
        return not self.unit or abs(float(np.linalg.norm(vector)) - 1.0) <= _UNIT_TOLERANCE

    def put(self, vectors: Mapping[bytes, NDArray[np.float32]]) -> None:
        """Keeps the vectors; a key that is there already gets the new one."""
        today = int(time.time()) // _DAY
        rows = []
        for key, vector in vectors.items():
            blob = np.ascontiguousarray(vector, dtype="<f4").tobytes()
            rows.append((key, blob, _checksum(key, blob), today))
        self._write("INSERT OR REPLACE INTO vectors VALUES (?, ?, ?, ?)", rows)

    def _write(self, statement: str, rows: list[tuple[Any, ...]]) -> None:
        try:
            with self._lock, self._own_connection():
                self._connection.executemany(statement, rows)
                self._make_room()
        except sqlite3.OperationalError as error:
            self._forget(error)
        except sqlite3.Error as error:
            raise self._failed(error) from error

    def _make_room(self) -> None:
        """Remove what was not used for longest while the file is too large; its pages are used again."""
        size = self._size()
        if size <= self.max_bytes:
            return
        before = self._connection.total_changes
        while size > 0.9 * self.max_bytes:
            rows = max(1, int((size - 0.8 * self.max_bytes) / (4 * self.dimension + 200)))
            removed = self._connection.execute(
                "DELETE FROM vectors WHERE rowid IN (SELECT rowid FROM vectors ORDER BY used, rowid LIMIT ?)", [rows]
            ).rowcount
            if not removed:
                break
            size = self._size()
        self.removed += self._connection.total_changes - before
        logger.info("%s is full: %d vectors were removed so far", self.path, self.removed)

    def _size(self) -> int:
        pages, unused, size = (
            int(self._connection.execute(f"PRAGMA {name}").fetchone()[0])
            for name in ("page_count", "freelist_count", "page_size")
        )
        return (pages - unused) * size

    def _count_damaged(self, number: int) -> None:
        if not self.damaged:
            logger.warning("%s holds vectors that are not what was kept; they are computed again", self.path)
        self.damaged += number

    def __len__(self) -> int:
        """Vectors in the file, those of other models included."""
        try:
            return int(self._run("SELECT count(*) FROM vectors", [])[0][0])
        except sqlite3.OperationalError as error:
            raise self._failed(error) from error

    def close(self) -> None:
        """Closes the file; the cache is not usable afterwards."""
        with self._lock:
            self._own_connection().close()

    def _run(self, query: str, values: list[bytes]) -> list[tuple[Any, ...]]:
        try:
            with self._lock:
                return self._own_connection().execute(query, values).fetchall()
        except sqlite3.OperationalError:
            raise
        except sqlite3.Error as error:
            raise self._failed(error) from error

    def _forget(self, error: sqlite3.OperationalError) -> None:
        if not self._has_forgotten:
            self._has_forgotten = True
            logger.warning("%s; vectors are computed and not kept", self._failed(error))

    def _failed(self, error: sqlite3.Error) -> VectorCacheError:
        return VectorCacheError(f"the cache of vectors {self.path} failed: {error}; delete it or choose another folder")


class VectorOrigins:
    """What the vectors that were made lately are of, told by their numbers; threads may share it."""

    def __init__(self) -> None:
        self._texts = LRUCache[bytes, bytes](ORIGINS_KEPT)  # digests; b"" for an image
        self._lock = ForkLock()

    def note(self, vectors: NDArray[np.float32], texts: Sequence[str | None]) -> None:
        """Take note of vectors (B, D), each of a text alone, or, where that is None, of an image."""
        digests = [b"" if text is None else _digest(text.encode("utf-8", "replace")) for text in texts]
        with self._lock:
            self._texts.update(zip(map(_numbers_digest, vectors), digests, strict=True))

    def is_of_text(self, vector: ArrayLike, text: str) -> bool | None:
        """Whether a vector (D,) is of this text, and not of an image; None: that is not known here."""
        with self._lock:
            origin = self._texts.get(_numbers_digest(vector))
        if origin == b"":
            return False
        return True if origin == _digest(text.encode("utf-8", "replace")) else None


def _numbers_digest(vector: ArrayLike) -> bytes:
    return _digest(np.ascontiguousarray(vector, dtype="<f4").tobytes())


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=16).digest()


def _checksum(key: bytes, blob: bytes) -> int:
    return zlib.crc32(blob, zlib.crc32(key))
