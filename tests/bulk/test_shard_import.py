"""Shards imported by a real Milvus server, whoever dies meanwhile: each row once, as ingestion would store it."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from mm_retriever.bulk import embed_to_shards, import_shards
from mm_retriever.bulk.plan import read_plan
from mm_retriever.cli import main
from mm_retriever.errors import StoreError
from mm_retriever.ingest import ingest_images
from mm_retriever.own_keys import FILE_STAMP
from mm_retriever.store import ImageStore, open_store
from tests.support.colour_embedding import COLOURS, ColourEmbedding, paint
from tests.support.milvus_server import MilvusServer
from tests.support.processes import ends, python
from tests.support.settled import settle

pytestmark = pytest.mark.slow
ROWS = 13
HOSTILE = ('quote".png', "back\\slash.png", "new\nline.png", "ü😀 漢.png", "'); drop.png")
SIDECAR = {"ü😀 漢.png": {"price": 9.5, "tags": ["a", 'b"'], "n": 2**60 + 1, "said": 'q"\\\n\0'}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """35 images and two that are none, in shards of 13, 13 and 9 rows."""
    root = tmp_path_factory.mktemp("import") / "photos"
    for number in range(30):
        paint(root / ("cars" if number % 2 else "") / f"{number:02d}.png", list(COLOURS)[number % 8], (number + 8, 20))
    for number, name in enumerate(HOSTILE):
        paint(root / name, list(COLOURS)[number % 8])
    (root / "cut.png").write_bytes((root / "00.png").read_bytes()[:40])
    (root / "text.jpg").write_text("no image")
    settle(root)
    return root


@pytest.fixture
def out(folder, tmp_path) -> Path:
    report = embed_to_shards(
        folder, tmp_path / "out", ColourEmbedding(), rows_per_shard=ROWS, sidecar=SIDECAR, show_progress=False
    )
    assert (report.rows, report.shards, len(report.skipped)) == (35, 3, 2)
    return tmp_path / "out"


@pytest.fixture
def remote(out, milvus_server: MilvusServer) -> Iterator[str]:
    """A copy of the shards where the server finds it, as it would in its object storage."""
    place = milvus_server.data / f"shards of {out.parent.name}"
    shutil.copytree(out / "shards", place)
    yield str(place)
    shutil.rmtree(place)


@pytest.fixture
def store(milvus_server: MilvusServer, tmp_path) -> Iterator[ImageStore]:
    name = "".join(one if one.isalnum() else "_" for one in tmp_path.name)
    with open_store(milvus_server.uri, ColourEmbedding(), collection=name, timeout=60) as opened:
        yield opened
        opened.client.drop_collection(name)


def check_whole(store: ImageStore, folder: Path) -> None:
    """Every row once; ingestion finds nothing to do; each vector is the model's own."""
    model = ColourEmbedding()
    second = ingest_images(folder, store, model, sidecar=SIDECAR, show_progress=False)
    assert (second.unchanged, second.embedded, second.updated) == (35, 0, 0)
    assert store.count() == 35
    rows = [row for page in store.scan(["file_path", "width", "embedding"]) for row in page]
    assert len(rows) == 35
    for row in rows:
        assert np.array_equal(np.float32(row["embedding"]), np.float32(model.get_image_embedding(row["file_path"])))


def test_a_server_imports_each_row_once_as_ingestion_would_store_it(folder, out, remote, store, tmp_path, capsys):
    """Truth: rows that `ingest_images` stores, column by column; some are there before. A second call, from the
    command line, does nothing.
    """
    ingest_images([folder / "00.png", folder / HOSTILE[0]], store, ColourEmbedding(), show_progress=False)
    report = import_shards(out, store, remote_folder=remote, show_progress=False)
    assert (report.imported, report.present) == (35, 0)
    with open_store(tmp_path / "a.db", ColourEmbedding()) as single:
        ingest_images(folder, single, ColourEmbedding(), sidecar=SIDECAR, show_progress=False)
        found, expected = (
            {row["id"]: row for row in one.client.query(one.collection_name, filter="id != ''", output_fields=["*"])}
            for one in (store, single)
        )
    for rows in (found, expected):
        for row in rows.values():
            row["embedding"] = np.float32(row["embedding"]).tolist()
    assert found == expected
    assert all(row[FILE_STAMP] for row in expected.values())
    check_whole(store, folder)
    with pytest.raises(SystemExit) as ended:
        main(["import", str(out), "--db", store.uri, "--collection", store.collection_name, "--remote-folder", remote])
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith("0 rows imported, 35 there already, in ")
    check_whole(store, folder)


def test_rows_that_are_there_twice_are_there_once_afterwards(folder, out, remote, store):
    """What an importer leaves that asks twice for a file: the server takes both, and has rows of equal ids."""
    handler = store.client._get_connection()
    for name in ("000000.parquet", "000000.parquet", "000001.parquet"):
        handler.do_bulk_insert(store.collection_name, "", [f"{remote}/{name}"], timeout=30)
    report = import_shards(out, store, remote_folder=remote, show_progress=False)
    assert (report.imported, report.present) == (22, 13)
    check_whole(store, folder)


IMPORT = """
import sys
from mm_retriever.bulk import import_shards
from mm_retriever.store import open_store
from tests.support.colour_embedding import ColourEmbedding

uri, collection, out, remote, timeout = sys.argv[1:]
with open_store(uri, ColourEmbedding(), collection=collection, timeout=int(timeout)) as store:
    print("start", flush=True)
    import_shards(out, store, remote_folder=remote, show_progress=False)
    print("done", flush=True)
"""


def test_an_importer_killed_in_the_middle_is_repeated(folder, out, remote, store, milvus_server, tried):
    """Killed as soon as the server has some of its tasks, and again while it waits for them to show."""
    handler = store.client._get_connection()
    for enough in (1, 3):
        process = python("-c", IMPORT, milvus_server.uri, store.collection_name, out, remote, 60)
        assert process.stdout.readline() == "start\n"
        while len(handler.list_bulk_insert_tasks(0, store.collection_name, timeout=30)) < enough:
            time.sleep(0.002)
            assert process.poll() is None
        ends(process)
        tried["importers killed"] += 1
    import_shards(out, store, remote_folder=remote, show_progress=False)
    check_whole(store, folder)


def importing(server: MilvusServer, store: ImageStore, out: Path, remote: str, timeout: int) -> subprocess.Popen[str]:
    """An importer in a process of its own, as soon as the server reads one of its files."""
    arguments = (server.uri, store.collection_name, out, remote, timeout)
    with (out / "said").open("w") as said:
        process = python("-c", IMPORT, *arguments, stderr=said)
    assert process.stdout.readline() == "start\n"
    handler = store.client._get_connection()
    while all(task.state_name == "Pending" for task in handler.list_bulk_insert_tasks(0, store.collection_name)):
        time.sleep(0.002)
        assert process.poll() is None
    return process


def test_a_server_killed_in_the_middle_of_an_import_is_a_clear_error_and_the_same_call_goes_on(
    folder, tmp_path, out, remote, store, milvus_server, tried
):
    """The server forgets what it was about: its own reason is in the error, and nothing is there twice afterwards.

    One file: of others that wait meanwhile this server may lose sight for a quarter of an hour.
    """
    single = tmp_path / "single"
    embed_to_shards(folder, single, ColourEmbedding(), sidecar=SIDECAR, show_progress=False)
    shutil.copy(read_plan(single).shard(0), Path(remote) / "000000.parquet")
    process = importing(milvus_server, store, single, remote, 300)
    try:
        milvus_server.kill()
        tried["servers killed"] += 1
        milvus_server.start()
        process.wait(120)
        said = (single / "said").read_text()
        assert process.returncode == 1, said
        assert "mm_retriever.errors.StoreError: the server did not import" in said
        assert "the same call goes on" in said
    finally:
        ends(process)
    import_shards(single, store, remote_folder=remote, show_progress=False)
    check_whole(store, folder)


def test_a_server_that_stops_answering_is_a_clear_error_and_the_same_call_goes_on(
    folder, out, remote, store, milvus_server, tried
):
    """It still has the tasks when it wakes up: they are waited for, and their rows are not imported again."""
    process = importing(milvus_server, store, out, remote, 5)
    try:
        milvus_server.freeze()
        tried["servers frozen"] += 1
        process.wait(60)
        said = (out / "said").read_text()
        assert process.returncode == 1, said
        assert "mm_retriever.errors.StoreUnavailableError: no answer from Milvus" in said
    finally:
        milvus_server.thaw()
        ends(process)
    time.sleep(2)  # it may yet die of a request that was given up meanwhile
    if milvus_server.revive():
        pytest.skip("this server died of a request that was given up, and lost sight of its tasks")
    import_shards(out, store, remote_folder=remote, show_progress=False)
    check_whole(store, folder)


def test_what_the_server_cannot_import_is_said_with_its_reason(folder, out, remote, store):
    """A file that was not copied, then another in its place; the shards that came before are not lost by it."""
    shard = Path(remote) / "000001.parquet"
    shard.unlink()
    with pytest.raises(StoreError, match=r"did not import .*/000001.parquet': .*no such file or directory.*goes on"):
        import_shards(out, store, remote_folder=remote, show_progress=False)
    shutil.copy(Path(remote) / "000000.parquet", shard)
    with pytest.raises(StoreError, match=r"imported from .*/000001.parquet' is not what .*: copy the file again"):
        import_shards(out, store, remote_folder=remote, show_progress=False)
    shutil.copy(read_plan(out).shard(1), shard)
    import_shards(out, store, remote_folder=remote, show_progress=False)
    check_whole(store, folder)


def test_a_copy_with_other_vectors_is_noticed(folder, out, remote, store, tmp_path):
    """The same ids from another time: the rows are removed again, so that the next call imports the right ones."""

    class Other(ColourEmbedding):
        def embed_images(self, images):
            return -super().embed_images(images)

    other = tmp_path / "other"
    embed_to_shards(folder, other, Other(), rows_per_shard=ROWS, show_progress=False)
    shutil.copy(read_plan(other).shard(0), Path(remote) / "000000.parquet")
    with pytest.raises(StoreError, match=r"000000.parquet' is not what"):
        import_shards(out, store, remote_folder=remote, show_progress=False)
    shutil.copy(read_plan(out).shard(0), Path(remote) / "000000.parquet")
    report = import_shards(out, store, remote_folder=remote, show_progress=False)
    assert (report.imported, report.present) == (13, 22)
    check_whole(store, folder)
