"""kill -9 at any moment of a run, many times: after each, only whole and true rows; after the next run, all of them.

A run opens the cache of vectors and the store, adds, replaces, rewrites (columns of a sidecar), prunes, stores texts
and writes its report. It dies at a random time, before the n-th file that it makes, renames or removes, or in the
middle of a write (see `mortal.py`).
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import shutil
import sqlite3
import subprocess
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llama_index.core.vector_stores.types import VectorStoreQuery
from PIL import Image

from mm_retriever.embedders.embedder import Content
from mm_retriever.embedding import VisualizedBGEEmbedding
from mm_retriever.ingest.sources import path_id
from mm_retriever.store import open_store
from mm_retriever.store.rows import row_to_node
from mm_retriever.vector_cache import FILE_NAME, VectorCache
from tests.support.effort import EFFORT
from tests.support.processes import python

COUNTS = ("indexed", "replaced", "updated", "unchanged", "removed")
NOT_FACTS = ("file_stamp", "id", "doc_id", "text", "_node_content", "_node_type", "embedding", "mm_columns")
MOST_BYTES = 200_000
"""More than any file of these runs has."""


@contextmanager
def warm(flush_bytes: int = 128 * 2**20, what: str = "run") -> Iterator[Any]:
    """Runs in forks of one process; Milvus Lite writes a segment after so many bytes, by itself after 128 MB."""
    process = python("-m", "tests.support.mortal", flush_bytes, what, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL)

    def run(place: Path, by: str = "never", at: float = 0) -> dict[str, Any]:
        process.stdin.write(json.dumps([str(place), by, at]) + "\n")
        process.stdin.flush()
        return json.loads(process.stdout.readline())

    try:
        yield run
    finally:
        process.stdin.close()
        process.wait(30)
        process.stdout.close()


@pytest.fixture(scope="module")
def model() -> VisualizedBGEEmbedding:
    return VisualizedBGEEmbedding("tiny", device="cpu")


@dataclass(frozen=True, eq=False)
class Row:
    facts: dict[str, Any]
    text: str
    vector: np.ndarray

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Row)
            and (self.facts, self.text) == (other.facts, other.text)
            and np.allclose(self.vector, other.vector, atol=1e-5)
        )


class Scene:
    """A folder that changes between runs, and what is to be stored of it."""

    def __init__(self, place: Path, model: VisualizedBGEEmbedding, chance: random.Random, images: int) -> None:
        self.place, self._model, self._chance = place, model, chance
        self._vectors: dict[str, np.ndarray] = {}  # by digest, of all that there ever was
        self._cached: dict[bytes, np.ndarray] = {}  # by key of the cache
        self._columns: dict[str, dict[str, int]] = {}
        self._notes: dict[str, str] = {}
        self._made = 0
        self.rows: dict[str, Row] = {}  # as they were after the last run
        self.change(add=images, replace=0, remove=0, columns=images // 2, notes=5)

    @property
    def _files(self) -> list[Path]:
        return sorted(self.place.glob("photos/*/*.png"))

    def change(self, add: int, replace: int, remove: int, columns: int, notes: int) -> None:
        for path in self._chance.sample(self._files, min(remove, max(0, len(self._files) - 5))):
            path.unlink()
        for path in self._chance.sample(self._files, min(replace, len(self._files))):
            self._draw(path)
        for _ in range(add):
            self._draw(self.place / "photos" / f"box-{self._made % 3}" / f"{self._made:04d}.png")
        for path in self._chance.sample(self._files, min(columns, len(self._files))):
            self._columns[path.name] = {"price": self._chance.randrange(1, 10**6)}
        for _ in range(notes):
            name = f"note-{self._chance.randrange(40)}"
            self._notes[name] = f"{self._chance.choice(('red', 'blue', 'green'))} mug {self._chance.randrange(10**6)}"
            self._vectors[digest(self._notes[name].encode())] = np.array(
                self._model.get_text_embedding(self._notes[name])
            )
        (self.place / "sidecar.json").write_text(json.dumps(self._columns))
        (self.place / "notes.json").write_text(json.dumps(self._notes))

    def _draw(self, path: Path) -> None:
        self._made += 1
        noise = np.random.default_rng(self._made).integers(0, 256, (20, 8 + self._made % 50, 3), dtype=np.uint8)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise).save(path)
        square = self._model.prepare_image(Image.fromarray(noise))
        vector = self._model.embed_images([square])[0]
        self._vectors[digest(path.read_bytes())] = vector
        self._cached[Content(image=square).key(f"{self._model.encoder.model.fingerprint}/float32")] = vector

    def truth(self) -> dict[str, Row]:
        """What is to be stored of the folder as it is now."""
        rows = {}
        for path in self._files:
            status, found = path.stat(), digest(path.read_bytes())
            with Image.open(path) as image:
                width, height = image.size
            facts = {
                "file_path": str(path),
                "file_name": path.name,
                "label": path.parent.name,
                "width": width,
                "height": height,
                "bytes": status.st_size,
                "mtime_ns": status.st_mtime_ns,
                "digest": found,
                **self._columns.get(path.name, {}),
            }
            rows[path_id(str(path))] = Row(facts, "", self._vectors[found])
        for name, text in self._notes.items():
            found = digest(text.encode())
            rows[name] = Row({"digest": found}, text, self._vectors[found])
        return rows

    def check(self) -> None:
        """After a run, ended or killed: nothing lost, nothing twice, nothing half, nothing that never was.

        A row is the one that was there before the run, or the one that the run had to write; a row that was there
        is gone only if its file is.
        """
        truth = self.truth()
        left = self.place / "left"  # a copy: the next run finds all as the dead one left it
        shutil.copytree(self.place / "a.db", left / "a.db") if (self.place / "a.db").exists() else left.mkdir()
        try:
            rows = self._stored(left / "a.db")
        finally:
            shutil.rmtree(left)
        for id_, row in rows.items():
            assert row in (self.rows.get(id_), truth.get(id_)), f"{row} was never to be stored"
        assert self.rows.keys() & truth.keys() <= rows.keys(), "what was stored is lost"
        self.rows = rows
        report = self.place / "report.json"
        assert not report.exists() or json.loads(report.read_text()).keys() >= {*COUNTS, "skipped", "seconds"}
        if (self.place / "cache" / FILE_NAME).exists():
            self._check_cache()

    def _stored(self, db: Path) -> dict[str, Row]:
        rows: dict[str, Row] = {}
        with open_store(db, self._model) as store:
            for row in [row for page in store.scan(["*"]) for row in page]:
                assert row["id"] not in rows, f"{row['id']} is there twice"
                metadata = row_to_node(row).metadata
                assert metadata == {key: row[key] for key in row if key not in NOT_FACTS or key in metadata}
                facts = {key: row[key] for key in row if key not in NOT_FACTS}
                rows[row["id"]] = Row(facts, row["text"], np.array(row["embedding"]))
            query = VectorStoreQuery(query_embedding=self._vectors[next(iter(self._vectors))].tolist())
            query.similarity_top_k = len(rows) + 10
            assert sorted(store.query(query).ids) == sorted(rows), "a search finds every row once"
            assert store.count() == len(rows)
        return rows

    def _check_cache(self) -> None:
        with closing(sqlite3.connect(self.place / "cache" / FILE_NAME)) as database:
            assert database.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        cache = VectorCache(self.place / "cache", self._model.dimension)
        for key, vector in cache.get(self._cached).items():
            assert np.allclose(vector, self._cached[key], atol=1e-5)
        cache.close()

    def check_finished(self, before: dict[str, Row]) -> None:
        """After a run that ended: all is stored as it is to be, and the report has the right figures."""
        self.check()
        truth = self.truth()
        assert self.rows == truth
        report = json.loads((self.place / "report.json").read_text())
        files = {id_: row for id_, row in truth.items() if "file_path" in row.facts}
        expected: Counter[str] = Counter(account(row, before.get(id_)) for id_, row in files.items())
        expected["removed"] = sum("file_path" in before[id_].facts for id_ in before.keys() - truth.keys())
        assert {name: report[name] for name in COUNTS} == {name: expected[name] for name in COUNTS}
        assert report["skipped"] == []
        assert report["embedded"] == expected["indexed"] + expected["replaced"]


def account(row: Row, before: Row | None) -> str:
    """What a run that finds one row and wants another has done."""
    if before is None:
        return "indexed"
    if before.facts["digest"] != row.facts["digest"]:
        return "replaced"
    return "unchanged" if before.facts == row.facts else "updated"


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def kills(run: Any, scene: Scene, chance: random.Random, wanted: int) -> Counter[str]:
    """Kill so many runs, as many by each way, each after changes to the folder; how many died in which step."""
    seconds = run(scene.place)["seconds"]
    scene.check()
    died: Counter[str] = Counter()
    ways = [way for way in ("time", "operation", "byte") for _ in range(wanted // 3)]
    while ways:
        scene.change(*(chance.randrange(most) for most in (9, 9, 9, 9, 4)))
        way = ways[-1]
        at = {
            "time": chance.uniform(0, seconds),
            "operation": chance.randrange(1, 30),
            "byte": int(math.exp(chance.uniform(0, math.log(MOST_BYTES)))),
        }[way]
        ended = run(scene.place, way, at)
        assert ended["killed"] or ended["step"] == "end", ended
        if ended["killed"]:
            ways.pop()
            died[ended["step"]] += 1
        scene.check()
    return died


@pytest.mark.slow
@pytest.mark.parametrize("flush_bytes", [128 * 2**20, 60_000])
def test_runs_killed_at_random_leave_whole_rows_and_the_next_one_ends_the_work(tmp_path, model, flush_bytes, tried):
    """With small segments Milvus Lite writes and merges them in the middle of a run."""
    chance = random.Random(5)
    scene = Scene(tmp_path, model, chance, 60)
    with warm(flush_bytes) as run:
        died = kills(run, scene, chance, 30 * EFFORT)
        tried["runs of ingestion killed"] += sum(died.values())
        before = scene.rows
        assert run(tmp_path)["step"] == "end"
    scene.check_finished(before)
    assert died.keys() >= {"open", "images"}, died


@pytest.mark.slow
def test_a_kill_before_every_file_that_a_first_run_makes_renames_or_removes(tmp_path, model, tried):
    """The folder of the cache, the collection, its schema, index, log and segments, the report: one after the other."""
    with warm() as run:
        Scene(tmp_path / "whole", model, random.Random(7), 12)
        operations = run(tmp_path / "whole")["operations"]
        assert operations > 25
        for number in range(1, operations + 1):
            scene = Scene(tmp_path / str(number), model, random.Random(7), 12)
            assert run(scene.place, "operation", number)["killed"]
            tried["runs of ingestion killed"] += 1
            scene.check()
            before = scene.rows
            assert run(scene.place)["step"] == "end"
            scene.check_finished(before)
            shutil.rmtree(scene.place)
