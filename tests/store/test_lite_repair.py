"""What a killed process leaves in a Milvus Lite file; `tests/ingest/test_kills.py` finds the same by killing."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from types import SimpleNamespace

from llama_index.core.schema import ImageNode

from mm_retriever.store import open_store
from mm_retriever.store.lite_durability import RECORDS
from mm_retriever.store.lite_repair import repair
from tests.store.test_lite_channel import HOLD, started
from tests.support.processes import ends

MODEL = SimpleNamespace(dimension=3, model_id="three numbers")


def nodes(*ids: str) -> list[ImageNode]:
    return [ImageNode(id_=one, image_path=f"/{one}.png", embedding=[1.0, 0.0, 0.0]) for one in ids]


def ids(db: Path) -> list[str]:
    with open_store(db, MODEL) as store:
        return [row["id"] for page in store.scan() for row in page]


def killed_before_the_log_was_removed(tmp_path: Path) -> Path:
    """As Milvus Lite leaves it where it dies after its manifest is written and before the log is removed."""
    db = tmp_path / "a.db"
    logs = db / "collections" / "mm_retriever" / "wal"
    with open_store(db, MODEL) as store:
        store.add(nodes("a", "b", "c"))
        shutil.copytree(logs, tmp_path / "logs")
    shutil.copytree(tmp_path / "logs", logs, dirs_exist_ok=True)
    assert list(logs.iterdir())
    return db


def test_rows_whose_log_outlived_their_segment_are_there_once(tmp_path):
    """Milvus Lite by itself reads the log and the segment."""
    db = killed_before_the_log_was_removed(tmp_path)
    assert ids(db) == ["a", "b", "c"]


def test_a_log_whose_rows_are_in_no_segment_is_kept(tmp_path):
    """Killed at any other moment: the log is all there is of its rows."""
    db = tmp_path / "a.db"
    with open_store(db, MODEL) as store:
        store.add(nodes("a"))
    with open_store(db, MODEL) as store:
        store.add(nodes("b"))
        shutil.copytree(db, tmp_path / "killed.db")
    assert ids(tmp_path / "killed.db") == ["a", "b"]
    assert ids(tmp_path / "killed.db") == ["a", "b"]


def test_a_file_that_another_process_has_open_is_left_alone(tmp_path):
    db = killed_before_the_log_was_removed(tmp_path)
    logs = db / "collections" / "mm_retriever" / "wal"
    kept = tmp_path / "kept"
    shutil.copytree(logs, kept)
    holder = started(HOLD, db)
    try:
        shutil.copytree(kept, logs, dirs_exist_ok=True)
        before = sorted(logs.iterdir())
        repair(db)
        assert sorted(logs.iterdir()) == before
    finally:
        ends(holder)


def test_a_collection_that_was_half_made_is_made(tmp_path):
    """Killed between the folder and the schema in it: there is no such collection, and none can be made."""
    for left in ("nothing", "half a schema"):
        db = tmp_path / f"{left}.db"
        ids(db)
        folder = db / "collections" / "mm_retriever"
        shutil.rmtree(folder)
        folder.mkdir()
        if left == "half a schema":
            (folder / "schema.json.tmp").write_text("{")
        assert ids(db) == []
        with open_store(db, MODEL) as store:
            store.add(nodes("a"))
        assert ids(db) == ["a"]
        assert {one.name for one in db.iterdir()} == {one.name for one in (tmp_path / "nothing.db").iterdir()}


def test_rows_without_a_schema_are_moved_and_not_removed(tmp_path, caplog):
    """Half dropped, or damaged by something else: nothing that was stored is deleted."""
    db = tmp_path / "a.db"
    with open_store(db, MODEL) as store:
        store.add(nodes("a"))
    (db / "collections" / "mm_retriever" / "schema.json").unlink()
    shutil.rmtree(db / "collections" / "mm_retriever" / RECORDS)
    with caplog.at_level(logging.WARNING):
        assert ids(db) == []
    (moved,) = db.glob("mm_retriever.without-schema.*")
    assert list(moved.rglob("*.parquet"))
    assert str(moved) in caplog.text


def test_a_folder_that_is_no_milvus_lite_file_is_left_alone(tmp_path):
    for name, content in (("collections", "a file"), ("LOCK", "")):
        (tmp_path / name).write_text(content)
    repair(tmp_path)
    repair(tmp_path / "missing")
    assert sorted(one.name for one in tmp_path.iterdir()) == ["LOCK", "collections"]
