"""Ingestion that is killed, or whose server is: nothing acknowledged is lost, nothing is there twice."""

from __future__ import annotations

import random
import subprocess
import threading
import time
from pathlib import Path

import pytest

from mm_retriever.errors import StoreUnavailableError
from mm_retriever.ingest import ingest_images
from mm_retriever.store import open_store
from tests.colour_embedding import COLOURS, ColourEmbedding, paint
from tests.processes import ends, free_port, lite_server, python

ROOT = Path(__file__).parents[2]
PICTURES = 60

RUN = """
import sys, time
from mm_retriever.ingest import ingest_images
from mm_retriever.store import open_store
from tests.colour_embedding import ColourEmbedding

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
    for number in range(PICTURES):
        paint(tmp_path / "photos" / f"{number:03d}.png", list(COLOURS)[number % 8], size=(number + 8, 20))
    return tmp_path / "photos"


def killed_run(folder: Path, db: Path, after: float) -> None:
    """Start a run in a process of its own and kill -9 it so many seconds after it began to write."""
    process = python("-c", RUN, folder, db)
    try:
        assert process.stdout.readline() == "start\n"
        time.sleep(after)
    finally:
        ends(process)


def check_whole(store, folder: Path, model: ColourEmbedding) -> None:
    rows = [row for page in store.scan(["file_path", "width"]) for row in page]
    assert sorted(row["file_path"] for row in rows) == sorted(map(str, folder.iterdir())), "every picture exactly once"
    assert all(row["width"] == int(Path(row["file_path"]).stem) + 8 for row in rows)
    second = ingest_images(folder, store, model, show_progress=False)
    assert (second.embedded, second.unchanged) == (0, PICTURES)


def test_a_run_killed_in_the_middle_goes_on_and_ends_with_every_picture_once(folder, tmp_path):
    killed_run(folder, tmp_path / "a.db", after=0.25)
    model = ColourEmbedding()
    with open_store(tmp_path / "a.db", model) as store:
        before = store.count()
        report = ingest_images(folder, store, model, show_progress=False)
        assert report.indexed == PICTURES - before
        assert report.unchanged == before
        check_whole(store, folder, model)


@pytest.mark.slow
def test_many_kills_at_random_moments(folder, tmp_path):
    """From before the first row to after the last."""
    chance = random.Random(5)
    for _ in range(8):
        killed_run(folder, tmp_path / "a.db", after=chance.uniform(0.0, 0.5))
        paint(folder / f"{chance.randrange(PICTURES):03d}.png", "purple", size=(8, 20))
    for number in range(PICTURES):
        paint(folder / f"{number:03d}.png", list(COLOURS)[number % 8], size=(number + 8, 20))
    model = ColourEmbedding()
    with open_store(tmp_path / "a.db", model) as store:
        ingest_images(folder, store, model, show_progress=False, prune=True)
        check_whole(store, folder, model)


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
from tests.colour_embedding import ColourEmbedding

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
        assert "pictures were stored; the same call goes on from there" in error
        assert "Insert failed" not in printed, "said once, by the error"


@pytest.mark.slow
def test_a_server_killed_and_restarted_in_the_middle_is_waited_for(folder, tmp_path):
    port = free_port()
    server = [lite_server(tmp_path / "data", port)]

    class Waiting(ColourEmbedding):
        def embed_images(self, images):
            time.sleep(0.05)
            return super().embed_images(images)

    def restart() -> None:
        time.sleep(0.3)
        ends(server[0])
        time.sleep(1.5)
        server[0] = lite_server(tmp_path / "data", port)

    model = Waiting()
    try:
        with open_store(f"http://127.0.0.1:{port}", model, timeout=5) as store:
            trouble = threading.Thread(target=restart)
            trouble.start()
            report = ingest_images(folder, store, model, batch_size=4, show_progress=False)
            trouble.join()
            assert report.indexed == PICTURES
            check_whole(store, folder, model)
    finally:
        ends(server[0])


@pytest.mark.slow
def test_a_server_that_stays_away_is_a_clear_error_and_what_was_stored_stays(folder, tmp_path):
    port = free_port()
    server = lite_server(tmp_path / "data", port)

    class Fatal(ColourEmbedding):
        def embed_images(self, images):
            if self.embedded == 20:
                ends(server)
            return super().embed_images(images)

    model = Fatal()
    try:
        with (
            open_store(f"http://127.0.0.1:{port}", model, timeout=1) as store,
            pytest.raises(StoreUnavailableError, match=r"20 pictures were stored; the same call goes on from there"),
        ):
            ingest_images(folder, store, model, batch_size=4, show_progress=False)
        server = lite_server(tmp_path / "data", port)
        model = ColourEmbedding()
        with open_store(f"http://127.0.0.1:{port}", model, timeout=5) as store:
            assert store.count() == 20
            assert ingest_images(folder, store, model, show_progress=False).indexed == PICTURES - 20
            check_whole(store, folder, model)
    finally:
        ends(server)
