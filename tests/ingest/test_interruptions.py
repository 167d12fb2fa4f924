"""Ingestion that is killed, or whose disk is full: nothing acknowledged is lost, nothing is there twice."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path

import pytest

from mm_retriever.embedding import VisualizedBGEEmbedding
from mm_retriever.errors import IngestError
from mm_retriever.ingest import ingest_images
from mm_retriever.report import SearchReport, write_html
from mm_retriever.store import open_store
from mm_retriever.vector_cache import VectorCache
from tests.support.colour_embedding import COLOURS, ColourEmbedding, paint
from tests.support.processes import ends, python
from tests.support.warm import WarmProcess

ROOT = Path(__file__).parents[2]
IMAGES = 60

RUN = """
import sys, time
from mm_retriever.ingest import ingest_images
from mm_retriever.store import open_store
from tests.support.colour_embedding import ColourEmbedding

class Slow(ColourEmbedding):
    def embed_images(self, images):
        time.sleep(0.02)
        return super().embed_images(images)

model = Slow()
with open_store(sys.argv[2], model) as store:
    print("start", flush=True)
    print(ingest_images(sys.argv[1], store, model, batch_size=4, show_progress=False).indexed, flush=True)
"""


@pytest.fixture
def folder(tmp_path) -> Path:
    for number in range(IMAGES):
        paint(tmp_path / "photos" / f"{number:03d}.png", list(COLOURS)[number % 8], size=(number + 8, 20))
    return tmp_path / "photos"


def killed_run(folder: Path, db: Path, after: float) -> None:
    """Start a run in a process of its own and kill -9 it so many seconds after it began to write."""
    process = WarmProcess("-c", RUN, folder, db)
    try:
        assert process.stdout.readline() == "start\n"
        time.sleep(after)
    finally:
        ends(process)


def check_whole(store, folder: Path, model: ColourEmbedding) -> None:
    rows = [row for page in store.scan(["file_path", "width"]) for row in page]
    assert sorted(row["file_path"] for row in rows) == sorted(map(str, folder.iterdir())), "every image exactly once"
    assert all(row["width"] == int(Path(row["file_path"]).stem) + 8 for row in rows)
    second = ingest_images(folder, store, model, show_progress=False)
    assert (second.embedded, second.unchanged) == (0, IMAGES)


def test_a_run_killed_in_the_middle_goes_on_and_ends_with_every_image_once(folder, tmp_path):
    killed_run(folder, tmp_path / "a.db", after=0.25)
    model = ColourEmbedding()
    with open_store(tmp_path / "a.db", model) as store:
        before = store.count()
        report = ingest_images(folder, store, model, show_progress=False)
        assert report.indexed == IMAGES - before
        assert report.unchanged == before
        check_whole(store, folder, model)


def test_a_second_process_reads_while_the_first_ingests_and_goes_on_when_that_is_killed(folder, tmp_path):
    """The first has the file open and serves it; the second takes over, and misses and repeats nothing."""
    model = ColourEmbedding()
    first = WarmProcess("-c", RUN, folder, tmp_path / "a.db")
    try:
        assert first.stdout.readline() == "start\n"
        with open_store(tmp_path / "a.db", model) as store:
            while not store.count():
                assert first.poll() is None, "the first did not mind"
            ends(first)
            ingest_images(folder, store, model, show_progress=False)
            check_whole(store, folder, model)
    finally:
        ends(first)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 2 MB; only root may make one."""
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(place)], capture_output=True).returncode:
        pytest.skip("a file system cannot be mounted here")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


FILL = """
import sys
from mm_retriever.errors import StoreError
from mm_retriever.ingest import ingest_images
from mm_retriever.store import open_store
from tests.support.colour_embedding import ColourEmbedding

model = ColourEmbedding()
with open_store(sys.argv[2], model) as store:
    before = store.count()
    try:
        ingest_images(sys.argv[1], store, model, show_progress=False)
    except StoreError as error:
        print(before, store.count(), error, sep="|")
"""


@pytest.mark.slow
def test_a_full_disk_is_a_clear_error_and_what_was_stored_stays(folder, small_disk):
    """Thousands of rows do not fit. The second run finds what the first could store, and says the same."""
    for number in range(4000):
        (folder / f"link-{number}.png").symlink_to("000.png")
    stored = 0
    for _ in range(2):
        process = python("-c", FILL, folder, small_disk / "a.db", stderr=subprocess.PIPE)
        said, printed = process.communicate(timeout=120)
        before, after, error = said.strip().split("|")
        assert int(before) == stored
        stored = int(after)
        assert stored > 0
        assert "No space left on device" in error
        assert "images were stored; the same call goes on from there" in error
        assert "Insert failed" not in printed, "said once, by the error"


def fill(disk: Path) -> Path:
    """A file that takes all the room there is."""
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space left"):
        while True:
            file.write(bytes(4096))
    return ballast


@pytest.mark.slow
def test_a_full_disk_under_the_cache_of_vectors_costs_no_image(folder, small_disk, tmp_path, caplog):
    """Said once; what was kept is still known, and with room again the next vectors are kept."""
    model = VisualizedBGEEmbedding("tiny", device="cpu", cache_dir=small_disk)
    known = model.get_text_embedding("a red mug")
    ballast = fill(small_disk)
    with open_store(tmp_path / "a.db", model) as store:
        report = ingest_images(folder, store, model, batch_size=4, show_progress=False)
        assert (report.indexed, report.skipped) == (IMAGES, ())
        (said,) = [record.getMessage() for record in caplog.records if record.name == "mm_retriever.vector_cache"]
        assert str(small_disk) in said
        assert "disk is full" in said
        assert model.get_text_embedding("a red mug") == known
        ballast.unlink()
        cache = VectorCache(small_disk, model.dimension)
        assert len(cache) == 1
        report = ingest_images(folder, store, model, show_progress=False)
        assert report.unchanged == IMAGES
        model.get_text_embedding("a blue mug")
        assert len(cache) == 2
        cache.close()


@pytest.mark.slow
def test_a_full_disk_under_the_report_says_what_was_done_and_keeps_the_old_report(folder, small_disk, tmp_path):
    model = ColourEmbedding()
    target = small_disk / "report.json"
    with open_store(tmp_path / "a.db", model) as store:
        ingest_images([folder / "000.png"], store, model, report_path=target, show_progress=False)
        old = target.read_bytes()
        ballast = fill(small_disk)
        with pytest.raises(IngestError, match=rf"{IMAGES - 1} indexed.* cannot be written .*report\.json.*No space"):
            ingest_images(folder, store, model, report_path=target, show_progress=False)
        assert target.read_bytes() == old
        assert sorted(small_disk.iterdir()) == [ballast, target]
        ballast.unlink()
        ingest_images(folder, store, model, report_path=target, show_progress=False)
        assert json.loads(target.read_text())["unchanged"] == IMAGES


@pytest.mark.slow
def test_a_full_disk_under_a_page_of_results_is_an_error_and_keeps_the_old_page(small_disk):
    page = write_html(small_disk / "results.html", SearchReport(query_text="red"))
    old = page.read_bytes()
    ballast = fill(small_disk)
    with pytest.raises(OSError, match="No space left on device"):
        write_html(page, SearchReport(query_text="blue" * 2000))
    assert page.read_bytes() == old
    assert sorted(small_disk.iterdir()) == [ballast, page]
