"""Images into shards: planned once, each in one file, whole or not at all, with the rows of ingestion."""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llama_index.core.schema import ImageNode

from mm_retriever.bulk import import_shards
from mm_retriever.bulk.plan import ShardPlan, make_plan, read_plan
from mm_retriever.bulk.shards import ShardWriter
from mm_retriever.errors import IngestError, MissingExtraError, StoreError, StoreMismatchError
from mm_retriever.images import DEFAULT_POLICY
from mm_retriever.ingest import ingest_images
from mm_retriever.ingest.sources import path_id
from mm_retriever.store import ImageStore, open_store
from tests.support.colour_embedding import COLOURS, ColourEmbedding, paint
from tests.support.processes import ends
from tests.support.shards import check_whole, embed, planned_ids, rows_of, skips
from tests.support.warm import WarmProcess, warm_run

HOSTILE = (
    'quote".png',
    "back\\slash.png",
    "new\nline.png",
    "tab\tand 'one'.png",
    "ü😀 漢.png",
    "-rf.png",
    "%2e%2e.png",
)


@pytest.fixture
def folder(tmp_path) -> Path:
    """Images in folders, under names that somebody thought up, and some that are none."""
    root = tmp_path / "photos"
    for number in range(16):
        paint(root / ("cars" if number % 2 else "") / f"{number:02d}.png", list(COLOURS)[number % 8], (number + 8, 20))
    for number, name in enumerate(HOSTILE):
        paint(root / "named\nby an 'attacker'" / name, list(COLOURS)[number % 8])
    (root / "cut.png").write_bytes((root / "00.png").read_bytes()[:40])
    (root / "text.jpg").write_text("no image")
    (root / "notes.pdf").write_text("no image")
    (root / "folder.png").mkdir()
    os.mkfifo(root / "pipe.png")
    (root / "lost.png").symlink_to(root / "nowhere.png")
    return root


def stored_rows(store: ImageStore) -> dict[str, dict[str, Any]]:
    """All columns of all rows of a collection."""
    return {row["id"]: row for row in store.client.query("mm_retriever", filter="id != ''", output_fields=["*"])}


# ------------------------------------------------------------------------------------------ the rows


@pytest.mark.parametrize("hybrid", [False, True])
def test_the_rows_of_the_shards_are_those_that_ingestion_stores(folder, tmp_path, hybrid):
    """Truth: `ingest_images` on the same folder. Every column, and each image that is left out with its reason."""
    sidecar = {
        "cars/01.png": {"price": 9.5, "tags": ["a", 'b"'], "n": 2**60, "no": None},
        "ü😀 漢.png": {"said": 'q"\\\n'},
    }
    report = embed(folder, tmp_path / "out", sidecar=sidecar, hybrid=hybrid)
    with open_store(tmp_path / "a.db", ColourEmbedding(), hybrid=hybrid) as store:
        ingested = ingest_images(folder, store, ColourEmbedding(), sidecar=sidecar, show_progress=False)
        expected = stored_rows(store)
    found = {row["id"]: row for row in rows_of(tmp_path / "out")}
    assert found.keys() == expected.keys()
    assert (report.rows, skips(report), report.ignored) == (len(expected), skips(ingested), ingested.ignored)
    for one, row in expected.items():
        row.pop("_sparse", None)  # what Milvus itself makes of the words
        assert np.array_equal(np.float32(found[one].pop("embedding")), np.float32(row.pop("embedding")))
        assert found[one] == row


def test_a_sidecar_that_lies_in_the_folder_is_not_left_out(folder, tmp_path):
    (folder / "metadata.csv").write_text("file_name,price\ncars/01.png,9.5\n")
    kinds = [files.kind for files in embed(folder, tmp_path / "out").ignored]
    assert ".csv" not in kinds
    assert [row.get("price") for row in rows_of(tmp_path / "out")].count(9.5) == 1


class Lengths:
    """A sparse model: how many words of each length a text has."""

    model_id = "lengths"

    def encode_documents(self, texts):
        return [{len(word): float(text.split().count(word)) for word in text.split()} for text in texts]

    encode_queries = encode_documents


def test_the_shards_hold_what_a_sparse_model_makes_of_the_words(folder, tmp_path):
    """Truth: the model itself, asked through ingestion."""
    embed(folder, tmp_path / "out", hybrid=Lengths())
    with open_store(tmp_path / "a.db", ColourEmbedding(), hybrid=Lengths()) as store:
        ingest_images(folder, store, ColourEmbedding(), show_progress=False)
        expected = {one: {str(k): v for k, v in row["_sparse"].items()} for one, row in stored_rows(store).items()}
    assert {row["id"]: json.loads(row["_sparse"]) for row in rows_of(tmp_path / "out")} == expected


# ------------------------------------------------------------------------------------------ the plan


def test_each_image_is_in_one_shard_and_shards_are_full(folder, tmp_path):
    """Our promise. A list may name an image twice, and in two ways."""
    report = embed(folder, tmp_path / "out")
    planned = planned_ids(tmp_path / "out")
    everything = [one for shard in planned for one in shard]
    assert len(set(everything)) == len(everything)
    assert [len(shard) for shard in planned] == [5] * (len(everything) // 5) + [len(everything) % 5]
    assert report.rows + len(report.skipped) == len(everything)
    twice = [*sorted(folder.glob("*.png")), *map(str, folder.glob("*.png")), folder / "cars" / ".." / "cars" / "01.png"]
    embed(twice, tmp_path / "list")
    named = [one for shard in planned_ids(tmp_path / "list") for one in shard]
    assert sorted(named) == sorted(
        {*map(path_id, map(str, folder.glob("*.png"))), path_id(str(folder / "cars/01.png"))}
    )


def test_a_plan_outlives_what_becomes_of_the_folder(folder, tmp_path):
    """A new image is in no shard; one that is gone is listed; each shard still holds what it was planned to hold."""
    out = tmp_path / "out"
    embed(folder, out)
    planned = planned_ids(out)
    (out / "shards" / "000001.parquet").unlink()
    gone = next(iter(read_plan(out).items(1))).path
    Path(gone).unlink()
    paint(folder / "0.png", "red")
    report = embed(folder, out)
    assert report.written == 1
    assert planned_ids(out) == planned
    assert (gone, "no such file or directory") in skips(report)
    assert path_id(str(folder / "0.png")) not in {row["id"] for row in rows_of(out)}


def test_nothing_is_done_twice(folder, tmp_path):
    """A second call, with and without the source, embeds nothing and reports the same."""
    model = ColourEmbedding()
    first = embed(folder, tmp_path / "out", model)
    embedded = model.embedded
    for source in (folder, None):
        again = embed(source, tmp_path / "out", model)
        assert (again.written, again.rows, again.skipped) == (0, first.rows, first.skipped)
        assert again.ignored == first.ignored != ()
    assert model.embedded == embedded


def test_a_url_is_planned_and_listed_where_it_may_not_be_fetched(tmp_path):
    """No network unless it is asked for."""
    image = paint(tmp_path / "a.png", "red")
    report = embed([str(image), "https://example.com/b.png?key=1"], tmp_path / "out")
    assert report.rows == 1
    assert skips(report)[0][0] == "https://example.com/b.png?key=1"
    assert "allow_urls" in skips(report)[0][1]


class OtherModel(ColourEmbedding):
    model_name: str = "other"


class Wide(ColourEmbedding):
    @property
    def dimension(self) -> int:
        return 28


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model": OtherModel()}, "planned for model_id 'colours', and 'other' is asked for"),
        ({"model": Wide()}, "dimension 27"),
        ({"rows_per_shard": 6}, "rows_per_shard 5"),
        ({"hybrid": True}, "words None, and 'BM25 mixed'"),
        ({"sidecar": {"a.png": {"x": 1}}}, "sidecar None"),
        ({"source": "photos/cars"}, "photos/cars' is asked for"),
        ({"source": ["photos/00.png"]}, "and 'list "),
        ({"source": None, "model": OtherModel()}, "model_id"),
        ({"source": [ImageNode(image_path="a.png")], "out": "new"}, "LlamaIndex nodes go through ingest_images"),
        ({"source": [b"bytes"], "out": "new"}, "paths and URLs, not bytes"),
        ({"source": "empty", "out": "new"}, "no images to plan for in"),
        ({"source": [], "out": "new"}, "no images to plan for in 'the list'"),
        ({"source": "missing", "out": "new"}, "no file or folder 'missing'"),
        ({"source": None, "out": "new"}, "embed_to_shards makes them"),
        ({"rows_per_shard": 0, "out": "new"}, "give 1 or more"),
        ({"batch_size": 0}, "give 1 or more"),
        ({"sidecar": "missing.json", "out": "new"}, "missing.json"),
    ],
)
def test_a_plan_for_something_else_and_a_source_that_is_none_are_refused(folder, tmp_path, monkeypatch, change, says):
    """The message names what differs. No plan is left where there was none, so that the next call may make one."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    embed(folder, tmp_path / "out")
    with pytest.raises(IngestError, match=says.replace("(", r"\(")):
        embed(**{"source": folder, "out": tmp_path / "out", **change})
    assert change.get("out") is None or not (tmp_path / "new" / "plan").exists()


def test_a_list_named_again_is_known_and_a_longer_one_is_not(folder, tmp_path):
    """Or else the images that were added would be lost without a word."""
    images = sorted(map(str, folder.glob("*.png")))
    embed(images[:-1], tmp_path / "out")
    assert embed(iter(images[:-1]), tmp_path / "out").written == 0
    with pytest.raises(IngestError, match="source"):
        embed(images, tmp_path / "out")


def test_of_two_that_plan_at_a_time_one_wins_and_both_go_by_it(folder, tmp_path):
    """An image added between the two looks at the folder is in both plans or in neither."""
    barrier = threading.Barrier(8)

    def plan(_: int) -> ShardPlan:
        barrier.wait()
        options = {"model_id": "colours", "dimension": 27, "words": None, "rows_per_shard": 5, "sidecar": None}
        return make_plan(folder, tmp_path / "out", **options)

    with ThreadPoolExecutor(8) as pool:
        assert len({plan.id for plan in pool.map(plan, range(8))}) == 1
    assert not list((tmp_path / "out" / "drafts").iterdir())


PLANNING = """
import sys, tracemalloc
from mm_retriever.bulk.plan import make_plan

def peak(count):
    options = {"model_id": "m", "dimension": 3, "words": None, "rows_per_shard": 1_000, "sidecar": None}
    tracemalloc.start()
    make_plan((f"/nowhere/{number:090d}.png" for number in range(count)), f"{sys.argv[1]}/{count}", **options)
    try:
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()

peak(1_000)  # what is imported and cached on the way
print(peak(10_000) - peak(2_000))
"""


@pytest.mark.slow
def test_planning_holds_no_list_in_memory(tmp_path):
    """Ten times the paths, the same memory: our choice of a bound is a fifth of what their names alone would take.

    In a process of its own: threads that other tests left would count.
    """
    assert int(warm_run("-c", PLANNING, tmp_path).stdout) < 8_000 * (49 + 110) / 5


# ------------------------------------------------------------------------------------------ interruptions

RUN = """
import sys, time
from mm_retriever.bulk import embed_to_shards
from tests.support.colour_embedding import ColourEmbedding

class Slow(ColourEmbedding):
    def embed_images(self, images):
        time.sleep(0.01)
        return super().embed_images(images)

print("start", flush=True)
embed_to_shards(sys.argv[1], sys.argv[2], Slow(), rows_per_shard=5, batch_size=2, show_progress=False)
"""


def test_a_run_killed_in_the_middle_redoes_only_what_was_not_done(folder, tmp_path):
    """A finished shard is the same file afterwards, not an equal one."""
    out = tmp_path / "out"
    process = WarmProcess("-c", RUN, folder, out)
    while not (out / "shards" / "000001.parquet").exists():
        time.sleep(0.005)
    ends(process)
    done = {path: path.stat().st_ino for path in (out / "shards").iterdir()}
    report = embed(folder, out)
    assert report.written == read_plan(out).shards - len(done)
    assert {path: path.stat().st_ino for path in done} == done
    check_whole(folder, out)


@pytest.mark.slow
def test_many_kills_at_random_moments(folder, tmp_path, tried):
    """From before the plan to after the last shard."""
    chance = random.Random(10)
    for _ in range(8):
        process = WarmProcess("-c", RUN, folder, tmp_path / "out")
        assert process.stdout.readline() == "start\n"
        time.sleep(chance.uniform(0.0, 0.4))
        ends(process)
        tried["runs of embedding to shards killed"] += 1
    embed(folder, tmp_path / "out")
    check_whole(folder, tmp_path / "out")


def test_what_killed_writers_left_is_removed(folder, tmp_path):
    """Drafts of a plan and of shards, done or not."""
    out = tmp_path / "out"
    (out / "drafts" / "plan.0123").mkdir(parents=True)
    (out / "drafts" / "plan.0123" / "000000.jsonl").write_text("{}")
    (out / "drafts" / "000000.0123").write_bytes(b"PAR1")
    (out / "drafts" / "000001.4567.parquet").write_bytes(b"PAR1")
    embed(folder, out)
    check_whole(folder, out)
    (out / "drafts" / "000001.89ab").write_bytes(b"PAR1")
    check_whole(folder, out)


def writer(plan: ShardPlan, model: Any = None) -> ShardWriter:
    return ShardWriter(plan, model or ColourEmbedding(), hybrid=False, batch_size=2, image_policy=DEFAULT_POLICY)


def test_two_that_make_one_shard_by_accident_end_with_one_good_file(folder, tmp_path):
    """Both embed all of it, and put it in place at the same moment; one of the two says that it was the one."""
    embed(folder, tmp_path / "out")
    plan = read_plan(tmp_path / "out")
    expected = rows_of(tmp_path / "out")
    plan.shard(0).unlink()
    barrier = threading.Barrier(4)

    class Together(ColourEmbedding):
        def embed_images(self, images):
            barrier.wait(10)
            return super().embed_images(images)

    with ThreadPoolExecutor(4) as pool:
        assert any(list(pool.map(lambda _: writer(plan, Together()).write(0), range(4))))
    assert rows_of(tmp_path / "out") == expected
    check_whole(folder, tmp_path / "out")


def test_a_shard_is_not_there_before_it_is_whole(folder, tmp_path):
    """A model that fails for good in the middle leaves no file of the shard, and no draft."""

    class Lost(ColourEmbedding):
        def embed_images(self, images):
            if self.embedded >= 6:
                raise RuntimeError("the device is lost")
            return super().embed_images(images)

    for number in range(60):
        paint(folder / "more" / f"{number}.png", "red")
    with pytest.raises(RuntimeError, match="the device is lost"):
        embed(folder, tmp_path / "out", Lost(), rows_per_shard=1_000)
    assert not list((tmp_path / "out" / "shards").iterdir())
    assert not list((tmp_path / "out" / "drafts").iterdir())
    embed(folder, tmp_path / "out", rows_per_shard=1_000)
    assert len(rows_of(tmp_path / "out")) == 60 + 16 + len(HOSTILE)


@pytest.mark.parametrize("left", ["nothing", "an empty folder"])
def test_a_drive_that_is_missing_leaves_no_empty_shards(folder, tmp_path, left):
    """A shard that is done is not looked at again: without its images it must not be done."""
    embed(folder, tmp_path / "out")
    (tmp_path / "out" / "shards" / "000002.parquet").unlink()
    folder.rename(tmp_path / "elsewhere")
    if left == "an empty folder":
        folder.mkdir()
    with pytest.raises(IngestError, match="a drive that is missing"):
        embed(None, tmp_path / "out")
    shutil.rmtree(folder, ignore_errors=True)
    (tmp_path / "elsewhere").rename(folder)
    assert embed(None, tmp_path / "out").written == 1
    check_whole(folder, tmp_path / "out")


def test_one_image_that_the_model_cannot_take_costs_only_itself(folder, tmp_path):
    """As in ingestion. A column that Milvus cannot hold costs only itself."""

    class Picky(ColourEmbedding):
        def embed_images(self, images):
            if any(tuple(image[0, 0]) == COLOURS["green"] for image in images):
                raise ValueError("no green")
            return super().embed_images(images)

    report = embed(folder, tmp_path / "out", Picky(), sidecar={"00.png": {"long": "x" * 70_000, "short": "y"}})
    reasons = [reason for _, reason in skips(report)]
    assert sum("the model failed: ValueError: no green" in reason for reason in reasons) == 3
    assert [row["short"] for row in rows_of(tmp_path / "out") if row["file_name"] == "00.png"] == ["y"]
    assert any("column 'long' is left out of 1 rows" in note for note in report.notes)
    assert report.rows + len(reasons) == read_plan(tmp_path / "out").images


# ------------------------------------------------------------------------------------------ damage and refusals


def test_a_damaged_shard_and_one_of_another_plan_are_named(folder, tmp_path):
    """And are not overwritten: they may be somebody's."""
    embed(folder, tmp_path / "out")
    embed(folder, tmp_path / "other")
    shard = tmp_path / "out" / "shards" / "000001.parquet"
    shutil.copy(tmp_path / "other" / "shards" / "000001.parquet", shard)
    with pytest.raises(IngestError, match=r"000001.parquet' is a shard of another plan: remove it, and embed it again"):
        embed(folder, tmp_path / "out")
    shutil.copy(tmp_path / "out" / "shards" / "000000.parquet", shard)
    with pytest.raises(IngestError, match="another plan"):
        embed(folder, tmp_path / "out")
    shard.write_bytes(shard.read_bytes()[:-20])
    with pytest.raises(StoreError, match=r"000001.parquet' is no file of rows.*: remove it, and embed it again"):
        embed(folder, tmp_path / "out")
    shard.unlink()
    embed(folder, tmp_path / "out")
    check_whole(folder, tmp_path / "out")


@pytest.mark.parametrize("content", [None, "{", "[]\n", '{"id": "a"}\n', '{"path": "a.png", "unknown": 1}\n'])
@pytest.mark.parametrize("name", ["plan.json", "000001.jsonl"])
def test_a_damaged_plan_is_named_with_what_to_do(folder, tmp_path, name, content):
    """Our promise: one line that names the file and the fix. A folder without `plan.json` has no plan that tells."""
    embed(folder, tmp_path / "out")
    (tmp_path / "out" / "shards" / "000001.parquet").unlink()
    damaged = tmp_path / "out" / "plan" / name
    damaged.unlink()
    if content is not None:
        damaged.write_text(content)
    with pytest.raises(IngestError, match=rf"{name}|embed_to_shards makes them|another version") as caught:
        embed(None, tmp_path / "out")
    if name != "plan.json":
        assert f"remove {str(tmp_path / 'out')!r} to start anew" in str(caught.value)


def test_without_its_size_a_plan_goes_on_as_it_was_begun(folder, tmp_path):
    """A new plan has our default."""
    report = embed(folder, tmp_path / "out", rows_per_shard=7)
    (tmp_path / "out" / "shards" / "000000.parquet").unlink()
    again = embed(folder, tmp_path / "out", rows_per_shard=None)
    assert (again.shards, again.written, again.rows) == (report.shards, 1, report.rows)
    embed(folder, tmp_path / "new", rows_per_shard=None)
    assert read_plan(tmp_path / "new").rows_per_shard == 10_000


def test_a_plan_of_another_version_is_refused(folder, tmp_path):
    """It may mean something else by the same names."""
    embed(folder, tmp_path / "out")
    facts = tmp_path / "out" / "plan" / "plan.json"
    facts.write_text(facts.read_text().replace('"version": 1', '"version": 2'))
    with pytest.raises(IngestError, match="another version"):
        embed(folder, tmp_path / "out")
    for damaged in ("{", '{"version": 1}'):
        facts.write_text(damaged)
        with pytest.raises(IngestError, match="cannot read the plan"):
            embed(None, tmp_path / "out")


def test_shards_are_not_imported_where_they_do_not_fit(folder, tmp_path):
    """Milvus Lite, another model, another index of words, shards that are not done: before anything is asked."""
    embed(folder, tmp_path / "out")
    with open_store(tmp_path / "a.db", ColourEmbedding()) as store:
        with pytest.raises(StoreError, match=r"is a Milvus Lite file, .*: use ingest_images"):
            import_shards(tmp_path / "out", store)
        (tmp_path / "out" / "shards" / "000001.parquet").unlink()
        with pytest.raises(IngestError, match=r"1 of 6 shards are not embedded yet"):
            import_shards(tmp_path / "out", store)
        with pytest.raises(IngestError, match="there are no shards in"):
            import_shards(tmp_path / "nothing", store)
    with (
        open_store(tmp_path / "other.db", OtherModel()) as store,
        pytest.raises(StoreMismatchError, match=r"the shards are of 'colours' .27 numbers., the store .* for 'other'"),
    ):
        import_shards(tmp_path / "out", store)


@pytest.mark.parametrize("missing", ["pymilvus.bulk_writer.buffer", "pyarrow.parquet"])
def test_a_missing_package_is_named_with_what_installs_it(folder, tmp_path, monkeypatch, missing):
    """Architecture: the exact pip install."""
    embed(folder, tmp_path / "out")
    (tmp_path / "out" / "shards" / "000001.parquet").unlink()
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(MissingExtraError, match=r'pip install "mm-retriever\[bulk\]"'):
        embed(folder, tmp_path / "out")
