"""Vectors on disk by content: an SQLite file that threads and processes may share. Knows nothing of models or pictures.

A cache must never be the reason for a wrong answer: a key names model and content, a row of another length is not
used, and nothing in the file is ever executed. Nor for none: where it cannot be written or read just now (a full disk,
another writer for too long) it has forgotten, and says so once.
"""

from __future__ import annotations

import logging
import os
import sqlite3
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mm_retriever.errors import VectorCacheError

logger = logging.getLogger(__name__)

FILE_NAME = "vectors.sqlite3"
BUSY_SECONDS = 30.0  # wait for another process that writes
KEYS_A_QUERY = 500  # SQLite takes 999 variables at least


class VectorCache:
    """``get`` and ``put`` of float32 vectors of one length, under keys of bytes.

    Args:
        folder: made if it is not there; the file in it may serve several models.
        dimension: length of the vectors.

    Raises:
        VectorCacheError: the folder or the file cannot be used.
    """

    def __init__(self, folder: str | os.PathLike[str], dimension: int) -> None:
        self.path = Path(folder).expanduser() / FILE_NAME
        self.dimension = dimension
        self._turn = threading.Lock()
        self._has_forgotten = False
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._connection = sqlite3.connect(self.path, timeout=BUSY_SECONDS, check_same_thread=False)
            self._connection.execute("PRAGMA journal_mode=WAL")
            self._connection.execute("PRAGMA synchronous=NORMAL")
            self._connection.execute(
                "CREATE TABLE IF NOT EXISTS vectors (key BLOB PRIMARY KEY, vector BLOB NOT NULL) WITHOUT ROWID"
            )
        except (OSError, sqlite3.Error) as error:
            raise VectorCacheError(f"{self.path} cannot be used as a cache of vectors: {error}") from error

    def get(self, keys: Iterable[bytes]) -> dict[bytes, NDArray[np.float32]]:
        """Vectors of those keys that are there."""
        wanted = list(keys)
        found: dict[bytes, NDArray[np.float32]] = {}
        for start in range(0, len(wanted), KEYS_A_QUERY):
            part = wanted[start : start + KEYS_A_QUERY]
            marks = ",".join("?" * len(part))
            try:
                query = f"SELECT key, vector FROM vectors WHERE key IN ({marks})"  # noqa: S608 - question marks alone
                rows = self._run(query, part)
            except sqlite3.OperationalError as error:
                self._forget(error)
                break
            for key, blob in rows:
                if isinstance(blob, bytes) and len(blob) == 4 * self.dimension:
                    found[key] = np.frombuffer(blob, dtype="<f4").astype(np.float32)
        return found

    def put(self, vectors: Mapping[bytes, NDArray[np.float32]]) -> None:
        """Keeps the vectors; a key that is there already gets the new one."""
        rows = [(key, np.ascontiguousarray(vector, dtype="<f4").tobytes()) for key, vector in vectors.items()]
        try:
            with self._turn, self._connection:
                self._connection.executemany("INSERT OR REPLACE INTO vectors VALUES (?, ?)", rows)
        except sqlite3.OperationalError as error:
            self._forget(error)
        except sqlite3.Error as error:
            raise self._failed(error) from error

    def __len__(self) -> int:
        """Vectors in the file, those of other models included."""
        try:
            return int(self._run("SELECT count(*) FROM vectors", [])[0][0])
        except sqlite3.OperationalError as error:
            raise self._failed(error) from error

    def close(self) -> None:
        """Closes the file; the cache is not usable afterwards."""
        with self._turn:
            self._connection.close()

    def _run(self, query: str, values: list[bytes]) -> list[tuple[bytes, bytes]]:
        try:
            with self._turn:
                return self._connection.execute(query, values).fetchall()
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
