"""The cache of vectors: what rots or is planted in it is computed again and counted, and it does not grow for ever."""

from __future__ import annotations

import logging
import multiprocessing
import os
import random
import sqlite3
import time
from contextlib import closing
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from mm_retriever.errors import VectorCacheError
from mm_retriever.vector_cache import FILE_NAME, VectorCache
from tests.support.effort import EFFORT

SIZE = 16


def unit(number: int) -> np.ndarray:
    vector = np.random.default_rng(number).standard_normal(SIZE).astype(np.float32)
    return vector / np.linalg.norm(vector)


def key(number: int) -> bytes:
    return number.to_bytes(32, "big")


@pytest.fixture
def folder(tmp_path) -> Path:
    with closing(VectorCache(tmp_path, SIZE, unit=True)) as cache:
        cache.put({key(number): unit(number) for number in range(20)})
    return tmp_path


def execute(folder: Path, *statements: object) -> None:
    with closing(sqlite3.connect(folder / FILE_NAME)) as database, database:
        database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        for statement in statements:
            database.execute(*([statement] if isinstance(statement, str) else statement))


POISONS: dict[str, object] = {
    "zeros": np.zeros(SIZE, "<f4").tobytes(),
    "NaN": np.full(SIZE, np.nan, "<f4").tobytes(),
    "huge": np.full(SIZE, 1e30, "<f4").tobytes(),
    "the vector of another": unit(3).astype("<f4").tobytes(),
    "short": b"abc",
    "text": "a" * 4 * SIZE,
    "float64": unit(3).astype("<f8").tobytes(),
    "big endian": unit(3).astype(">f4").tobytes(),
}


@pytest.mark.parametrize("poison", POISONS.values(), ids=POISONS)
def test_what_is_not_what_was_kept_is_not_given_and_counted(poison, folder, caplog):
    execute(folder, ("UPDATE vectors SET vector = ?", (poison,)))
    with closing(VectorCache(folder, SIZE, unit=True)) as cache, caplog.at_level(logging.WARNING):
        others = [number for number in range(20) if number != 3]
        assert cache.get(map(key, others)) == {}
        assert cache.damaged == 19
        assert len(caplog.records) == 1
        cache.put({key(0): unit(0)})
        assert (cache.get([key(0)])[key(0)] == unit(0)).all()
        assert cache.damaged == 19


def test_what_has_a_checksum_and_cannot_be_a_vector_of_the_model_is_not_given(folder):
    """A bug, or a forgery: finite, and of length 1."""
    with closing(VectorCache(folder, SIZE, unit=True)) as cache:
        cache.put({key(0): unit(0) * 3, key(1): np.full(SIZE, np.nan, np.float32), key(2): np.zeros(SIZE, np.float32)})
        assert cache.get([key(0), key(1), key(2)]) == {}


def test_a_flipped_bit_gives_no_wrong_vector(folder, tmp_path, tried):
    execute(folder, "SELECT 1")
    content = (folder / FILE_NAME).read_bytes()
    chance = random.Random(5)
    for _ in range(60 * EFFORT):
        flipped = bytearray(content)
        flipped[chance.randrange(len(flipped))] ^= 1 << chance.randrange(8)
        (folder / FILE_NAME).write_bytes(flipped)
        tried["bits flipped in the cache of vectors"] += 1
        try:
            with closing(VectorCache(folder, SIZE, unit=True)) as cache:
                found = cache.get(map(key, range(20)))
        except VectorCacheError as error:
            assert str(folder) in str(error)
            continue
        finally:
            for left in ("-wal", "-shm"):
                (folder / f"{FILE_NAME}{left}").unlink(missing_ok=True)
        assert all((vector == unit(int.from_bytes(one, "big"))).all() for one, vector in found.items())


@pytest.mark.parametrize(
    "statements",
    [
        ["DROP TABLE vectors", "CREATE TABLE vectors(key, vector)"],
        ["DROP TABLE vectors", "CREATE VIEW vectors AS SELECT randomblob(32) AS key, randomblob(64) AS vector"],
        ["CREATE TRIGGER planted AFTER INSERT ON vectors BEGIN DELETE FROM vectors; END"],
        ["CREATE TABLE another(key)"],
    ],
    ids=["another table", "a view", "a trigger", "one table more"],
)
def test_a_file_with_other_tables_is_refused_by_name(statements, folder):
    execute(folder, *statements)
    with pytest.raises(VectorCacheError, match=r"vectors\.sqlite3.* delete it"):
        VectorCache(folder, SIZE)


def test_a_file_that_is_no_database_is_refused_with_what_to_do(tmp_path):
    (tmp_path / FILE_NAME).write_bytes(b"not a database" * 100)
    with pytest.raises(VectorCacheError, match=r"file is not a database; delete it or choose another folder"):
        VectorCache(tmp_path, SIZE)


def test_a_cache_of_an_older_version_is_begun_anew(tmp_path, caplog):
    """Its vectors have no checksums."""
    old = "CREATE TABLE IF NOT EXISTS vectors (key BLOB PRIMARY KEY, vector BLOB NOT NULL) WITHOUT ROWID"
    execute(tmp_path, old, ("INSERT INTO vectors VALUES (?, ?)", (key(1), unit(1).astype("<f4").tobytes())))
    with closing(VectorCache(tmp_path, SIZE)) as cache:
        assert len(cache) == 0
        cache.put({key(1): unit(1)})
    assert "computed again" in caplog.text
    with closing(VectorCache(tmp_path, SIZE)) as cache:
        assert len(cache) == 1


def test_what_was_not_used_for_longest_makes_room(tmp_path, monkeypatch):
    now = time.time()
    limit = 200_000
    with closing(VectorCache(tmp_path, SIZE, max_bytes=limit)) as cache:
        for day in range(12):
            monkeypatch.setattr(time, "time", partial(float, now + day * 86_400))
            cache.put({key(day * 200 + number): unit(number) for number in range(200)})
            assert key(0) in cache.get([key(0)])  # used every day
        assert 0 < len(cache) < 12 * 200
        assert cache.removed == 12 * 200 - len(cache)
        assert cache.get([key(number) for number in range(1, 200)]) == {}
        assert len(cache.get([key(11 * 200 + number) for number in range(200)])) == 200
        size = sum(path.stat().st_size for path in tmp_path.glob(FILE_NAME))
    assert size < 1.5 * limit


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_cache_of_vectors_is_used_by_parent_and_forked_child_at_once(tmp_path):
    """SQLite's connections do not survive a fork: shared ones corrupt the file."""
    cache = VectorCache(tmp_path, 2)
    cache.put({b"parent": np.array([1, 0], dtype=np.float32)})

    def work() -> None:
        for number in range(50):
            cache.put({b"child %d" % number: np.array([0, 1], dtype=np.float32)})
        assert len(cache.get([b"parent", b"child 7"])) == 2

    child = multiprocessing.get_context("fork").Process(target=work)
    child.start()
    for number in range(50):
        cache.put({b"parent %d" % number: np.array([0, 1], dtype=np.float32)})
    child.join(60)
    assert child.exitcode == 0
    assert len(cache) == 101
    assert len(cache.get([b"child %d" % number for number in range(50)])) == 50
