"""Power cuts: every row that was reported as stored is there afterwards, and the store opens.

Twice: by what was synced at the moment of the cut (everywhere), and by copies of a mounted file system (as root).
"""

from __future__ import annotations

import filecmp
import json
import os
import random
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
from llama_index.core.schema import TextNode

from mm_retriever.store import open_store
from tests.support.effort import EFFORT
from tests.support.processes import ends, python

MODEL = SimpleNamespace(dimension=3, model_id="three numbers")
SMALL_MEMORY = 6_000
"""Bytes after which Milvus Lite writes a data file: after every few batches, so that it merges them, too."""


def nodes(first: int, count: int, text: str = "") -> list[TextNode]:
    return [
        TextNode(id_=f"{one:05d}", text=text or f"row {one}", embedding=[1, 0, 0])
        for one in range(first, first + count)
    ]


def rows(db: Path) -> dict[str, str]:
    """Text by id; nothing is there twice, and nothing is damaged."""
    with open_store(db, MODEL) as store:
        found = [(row["id"], row["text"]) for page in store.scan(["text"]) for row in page]
        verification = store.verify()
    assert len(dict(found)) == len(found) == verification.rows
    assert not verification.damaged
    return dict(found)


class Disk:
    """What would be left of a folder if the power went: names, and of each file the bytes that were synced."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._synced: dict[tuple[int, int], int] = {}
        self._kept: list[int] = []  # descriptors: so that no inode is used again
        self._moments: list[object] = []
        self._fsync = os.fsync
        monkeypatch.setattr(os, "fsync", self._sync)

    def _sync(self, file: object) -> None:
        descriptor = file if isinstance(file, int) else file.fileno()
        self._fsync(descriptor)
        stat = os.fstat(descriptor)
        if (stat.st_dev, stat.st_ino) not in self._synced:
            self._kept.append(os.dup(descriptor))
        self._synced[stat.st_dev, stat.st_ino] = stat.st_size
        for moment in self._moments:
            moment()

    def at_each_sync(self, moment: object) -> None:
        self._moments.append(moment)

    def cut(self, source: Path, target: Path) -> None:
        for folder, _, names in os.walk(source):
            place = target / Path(folder).relative_to(source)
            place.mkdir(parents=True)
            for name in names:
                with suppress(FileNotFoundError), Path(folder, name).open("rb") as file:
                    stat = os.fstat(file.fileno())
                    (place / name).write_bytes(file.read(self._synced.get((stat.st_dev, stat.st_ino), 0)))

    def close(self) -> None:
        for descriptor in self._kept:
            os.close(descriptor)


@pytest.fixture
def disk(monkeypatch) -> Iterator[Disk]:
    disk = Disk(monkeypatch)
    yield disk
    disk.close()


@pytest.fixture
def small_memory(monkeypatch):
    from milvus_lite.engine import collection

    monkeypatch.setattr(collection, "MEMTABLE_MEMORY_LIMIT", SMALL_MEMORY)


@pytest.mark.slow
def test_what_was_stored_survives_a_cut_at_any_sync(tmp_path, disk, small_memory, tried):
    """From the log into data files, which are merged: at no moment are rows in files alone that were not synced."""
    db = tmp_path / "a.db"
    stored: dict[str, str] = {}
    cuts: list[tuple[Path, dict[str, str]]] = []
    chance = random.Random(7)

    one_at_a_time = threading.Lock()  # files are also synced in threads of Milvus Lite

    def maybe_cut(probability: float) -> None:
        with one_at_a_time:
            if len(cuts) < 14 * EFFORT and chance.random() < probability:
                place = tmp_path / f"cut-{len(cuts)}.db"
                before = dict(stored)
                disk.cut(db, place)
                cuts.append((place, before))

    with open_store(db, MODEL) as store:
        disk.at_each_sync(lambda: maybe_cut(0.03))
        for batch in range(24):
            store.add(nodes(batch * 8, 8))
            stored |= {node.node_id: node.text for node in nodes(batch * 8, 8)}
            maybe_cut(0.15)
        store.delete_nodes(["00000"])
        del stored["00000"]
        last = len(cuts)
        cuts.append((tmp_path / "removed.db", dict(stored)))
        disk.cut(db, tmp_path / "removed.db")
    cuts.append((tmp_path / "closed.db", dict(stored)))
    disk.cut(db, tmp_path / "closed.db")
    assert list(db.rglob("*.parquet"))
    tried["power cuts by what was synced"] += len(cuts)
    for place, expected in cuts:
        found = rows(place)
        assert expected.items() <= found.items(), place
        assert rows(place) == found
    assert "00000" not in rows(cuts[last][0])
    assert rows(cuts[-1][0]) == stored


def test_the_hooks_are_where_milvus_lite_is_built_for_them(tmp_path):
    """They replace private functions: a milvus_lite that is built differently must be noticed."""
    from milvus_lite.engine import compaction, flush
    from milvus_lite.storage.manifest import Manifest
    from milvus_lite.storage.segment import Segment

    with open_store(tmp_path / "a.db", MODEL):
        for owner, name in (
            (flush, "write_data_file"),
            (flush, "write_delta_file"),
            (compaction, "write_data_file"),
            (Manifest, "save"),
            (Segment, "build_or_load_index"),
        ):
            assert getattr(owner, name).of_mm_retriever


# ------------------------------------------------------------------------------------------ a file system, copied

WRITER = """
import json, os, random, sys
os.environ["MILVUS_LITE_MEMTABLE_MEMORY_LIMIT_BYTES"] = "40000"
from pathlib import Path
from llama_index.core.schema import TextNode
from mm_retriever.ingest import ingest_images
from mm_retriever.store import open_store
from tests.support.colour_embedding import ColourEmbedding
db, model, made = Path(sys.argv[1]), ColourEmbedding(), 0
print("{}", flush=True)
while True:
    with open_store(db, model) as store:
        for _ in range(random.randrange(1, 6)):
            new = [TextNode(id_=f"{one:06d}", text=f"red {one}") for one in range(made, made + random.choice((3, 30)))]
            report = ingest_images(new, store, model, batch_size=8, show_progress=False)
            assert report.indexed == len(new)
            made += len(new)
            print(json.dumps({one.node_id: one.text for one in new}), flush=True)
            if random.random() < 0.3:
                gone = new[0].node_id
                print(json.dumps({gone: "may be gone"}), flush=True)
                store.delete_nodes([gone])
                print(json.dumps({gone: None}), flush=True)
"""


def _mount(image: Path, place: Path) -> None:
    place.mkdir(exist_ok=True)
    # The kernel itself writes nothing for minutes: only what was synced is in a copy
    subprocess.run(["mount", "-o", "loop,commit=900", image, place], check=True, capture_output=True)


def _unmount(place: Path) -> None:
    subprocess.run(["umount", place], check=False, capture_output=True)


@pytest.fixture
def file_system(tmp_path) -> Iterator[tuple[Path, Path]]:
    """The image of a mounted ext4, and where it is mounted."""
    if not hasattr(os, "geteuid") or os.geteuid() or not shutil.which("mkfs.ext4"):
        pytest.skip("mounting an image takes root and mkfs.ext4; the other test simulates it")
    image, place = tmp_path / "disk.img", tmp_path / "disk"
    with image.open("wb") as file:
        file.truncate(48 * 2**20)
    subprocess.run(["mkfs.ext4", "-q", "-F", image], check=True, capture_output=True)
    try:
        _mount(image, place)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no loop mounts here: {error.stderr.decode(errors='replace').strip()}")
    yield image, place
    _unmount(place)


@pytest.mark.slow
def test_what_ingestion_reported_survives_fifty_cuts(tmp_path, file_system, tried):
    from tests.support.colour_embedding import ColourEmbedding

    image, place = file_system
    seed = random.randrange(10**6)
    print("seed", seed)
    chance = random.Random(seed)
    writer = python("-c", WRITER, place / "a.db")
    reported: dict[str, str | None] = {}
    cuts = 50 * EFFORT
    try:
        reported |= json.loads(writer.stdout.readline())
        os.set_blocking(writer.stdout.fileno(), False)
        pending = ""
        for cut in range(cuts):
            os.kill(writer.pid, signal.SIGCONT)
            time.sleep(chance.uniform(0.0, 0.6))
            os.kill(writer.pid, signal.SIGSTOP)
            assert writer.poll() is None
            copy = tmp_path / "cut.img"
            shutil.copyfile(image, copy)
            while not filecmp.cmp(image, copy, shallow=False):  # the kernel writes on: a copy of two moments is no cut
                shutil.copyfile(image, copy)
            pending += os.read(writer.stdout.fileno(), 2**24).decode() if _readable(writer) else ""
            *lines, pending = pending.split("\n")
            for line in lines:
                reported |= json.loads(line)
            _mount(copy, tmp_path / "cut")
            try:
                with open_store(tmp_path / "cut" / "a.db", ColourEmbedding()) as store:
                    found = [(row["id"], row["text"]) for page in store.scan(["text"]) for row in page]
                    assert not store.verify().damaged
            finally:
                _unmount(tmp_path / "cut")
            texts = dict(found)
            assert len(texts) == len(found), cut
            certain = {id_: text for id_, text in reported.items() if text != "may be gone"}
            missing = [id_ for id_, text in certain.items() if texts.get(id_) != text]
            assert not missing, f"cut {cut}: {len(missing)} of {len(reported)} rows, {missing[:5]}"
            tried["power cuts in the middle of ingestion, on a copied ext4"] += 1
    finally:
        ends(writer)
    assert len(reported) > 20


def _readable(process: subprocess.Popen[str]) -> bool:
    import select

    return bool(select.select([process.stdout], [], [], 0)[0])
