"""Bit rot, spoiled manifests and planted links in a Milvus Lite file: the right answer, or an error that names it.

Milvus Lite by itself answers wrongly after every fourth flipped bit, and empties a store whose manifest is spoiled.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import random
import re
import shutil
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from llama_index.core.schema import TextNode
from llama_index.core.vector_stores.types import VectorStoreQuery

from mm_retriever.errors import StoreDamagedError, StoreError
from mm_retriever.store import open_store
from mm_retriever.store.lite_durability import RECORDS
from mm_retriever.store.lite_repair import repair
from tests.support.effort import EFFORT

MODEL = SimpleNamespace(dimension=4, model_id="four numbers")
ROWS = 30


def nodes(first: int, count: int) -> list[TextNode]:
    chance = random.Random(first)
    return [
        TextNode(
            id_=f"{one:03d}",
            text=f"row {one}",
            embedding=[chance.uniform(-1, 1) for _ in range(4)],
            metadata={"width": one * 7, "label": f"label {one % 3}", "price": one / 3},
        )
        for one in range(first, first + count)
    ]


def folder_of(db: Path) -> Path:
    return db / "collections" / "mm_retriever"


@pytest.fixture(scope="module")
def stores(tmp_path_factory) -> dict[str, Path]:
    """One that was closed, one that was killed before, and one with both data file and log."""
    place = tmp_path_factory.mktemp("stores")
    with open_store(place / "a.db", MODEL) as store:
        store.add(nodes(0, ROWS))
        shutil.copytree(place / "a.db", place / "log.db")
    shutil.copytree(place / "a.db", place / "closed.db")
    with open_store(place / "a.db", MODEL) as store:
        store.add(nodes(ROWS, 5))
        store.delete_nodes(["003"])
        shutil.copytree(place / "a.db", place / "both.db")
    return {name: place / f"{name}.db" for name in ("log", "closed", "both")}


@pytest.fixture
def db(stores, tmp_path) -> Path:
    return Path(shutil.copytree(stores["closed"], tmp_path / "a.db"))


def answers(db: Path) -> Any:
    """All that a user can see of a store."""
    with open_store(db, MODEL) as store:
        columns = ["text", "width", "label", "price", "embedding"]
        rows = {row["id"]: repr(row) for page in store.scan(columns) for row in page}
        found = [
            store.query(VectorStoreQuery(query_embedding=vector, similarity_top_k=9))
            for vector in ([1.0, 0, 0, 0], [0, 0, -1.0, 0.5])
        ]
        hits = [[(one.node_id, repr(one.metadata), one.get_content()) for one in result.nodes] for result in found]
        return rows, store.count(), hits, [[round(one, 6) for one in result.similarities] for result in found]


def flip_bits(stores: dict[str, Path], kind: str, place: Path, choose: Callable[[list[Path]], list[Path]]) -> int:
    """Flip one bit in each of the chosen files, each in a copy of its own; return how many were flipped."""
    expected = answers(Path(shutil.copytree(stores[kind], place / "good.db")))
    chance = random.Random(kind)
    files = choose(sorted(path for path in stores[kind].rglob("*") if path.is_file() and path.stat().st_size))
    for number, file in enumerate(files):
        db = Path(shutil.copytree(stores[kind], place / f"{number}.db"))
        flipped = db / file.relative_to(stores[kind])
        content = bytearray(flipped.read_bytes())
        at = chance.randrange(len(content))
        content[at] ^= 1 << chance.randrange(8)
        flipped.write_bytes(content)
        try:
            assert answers(db) == expected, (file, at)
        except StoreError as error:
            assert len(str(error)) < 900
        shutil.rmtree(db)
    return len(files)


@pytest.mark.parametrize("kind", ["log", "closed", "both"])
def test_a_flipped_bit_is_put_right_or_an_error_and_never_a_wrong_answer(kind, stores, tmp_path):
    flip_bits(stores, kind, tmp_path, lambda files: random.Random(kind).sample(files, 5))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["log", "closed", "both"])
def test_many_flipped_bits_in_every_file(kind, stores, tmp_path, tried):
    count = flip_bits(stores, kind, tmp_path, lambda files: files * 8 * EFFORT)
    tried["bits flipped in files of Milvus Lite"] += count


def test_a_flipped_bit_in_a_data_file_names_the_file_and_changes_nothing(db):
    (file,) = folder_of(db).rglob("*.parquet")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    before = {path: path.read_bytes() for path in db.rglob("*") if path.is_file()}
    with pytest.raises(StoreDamagedError, match=rf"{file.name} is damaged.* index again"):
        open_store(db, MODEL)
    assert {path: path.read_bytes() for path in db.rglob("*") if path.is_file()} == before
    file.unlink()  # as it says
    with open_store(db, MODEL) as store:
        assert store.count() == 0
        store.add(nodes(0, ROWS))
        assert store.count() == ROWS


@pytest.mark.skipif(sys.platform != "linux", reason="bytes read are counted by Linux")
def test_opening_reads_files_in_parts_unless_they_were_touched_and_still_finds_what_rots(tmp_path):
    """Truth: the system's count of bytes that are read before Milvus Lite opens the file.

    Rot changes no time of a file, which no test can do: here the record is given the times after the change.
    """
    db, chance = tmp_path / "a.db", np.random.default_rng(7)
    many = nodes(0, 400)
    for one in many:
        one.embedding = chance.uniform(-1, 1, 4096).tolist()
    with open_store(db, SimpleNamespace(dimension=4096, model_id="many numbers")) as store:
        store.add(many)
    size = sum(file.stat().st_size for file in folder_of(db).rglob("*.parquet"))
    assert size > 5 * 2**20
    assert _read_by_repair(db) < 0.6 * size
    copied = Path(shutil.copytree(db, tmp_path / "copied.db"))
    assert _read_by_repair(copied) > size
    assert _read_by_repair(copied) < 0.6 * size
    file = max(folder_of(db).rglob("*.parquet"), key=lambda file: file.stat().st_size)
    content = bytearray(file.read_bytes())
    for at in range(1000, len(content), 2**20):
        content[at] ^= 1
    file.write_bytes(content)
    status = file.stat()
    stamp = f"stamp {status.st_ino} {status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}"
    (record,) = (folder_of(db) / RECORDS).glob(f"*{file.name}.crc")
    lines = record.read_text().splitlines()
    record.write_text("\n".join([f"{stamp} {zlib.crc32(stamp.encode()):08x}", *lines[1:], ""]))
    with pytest.raises(StoreDamagedError, match=rf"{file.name} is damaged: the bytes \d+ to \d+"):
        repair(db)


def _read_by_repair(db: Path) -> int:
    def read() -> int:
        return int(re.search(r"rchar: (\d+)", Path("/proc/self/io").read_text())[1])

    before = read()
    repair(db)
    return read() - before


def test_an_index_file_that_is_damaged_is_built_anew(db, stores, tmp_path):
    expected = answers(Path(shutil.copytree(stores["closed"], tmp_path / "good.db")))
    (file,) = folder_of(db).rglob("*.idx")
    for content in (b"", file.read_bytes()[:-9] + bytes(9)):
        file.write_bytes(content)
        assert answers(db) == expected


SPOILS: dict[str, Callable[[bytes], bytes]] = {
    "one byte flipped": lambda content: content[:10] + bytes([content[10] ^ 1]) + content[11:],
    "another file named": lambda content: content.replace(b"data_000001", b"data_000003"),
    "emptied": lambda content: b"",
    "cut in half": lambda content: content[: len(content) // 2],
    "zeroes": lambda content: bytes(len(content)),
    "no object": lambda content: b"[]",
    "no files": lambda content: content.replace(b'"data/data_000001_000030.parquet"', b""),
}


@pytest.mark.parametrize("spoil", SPOILS.values(), ids=SPOILS)
def test_a_spoiled_manifest_is_put_back_and_without_a_copy_an_error(spoil, db, caplog, tried):
    folder = folder_of(db)
    manifest = folder / "manifest.json"
    good = manifest.read_bytes()
    manifest.write_bytes(spoil(good))
    tried["manifests spoiled"] += 1
    with caplog.at_level(logging.WARNING), open_store(db, MODEL) as store:
        assert store.count() == ROWS
    assert "manifest.json was damaged" in caplog.text
    assert manifest.read_bytes() == good
    shutil.rmtree(folder / RECORDS)
    manifest.write_bytes(spoil(good))
    if spoil(good) == good.replace(b'"data/data_000001_000030.parquet"', b""):
        return  # what a manifest does not name, nothing else knows without a copy
    before = {path: path.read_bytes() for path in folder.rglob("*.parquet")}
    with pytest.raises(StoreError, match=r"(manifest\.json|parquet) is damaged.*[Nn]othing was changed"):
        open_store(db, MODEL)
    assert {path: path.read_bytes() for path in folder.rglob("*.parquet")} == before
    manifest.write_bytes(good)
    with open_store(db, MODEL) as store:
        assert store.count() == ROWS


def test_no_manifest_and_data_files_is_an_error(db):
    folder = folder_of(db)
    shutil.rmtree(folder / RECORDS)
    for path in folder.glob("manifest.json*"):
        path.unlink()
    with pytest.raises(StoreDamagedError, match=r"manifest\.json"):
        open_store(db, MODEL)
    assert list(folder.rglob("*.parquet"))


def test_no_number_in_the_manifest_decides_what_happens_to_a_log(stores, tmp_path, caplog):
    """Neither a too high nor a too low number of the log to come loses a row or doubles one."""
    for kind, number in (("both", 99), ("both", 0), ("log", 99)):
        db = Path(shutil.copytree(stores[kind], tmp_path / f"{kind}{number}.db"))
        expected = answers(Path(shutil.copytree(stores[kind], tmp_path / f"good-{kind}{number}.db")))
        manifest = folder_of(db) / "manifest.json"
        if not manifest.exists():
            continue
        shutil.rmtree(folder_of(db) / RECORDS)
        content = json.loads(manifest.read_bytes())
        manifest.write_text(json.dumps({**content, "active_wal_number": number}))
        assert answers(db) == expected


def test_a_sequence_number_in_the_manifest_that_is_too_low_does_not_let_old_rows_win(db):
    """Without a copy to compare it with: the next row would have a number below that of the row that it replaces."""
    shutil.rmtree(folder_of(db) / RECORDS)
    manifest = folder_of(db) / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_bytes()), "current_seq": 2}))
    newer = nodes(7, 1)
    newer[0].set_content("newer")
    with open_store(db, MODEL) as store:
        store.add(newer)
    with open_store(db, MODEL) as store:
        assert store.get_nodes(["007"])[0].get_content() == "newer"
        assert store.count() == ROWS


def test_a_data_file_that_was_cut_short_comes_back_from_the_log(stores, tmp_path, caplog):
    """As an older version leaves it after a power cut: the manifest and the log were synced, the data was not."""
    db = Path(shutil.copytree(stores["closed"], tmp_path / "a.db"))
    for log in (folder_of(stores["log"]) / "wal").iterdir():
        shutil.copy(log, folder_of(db) / "wal")
    shutil.rmtree(folder_of(db) / RECORDS)
    (file,) = folder_of(db).rglob("*.parquet")
    file.write_bytes(b"")
    with caplog.at_level(logging.WARNING):
        assert answers(db) == answers(Path(shutil.copytree(stores["closed"], tmp_path / "good.db")))
    assert "its rows are in a log still" in caplog.text


def test_a_damaged_log_is_an_error_and_a_log_that_ends_early_is_none(stores, tmp_path):
    db = Path(shutil.copytree(stores["log"], tmp_path / "a.db"))
    (log,) = (folder_of(db) / "wal").glob("wal_data*")
    content = log.read_bytes()
    log.write_bytes(content[:-40])
    with pytest.raises(StoreDamagedError, match=rf"{log.name} is damaged"):
        open_store(db, MODEL)
    assert log.exists()
    log.write_bytes(content + b"\xff\xff\xff\xff\x10\x01\0\0half a batch that was not reported")
    with open_store(db, MODEL) as store:
        assert store.count() == ROWS


@pytest.mark.parametrize("name", ["wal", "partitions", "manifest.json", RECORDS])
def test_a_link_inside_a_store_is_refused_and_nothing_is_done_to_where_it_leads(name, db, stores, tmp_path):
    other = Path(shutil.copytree(stores["both"], tmp_path / "other.db"))
    before = {path: path.read_bytes() for path in other.rglob("*") if path.is_file()}
    planted = folder_of(db) / name
    if planted.is_dir():
        shutil.rmtree(planted)
    else:
        planted.unlink()
    planted.symlink_to(folder_of(other) / name)
    with pytest.raises(StoreError, match=rf"{name} is a link"):
        open_store(db, MODEL)
    assert {path: path.read_bytes() for path in other.rglob("*") if path.is_file()} == before


def test_a_pipe_inside_a_store_is_refused_and_not_waited_for(db):
    (folder_of(db) / "manifest.json").unlink()
    os.mkfifo(folder_of(db) / "manifest.json")
    with pytest.raises(StoreError, match=r"manifest\.json is a pipe"):
        open_store(db, MODEL)


def test_a_disk_that_fails_while_rows_are_put_on_it_is_said_and_nothing_is_reported_as_stored(db, monkeypatch):
    with open_store(db, MODEL) as store:
        monkeypatch.setattr(os, "fsync", _failing)
        for write in (lambda: store.add(nodes(ROWS, 5)), lambda: store.delete_nodes(["003"])):
            with pytest.raises(StoreError, match=r"a\.db failed.* may not survive a power cut: Input/output error"):
                write()
        monkeypatch.undo()


def _failing(_: int) -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_a_store_of_an_older_version_opens_and_is_guarded_from_then_on(db, stores, tmp_path):
    """No records, no copies, no checksums in its rows."""
    expected = answers(Path(shutil.copytree(stores["closed"], tmp_path / "good.db")))
    shutil.rmtree(folder_of(db) / RECORDS)
    assert answers(db) == expected
    (file,) = folder_of(db).rglob("*.parquet")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(StoreDamagedError, match=file.name):
        open_store(db, MODEL)


# ------------------------------------------------------------------------------------------ checksums of rows


def change(db: Path, **columns: Any) -> None:
    """As another program, or a broken disk, changes one row."""
    with open_store(db, MODEL) as store:
        ((row,),) = store._collection.scan(["*"], 'id == "007"')
        store._collection.write([{**row, **columns}])


def test_a_node_that_is_not_what_was_stored_ends_the_query_that_meets_it(db):
    change(db, text="another text")
    with open_store(db, MODEL) as store:
        assert store.get_nodes(["008"])
        for ask in (
            lambda: store.get_nodes(["007"]),
            lambda: store.query(VectorStoreQuery(query_embedding=[1.0, 0, 0, 0], similarity_top_k=ROWS)),
        ):
            with pytest.raises(StoreDamagedError, match=r"'007'.*--verify"):
                ask()
        store.delete_nodes(["007"])
        store.add(nodes(7, 1))
        assert store.get_nodes(["007"])[0].get_content() == "row 7"


def test_a_vector_that_is_not_what_was_stored_is_not_stored_again(db):
    """Ingestion takes vectors from the store where only metadata changed; it must not give them a new checksum."""
    change(db, embedding=[1.0, 0, 0, 0])
    with open_store(db, MODEL) as store:
        assert store.columns(["008"], ["embedding"])["008"].keys() == {"id", "embedding"}
        with pytest.raises(StoreDamagedError, match="'007'"):
            store.columns(["007"], ["embedding"])


@pytest.mark.parametrize(
    "columns",
    [{"text": "another"}, {"width": 1}, {"embedding": [0.5] * 4}, {"label": None}, {"new": 1}, {"doc_id": "d"}],
)
def test_verify_names_every_row_that_is_not_what_was_stored(columns, db, caplog):
    change(db, **columns)
    with caplog.at_level(logging.WARNING), open_store(db, MODEL) as store:
        verification = store.verify()
    assert verification.damaged == ("007",)
    assert (verification.rows, verification.without_checksum, verification.damaged_files) == (ROWS, 0, {})
    assert "'007'" in caplog.text  # among those that are looked at when a store is opened
    with pytest.raises(StoreDamagedError, match="'007'"):
        verification.raise_damage()


def test_rows_without_a_checksum_are_counted_and_served(db):
    change(db, text="as an older version stored it", _row_checksum=None)
    with open_store(db, MODEL) as store:
        verification = store.verify()
        assert (verification.damaged, verification.without_checksum) == ((), 1)
        assert store.get_nodes(["007"])[0].get_content() == "as an older version stored it"


def test_verify_finds_what_rots_while_a_store_is_open(db):
    with open_store(db, MODEL) as store:
        store.add(nodes(ROWS, 5))
        assert not store.verify().damaged_files
        damaged = sorted([*folder_of(db).rglob("*.parquet"), *folder_of(db).rglob("wal_data*.arrow")])
        for file in damaged:
            content = bytearray(file.read_bytes())
            content[-5] ^= 4
            file.write_bytes(content)
        assert sorted(store.verify().damaged_files) == [str(file) for file in damaged]


def test_checksums_are_hidden_from_metadata_and_filters(db):
    with open_store(db, MODEL) as store:
        assert "checksum" not in repr(store.get_nodes(["007"])[0].to_dict())
        assert "checksum" not in repr(store.columns(["007"], ["*"]))
        assert "checksum" not in repr(next(store.scan(["*"])))
        clash = nodes(7, 1)[0]
        clash.metadata["_row_checksum"] = "mine"
        store.add([clash])
        (kept,) = store.get_nodes([clash.node_id])
        assert kept.metadata["_row_checksum"] == "mine", "it stays in the node, and is no column"
        assert not store.verify().damaged
