"""`ingest_images` on real Milvus Lite, with the colour embedding of the tests as the model."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from llama_index.core.schema import Document, ImageDocument, ImageNode, MediaResource, Node, TextNode
from llama_index.core.vector_stores.types import FilterOperator, MetadataFilter, MetadataFilters
from PIL import Image

from mm_retriever.errors import IngestError, StoreMismatchError
from mm_retriever.images import ImagePolicy
from mm_retriever.ingest import IngestReport, ingest_images
from mm_retriever.store import ImageStore, open_store
from tests.support.colour_embedding import COLOURS, ColourEmbedding, paint


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    with open_store(tmp_path_factory.mktemp("ingest") / "shared.db", ColourEmbedding()) as opened:
        yield opened


@pytest.fixture
def store(shared):
    shared.clear()
    return shared


@pytest.fixture
def model():
    return ColourEmbedding()


@pytest.fixture
def folder(tmp_path) -> Path:
    """Three pictures, in folders; beside them what is none."""
    root = tmp_path / "photos"
    paint(root / "cars" / "fast" / "red.png", "red")
    paint(root / "cars" / "blue.jpg", "blue")
    paint(root / "green.JPEG", "green", size=(30, 20))
    (root / "notes.txt").write_text("no picture")
    paint(root / ".hidden" / "black.png", "black")
    paint(root / ".black.png", "black")
    return root


def ingest(source: Any, store: ImageStore, model: ColourEmbedding, **options: Any) -> IngestReport:
    return ingest_images(source, store, model, show_progress=False, **options)


def counts(report: IngestReport) -> dict[str, int]:
    names = ("indexed", "replaced", "updated", "unchanged", "removed")
    found = {name: getattr(report, name) for name in names} | {"skipped": len(report.skipped)}
    return {name: count for name, count in found.items() if count}


def nodes(store: ImageStore) -> dict[str, ImageNode]:
    ids = [row["id"] for page in store.scan() for row in page]
    return {one.metadata.get("file_name", one.node_id): one for one in store.get_nodes(ids)}


def where(key: str, value: Any, operator: str = "==") -> MetadataFilters:
    return MetadataFilters(filters=[MetadataFilter(key=key, value=value, operator=FilterOperator(operator))])


# ------------------------------------------------------------------------------------------ a folder


def test_a_folder_is_stored_with_what_is_known_of_its_pictures(folder, store, model):
    """Truth: the files themselves."""
    report = ingest(folder, store, model, batch_size=2)
    assert counts(report) == {"indexed": 3}
    assert report.embedded == model.embedded == 3
    assert report.images_per_second > 0
    stored = nodes(store)
    assert set(stored) == {"red.png", "blue.jpg", "green.JPEG"}
    file = folder / "cars" / "fast" / "red.png"
    assert stored["red.png"].metadata == {
        "file_path": str(file),
        "file_name": "red.png",
        "label": "cars/fast",
        "width": 24,
        "height": 18,
        "bytes": file.stat().st_size,
        "mtime_ns": file.stat().st_mtime_ns,
        "digest": hashlib.sha256(file.read_bytes()).hexdigest(),
    }
    assert stored["red.png"].image_path == str(file)
    assert "label" not in stored["green.JPEG"].metadata
    assert stored["red.png"].get_metadata_str(mode="llm").count("digest") == 0, "bookkeeping is not for language models"


def test_a_second_run_embeds_nothing_and_adds_nothing(folder, store, model):
    ingest(folder, store, model)
    first = nodes(store)
    report = ingest(folder, store, model)
    assert counts(report) == {"unchanged": 3}
    assert (report.embedded, model.embedded, store.count()) == (0, 3, 3)
    assert nodes(store).keys() == first.keys()


def test_the_same_folder_by_another_name_is_the_same(folder, store, model, monkeypatch):
    ingest(folder, store, model)
    monkeypatch.chdir(folder.parent)
    (folder.parent / "link").symlink_to(folder)
    for name in ("photos", "./photos/", "link", str(folder / "cars" / "..")):
        assert counts(ingest(name, store, model)) == {"unchanged": 3}


def test_a_changed_picture_is_replaced_and_a_touched_one_is_not_embedded(folder, store, model):
    ingest(folder, store, model)
    paint(folder / "green.JPEG", "yellow")
    os.utime(folder / "cars" / "blue.jpg", (1, 1))
    assert counts(ingest(folder, store, model)) == {"replaced": 1, "unchanged": 2}
    assert model.embedded == 4
    stored = nodes(store)
    assert len(stored) == 3
    assert stored["blue.jpg"].metadata["mtime_ns"] == 1_000_000_000
    assert stored["blue.jpg"].metadata["width"] == 24
    best = store.query(query(model.get_text_embedding("yellow")))
    assert best.nodes[0].metadata["file_name"] == "green.JPEG"
    blue = store.query(query(model.get_text_embedding("blue")))
    assert blue.nodes[0].metadata["file_name"] == "blue.jpg", "the touched one kept its vector"
    assert counts(ingest(folder, store, model)) == {"unchanged": 3}


def query(vector: list[float]) -> Any:
    from llama_index.core.vector_stores.types import VectorStoreQuery

    return VectorStoreQuery(query_embedding=vector, similarity_top_k=1)


def test_links_are_followed_to_files_and_not_into_loops(folder, store, model):
    (folder / "cars" / "loop").symlink_to(folder)
    (folder / "cars" / "linked.png").symlink_to(folder / "cars" / "fast" / "red.png")
    (folder / "broken.png").symlink_to(folder / "nowhere.png")
    report = ingest(folder, store, model)
    assert counts(report) == {"indexed": 4, "skipped": 1}
    assert report.skipped[0].path.endswith("broken.png")
    assert report.skipped[0].reason == "no such file or directory"


def test_a_very_deep_folder_is_walked(tmp_path, store, model):
    """Deeper than Python's own stack."""
    root = tmp_path / "deep"
    place = root
    depth = 0
    while len(str(place)) < 3900 and depth < 1500:
        place, depth = place / "d", depth + 1
    root.mkdir()
    here = os.getcwd()
    try:
        os.chdir(root)
        for _ in range(depth):
            os.mkdir("d")
            os.chdir("d")
        paint(Path("red.png"), "red")
        os.chdir(here)
        assert counts(ingest(root, store, model)) == {"indexed": 1}
    finally:
        os.chdir(here)
        subprocess.run(["rm", "-rf", str(root)], check=True)  # too deep for Python's rmtree, and so for pytest


# ------------------------------------------------------------------------------------------ bad pictures


def hostile(root: Path) -> dict[str, str]:
    """Write files that are no pictures; returns a part of the reason for each."""
    paint(root / "whole.png", "red")
    whole = (root / "whole.png").read_bytes()
    (root / "truncated.png").write_bytes(whole[: len(whole) // 2])
    (root / "empty.jpg").write_bytes(b"")
    (root / "text.jpg").write_text("not a picture at all")
    paint(root / "large.png", "red", size=(2000, 1000))
    (root / "folder.png").mkdir()
    os.mkfifo(root / "pipe.jpg")
    (root / "heavy.png").write_bytes(whole + b"\0" * 200_000)
    Path(os.fsdecode(bytes(root) + b"/caf\xe9.png")).write_bytes(whole)
    return {
        "truncated.png": "truncated",
        "empty.jpg": "zero bytes",
        "text.jpg": "not an image",
        "large.png": "2000x1000 pixels, more than the limit",
        "pipe.jpg": "not a file",
        "heavy.png": "more than the limit",
        "caf\ufffd.png": "not Unicode",
    }


def test_bad_pictures_are_listed_with_reasons_and_do_not_stop_the_run(tmp_path, store, model):
    """The good ones: 16-bit, CMYK, turned by EXIF, animated."""
    root = tmp_path / "photos"
    reasons = hostile(root)
    Image.fromarray(np.full((20, 30), 40_000, dtype=np.uint16)).save(root / "sixteen.png")
    Image.new("CMYK", (20, 30), (0, 255, 255, 0)).save(root / "cmyk.jpg")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (30, 20), "red").save(root / "turned.jpg", exif=exif)
    frames = [Image.new("RGB", (20, 30), colour) for colour in ("red", "blue")]
    frames[0].save(root / "moving.gif", save_all=True, append_images=frames[1:])
    policy = ImagePolicy(max_pixels=1_000_000, max_bytes=100_000)
    report = ingest(root, store, model, image_policy=policy)
    assert counts(report) == {"indexed": 5, "skipped": len(reasons)}
    listed = {Path(one.path).name: one.reason for one in report.skipped}
    assert listed.keys() == reasons.keys()
    assert [name for name, part in reasons.items() if part not in listed[name]] == []
    assert all("\n" not in reason and len(reason) < 400 for reason in listed.values())
    stored = nodes(store)
    assert set(stored) == {"whole.png", "sixteen.png", "cmyk.jpg", "turned.jpg", "moving.gif"}
    assert (stored["turned.jpg"].metadata["width"], stored["turned.jpg"].metadata["height"]) == (20, 30)
    again = ingest(root, store, model, image_policy=policy)
    assert counts(again) == {"unchanged": 5, "skipped": len(reasons)}


def test_roots_of_the_policy_hold_for_ingestion(folder, tmp_path, store, model):
    outside = paint(tmp_path / "outside.png", "red")
    report = ingest([outside, folder / "green.JPEG"], store, model, image_policy=ImagePolicy(roots=(folder,)))
    assert counts(report) == {"indexed": 1, "skipped": 1}
    assert "outside the folders" in report.skipped[0].reason


class Moody(ColourEmbedding):
    """Fails for some colours."""

    def embed_images(self, images: Sequence[np.ndarray]) -> np.ndarray:
        red, _, blue = np.stack(images).max((1, 2)).T
        if (red > 180).any():
            raise RuntimeError("I do not like red")
        return super().embed_images(images) * np.where(blue > 180, np.nan, 1)[:, None]


def test_a_picture_that_the_model_refuses_does_not_cost_its_batch(folder, store):
    report = ingest(folder, store, Moody())
    assert counts(report) == {"indexed": 1, "skipped": 2}
    reasons = {Path(one.path).name: one.reason for one in report.skipped}
    assert reasons["red.png"] == "the model failed: RuntimeError: I do not like red"
    assert reasons["blue.jpg"] == "the model gave NaN or infinity for it"
    assert set(nodes(store)) == {"green.JPEG"}


def test_a_model_that_never_works_ends_the_run(tmp_path, store):
    """Better than a list of all pictures."""
    for number in range(20):
        paint(tmp_path / "reds" / f"{number}.png", "red")
    with pytest.raises(RuntimeError, match="I do not like red"):
        ingest(tmp_path / "reds", store, Moody(), batch_size=4)


# ------------------------------------------------------------------------------------------ prune


def test_removed_files_stay_until_pruned(folder, store, model):
    ingest(folder, store, model)
    (folder / "green.JPEG").unlink()
    assert counts(ingest(folder, store, model)) == {"unchanged": 2}
    assert store.count() == 3
    assert counts(ingest(folder, store, model, prune=True)) == {"unchanged": 2, "removed": 1}
    assert set(nodes(store)) == {"red.png", "blue.jpg"}


def test_prune_takes_nothing_from_other_folders_and_other_programs(folder, store, model):
    """Rows beside the folder, of a folder with the same beginning, and rows below it that someone else wrote."""
    others = [paint(folder.parent / "photos2" / "x.png", "red"), paint(folder.parent / "photo.png", "blue")]
    ingest(others, store, model)
    ingest(folder, store, model)
    foreign = ImageNode(
        id_="mine", image_path=str(folder / "gone.png"), metadata={"file_path": str(folder / "gone.png")},
        embedding=[1.0] + [0.0] * 26,
    )  # fmt: skip
    store.add([foreign])
    for path in [*others, folder / "cars" / "blue.jpg", folder / "cars" / "fast" / "red.png"]:
        path.unlink()
    assert counts(ingest(folder, store, model, prune=True)) == {"unchanged": 1, "removed": 2}
    assert {one.node_id if one.node_id == "mine" else name for name, one in nodes(store).items()} == {
        "x.png",
        "photo.png",
        "green.JPEG",
        "mine",
    }


def test_prune_removes_the_row_of_a_picture_that_was_spoiled(folder, store, model):
    """Its row speaks of pixels that are no longer there."""
    ingest(folder, store, model)
    (folder / "green.JPEG").write_bytes(b"spoiled")
    assert counts(ingest(folder, store, model)) == {"unchanged": 2, "skipped": 1}
    assert store.count() == 3
    assert counts(ingest(folder, store, model, prune=True)) == {"unchanged": 2, "skipped": 1, "removed": 1}


def test_prune_of_an_empty_folder_is_refused(folder, store, model):
    """More likely a drive that is not mounted than an album that was emptied."""
    ingest(folder, store, model)
    for path in (*folder.rglob("*.png"), *folder.rglob("*.jp*g"), *folder.rglob("*.JPEG")):
        path.unlink()
    with pytest.raises(IngestError, match="nothing was removed"):
        ingest(folder, store, model, prune=True)
    assert store.count() == 3


def test_prune_needs_a_folder(folder, store, model):
    for source in ([folder / "green.JPEG"], folder / "green.JPEG"):
        with pytest.raises(IngestError, match="needs a folder"):
            ingest(source, store, model, prune=True)


# ------------------------------------------------------------------------------------------ lists and documents


def test_a_list_a_generator_and_a_single_file(folder, store, model):
    green, red = folder / "green.JPEG", folder / "cars" / "fast" / "red.png"
    assert counts(ingest([green, str(red), green], store, model)) == {"indexed": 2}, "named twice, stored once"
    assert nodes(store)["red.png"].metadata["label"] == "fast"
    assert counts(ingest((path for path in (green, red)), store, model)) == {"unchanged": 2}
    assert counts(ingest(str(green), store, model)) == {"unchanged": 1}
    assert counts(ingest(folder, store, model)) == {"unchanged": 1, "updated": 1, "indexed": 1}
    assert nodes(store)["red.png"].metadata["label"] == "cars/fast", "seen from the folder it lies deeper"


def test_a_generator_is_read_as_it_is_needed(tmp_path, store, model):
    """Our choice: a window of 256 is looked up at a time, and what came before is stored by then."""
    paint(tmp_path / "red.png", "red")

    def breaks_off():
        for number in range(600):
            (tmp_path / f"{number}.png").symlink_to("red.png")
            yield tmp_path / f"{number}.png"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ingest(breaks_off(), store, model, batch_size=4)
    assert 512 - 3 * 4 <= store.count() <= 512


def test_llamaindex_documents_and_nodes_of_every_kind(folder, store, model):
    path = str(folder / "green.JPEG")
    documents = [
        ImageDocument(image_path=path, metadata={"album": "garden"}, text="a caption"),
        ImageNode(id_="sku-1", image_path=str(folder / "cars" / "blue.jpg"), metadata={"price": 2.5}),
        Node(image_resource=MediaResource(path=folder / "cars" / "fast" / "red.png")),
        Document(text="a red letter", metadata={"kind": "letter"}),
        TextNode(id_="text-1", text="a blue note"),
        Document(text="  "),
        ImageDocument(image="aGVsbG8="),
    ]
    report = ingest(documents, store, model)
    assert counts(report) == {"indexed": 5, "skipped": 2}
    assert "neither text nor an image" in report.skipped[0].reason
    assert "not an image in a supported format" in report.skipped[1].reason
    stored = nodes(store)
    assert stored["green.JPEG"].metadata["album"] == "garden"
    assert stored["green.JPEG"].get_content() == "a caption"
    assert stored["blue.jpg"].node_id == "sku-1"
    assert stored["blue.jpg"].metadata["price"] == 2.5
    assert stored["text-1"].get_content() == "a blue note"
    green = store.query(query(model.get_text_embedding("green")))
    assert green.nodes[0].image_path == path, "a picture by its pixels, whatever its caption says"
    letter = store.get_nodes(filters=where("kind", "letter"))[0]
    store.delete(letter.ref_doc_id)
    assert store.count() == 4


def test_the_same_documents_again_are_known_though_their_ids_are_new(folder, store, model):
    """LlamaIndex gives a random id to each; the notebook that was published stores all of them twice."""

    def documents():
        yield ImageDocument(image_path=str(folder / "green.JPEG"), metadata={"album": "garden"})
        yield Document(text="a red letter", metadata={"file_path": "/letters/1"})
        yield Document(text="a red letter", metadata={"file_path": "/letters/2"})
        yield TextNode(id_="chosen", text="a blue note")

    assert counts(ingest(documents(), store, model)) == {"indexed": 4}
    assert counts(ingest(documents(), store, model)) == {"unchanged": 4}
    assert counts(ingest([TextNode(id_="chosen", text="another note")], store, model)) == {"replaced": 1}
    assert store.count() == 4


def test_a_node_that_cannot_be_stored_does_not_cost_its_batch(folder, store, model):
    endless = {}
    endless["size"] = endless
    documents = [
        Document(text="fine"),
        Document(text="long " * 20_000),
        Document(text="nested in itself", metadata=endless),
        ImageDocument(image_path=str(folder / "green.JPEG"), metadata={"a/b": {"c": 1}, "id": "x"}),
        ImageDocument(image_path=str(folder / "cars" / "blue.jpg")),
    ]
    report = ingest(documents, store, model)
    assert counts(report) == {"indexed": 3, "skipped": 2}
    reasons = " ".join(one.reason for one in report.skipped)
    assert "split it into smaller nodes" in reasons
    assert "nested more than 32 deep" in reasons


def test_a_url_is_fetched_only_where_the_policy_allows_it(store, model):
    report = ingest(["https://example.com/a.jpg"], store, model)
    assert counts(report) == {"skipped": 1}
    assert "allow_urls" in report.skipped[0].reason


@pytest.mark.parametrize("source", [[b"bytes"], [Image.new("RGB", (1, 1))], [None]])
def test_pictures_without_a_file_are_refused_as_a_source(source, store, model):
    with pytest.raises(IngestError, match="save the image first"):
        ingest(source, store, model)


def test_a_source_that_is_not_there_is_an_error(tmp_path, store, model):
    with pytest.raises(IngestError, match="there is no file or folder"):
        ingest(tmp_path / "nowhere", store, model)
    with pytest.raises(IngestError, match="batch_size 0"):
        ingest(tmp_path, store, model, batch_size=0)


def test_a_store_of_another_model_is_refused(folder, store):
    with pytest.raises(StoreMismatchError, match="opened for 'colours'"):
        ingest(folder, store, ColourEmbedding(model_name="other"))


# ------------------------------------------------------------------------------------------ sidecar


def test_sidecar_columns_are_stored_and_can_be_filtered(folder, store, model):
    sidecar = {"cars/fast/red.png": {"price": 9.5, "tags": ["a", "b"]}, "blue.jpg": {"price": 3}}
    ingest(folder, store, model, sidecar=sidecar)
    assert [one.metadata["file_name"] for one in store.get_nodes(filters=where("price", 5, ">"))] == ["red.png"]
    assert store.get_nodes(filters=where("tags", "b", "contains"))[0].metadata["tags"] == ["a", "b"]


def test_changed_columns_are_written_without_embedding_again(folder, store, model):
    ingest(folder, store, model, sidecar={"blue.jpg": {"price": 3}, "red.png": {"price": 1}})
    sidecar = {"blue.jpg": {"cost": 4}, "red.png": {"price": 1}}
    assert counts(ingest(folder, store, model, sidecar=sidecar)) == {"updated": 1, "unchanged": 2}
    assert model.embedded == 3
    stored = nodes(store)["blue.jpg"].metadata
    assert stored["cost"] == 4
    assert "price" not in stored
    assert store.get_nodes(filters=where("price", 3)) == [], "no stale column is left to filter by"
    assert store.query(query(model.get_text_embedding("blue"))).nodes[0].metadata["file_name"] == "blue.jpg"
    assert counts(ingest(folder, store, model, sidecar=sidecar)) == {"unchanged": 3}


# ------------------------------------------------------------------------------------------ report and progress


def test_the_report_is_written_as_json_whole_or_not_at_all(folder, tmp_path, store, model):
    hostile(folder)
    path = tmp_path / "reports" / "run.json"
    report = ingest(folder, store, model, report_path=path)
    content = json.loads(path.read_text())
    assert content["indexed"] == report.indexed
    assert content["skipped"][0] == {"path": report.skipped[0].path, "reason": report.skipped[0].reason}
    assert content["embedded"] == report.embedded
    assert [one.name for one in path.parent.iterdir()] == ["run.json"]
    assert str(report).startswith(f"{report.indexed} indexed")
    assert f"{len(report.skipped)} skipped" in str(report)


def test_progress_shows_rate_and_total(folder, store, model, capfd):
    ingest_images(folder, store, model)
    shown = capfd.readouterr().err
    assert "3/3" in shown
    assert "image" in shown
    assert "100%" in shown


# ------------------------------------------------------------------------------------------ overlap


def test_reading_goes_on_while_the_model_works(tmp_path, store, model, monkeypatch):
    """Our choice: while one batch is embedded, the next is read. By the clock, with a slow model and slow files."""
    from mm_retriever.ingest import pipeline

    for number in range(24):
        paint(tmp_path / f"{number:02d}.png", list(COLOURS)[number % 8])
    read = pipeline.read_image

    def slow_read(*arguments):
        time.sleep(0.02)
        return read(*arguments)

    class Slow(ColourEmbedding):
        def embed_images(self, images):
            time.sleep(0.15)
            return super().embed_images(images)

    monkeypatch.setattr(pipeline, "read_image", slow_read)
    monkeypatch.setattr("mm_retriever.ingest.reading.THREADS", 1)
    start = time.perf_counter()
    ingest(tmp_path, store, Slow(), batch_size=8)
    seconds = time.perf_counter() - start
    assert seconds < 0.85 * (24 * 0.02 + 3 * 0.15) + 0.25


def test_reports_of_nothing():
    report = IngestReport(indexed=0, replaced=0, updated=0, unchanged=0, removed=0, skipped=(), seconds=0.0)
    assert report.images_per_second == 0.0
    assert SimpleNamespace(**report.to_dict()).embedded == 0
