"""`ingest_images` on real Milvus Lite, with the colour embedding of the tests as the model."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import threading
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from llama_index.core.schema import Document, ImageDocument, ImageNode, MediaResource, Node, TextNode
from PIL import Image

from mm_retriever.errors import IngestError, StoreMismatchError
from mm_retriever.images import ImagePolicy
from mm_retriever.ingest import IngestReport, ingest_images
from tests.support.colour_embedding import COLOURS, ColourEmbedder, ColourEmbedding, paint
from tests.support.ingesting import counts, ingest, nearest, nodes, where

# ------------------------------------------------------------------------------------------ a folder


def test_a_folder_is_stored_with_what_is_known_of_its_images(folder, store, model):
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


def test_what_was_stored_is_in_data_files_at_the_end(tmp_path, folder, store, model):
    """Milvus Lite compares rows in its memory one by one; a few of them are not worth a file of their own."""

    def data_files() -> int:
        return len(list(Path(store.uri).rglob("*data*.parquet")))

    ingest(folder, store, model)
    before = data_files()
    for number in range(200):
        paint(tmp_path / "many" / f"{number}.png", "red", size=(4 + number, 4))
    assert counts(ingest(tmp_path / "many", store, model)) == {"indexed": 200}
    assert data_files() > before
    assert store.count() == 203


def test_a_second_run_embeds_and_adds_nothing_whatever_the_folder_is_called(folder, store, model, monkeypatch):
    ingest(folder, store, model)
    first = nodes(store)
    monkeypatch.chdir(folder.parent)
    monkeypatch.setenv("HOME", str(folder.parent))
    (folder.parent / "link").symlink_to(folder)
    for name in (folder, "photos", "./photos/", "link", "~/photos", str(folder / "cars" / "..")):
        report = ingest(name, store, model)
        assert (counts(report), report.embedded) == ({"unchanged": 3}, 0)
    assert (model.embedded, nodes(store).keys()) == (3, first.keys())
    assert counts(ingest(["~/photos/cars/blue.jpg"], store, model)) == {"unchanged": 1}


def test_a_changed_image_is_replaced_and_a_touched_one_is_not_embedded(folder, store, model):
    ingest(folder, store, model)
    paint(folder / "green.JPEG", "yellow")
    os.utime(folder / "cars" / "blue.jpg", (1, 1))
    assert counts(ingest(folder, store, model)) == {"replaced": 1, "unchanged": 2}
    assert model.embedded == 4
    stored = nodes(store)
    assert len(stored) == 3
    assert stored["blue.jpg"].metadata["mtime_ns"] == 1_000_000_000
    assert stored["blue.jpg"].metadata["width"] == 24
    best = nearest(store, model.get_text_embedding("yellow"))
    assert best.metadata["file_name"] == "green.JPEG"
    blue = nearest(store, model.get_text_embedding("blue"))
    assert blue.metadata["file_name"] == "blue.jpg", "the touched one kept its vector"
    assert counts(ingest(folder, store, model)) == {"unchanged": 3}


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


# ------------------------------------------------------------------------------------------ bad images


def hostile(root: Path) -> dict[str, str]:
    """Write files that are no images, and return a part of the reason for each."""
    paint(root / "whole.png", "red")
    whole = (root / "whole.png").read_bytes()
    (root / "truncated.png").write_bytes(whole[: len(whole) // 2])
    (root / "empty.jpg").write_bytes(b"")
    (root / "text.jpg").write_text("not an image at all")
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


def test_bad_images_are_listed_with_reasons_and_do_not_stop_the_run(tmp_path, store, model):
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


def test_the_policy_holds_for_ingestion(folder, tmp_path, store, model):
    outside = paint(tmp_path / "outside.png", "red")
    report = ingest([outside, folder / "green.JPEG"], store, model, image_policy=ImagePolicy(roots=(folder,)))
    assert counts(report) == {"indexed": 1, "skipped": 1}
    assert "outside the folders" in report.skipped[0].reason
    report = ingest(["https://example.com/a.jpg"], store, model)
    assert counts(report) == {"skipped": 1}
    assert "allow_urls" in report.skipped[0].reason


class Moody(ColourEmbedding):
    """Fails for some colours."""

    def embed_images(self, images: Sequence[np.ndarray]) -> np.ndarray:
        red, _, blue = np.stack(images).max((1, 2)).T
        if (red > 180).any():
            raise RuntimeError("I do not like red")
        return super().embed_images(images) * np.where(blue > 180, np.nan, 1)[:, None]


def test_an_image_that_the_model_refuses_does_not_cost_its_batch(folder, store):
    report = ingest(folder, store, Moody())
    assert counts(report) == {"indexed": 1, "skipped": 2}
    reasons = {Path(one.path).name: one.reason for one in report.skipped}
    assert reasons["red.png"] == "the model failed: RuntimeError: I do not like red"
    assert reasons["blue.jpg"] == "the model gave NaN or infinity for it"
    assert set(nodes(store)) == {"green.JPEG"}


def test_a_model_that_never_works_ends_the_run(tmp_path, store):
    """Better than a list of all images."""
    for number in range(20):
        paint(tmp_path / "reds" / f"{number}.png", "red")
    with pytest.raises(RuntimeError, match="I do not like red"):
        ingest(tmp_path / "reds", store, Moody(), batch_size=4)


# ------------------------------------------------------------------------------------------ prune


def test_rows_of_removed_and_spoiled_files_stay_until_pruned(folder, store, model):
    """A spoiled file's row speaks of pixels that are no longer there."""
    ingest(folder, store, model)
    (folder / "green.JPEG").unlink()
    (folder / "cars" / "blue.jpg").write_bytes(b"spoiled")
    assert counts(ingest(folder, store, model)) == {"unchanged": 1, "skipped": 1}
    assert store.count() == 3
    assert counts(ingest(folder, store, model, prune=True)) == {"unchanged": 1, "skipped": 1, "removed": 2}
    assert set(nodes(store)) == {"red.png"}


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


def test_prune_of_an_empty_folder_or_of_no_folder_is_refused(folder, store, model):
    """More likely a drive that is not mounted than an album that was emptied."""
    ingest(folder, store, model)
    for source in ([folder / "green.JPEG"], folder / "green.JPEG"):
        with pytest.raises(IngestError, match="needs a folder"):
            ingest(source, store, model, prune=True)
    for path in (*folder.rglob("*.png"), *folder.rglob("*.jp*g"), *folder.rglob("*.JPEG")):
        path.unlink()
    with pytest.raises(IngestError, match="nothing was removed"):
        ingest(folder, store, model, prune=True)
    assert store.count() == 3


# ------------------------------------------------------------------------------------------ lists and documents


def test_a_list_a_generator_and_a_single_file(folder, store, model):
    green, red = folder / "green.JPEG", folder / "cars" / "fast" / "red.png"
    assert counts(ingest([green, str(red), green], store, model)) == {"indexed": 2}, "named twice, stored once"
    assert nodes(store)["red.png"].metadata["label"] == "fast"
    assert counts(ingest((path for path in (green, red)), store, model)) == {"unchanged": 2}
    assert counts(ingest(str(green), store, model)) == {"unchanged": 1}
    assert counts(ingest(folder, store, model)) == {"unchanged": 1, "updated": 1, "indexed": 1}
    assert nodes(store)["red.png"].metadata["label"] == "cars/fast", "seen from the folder it lies deeper"


def test_a_file_url_is_the_path_that_it_names(folder, store, model):
    green = folder / "green.JPEG"
    shutil.copy(green, folder / "a #1.jpg")
    assert counts(ingest(folder.as_uri(), store, model)) == {"indexed": 4}
    again = [(folder / "a #1.jpg").as_uri(), ImageNode(image_path=green.as_uri()), ImageNode(image_url=green.as_uri())]
    assert ingest(again, store, model).indexed == 0
    assert store.count() == 4
    assert "file: is read through a file system" in ingest(["file://host/a.png"], store, model).skipped[0].reason


def test_what_is_no_source_is_refused(folder, store, model, monkeypatch):
    """To Python an empty path is the working directory, which an unset variable must not index, let alone prune."""
    monkeypatch.chdir(folder)
    for nothing in ("", "  ", None, 5):
        with pytest.raises(IngestError, match=r"the source is .*: give a folder"):
            ingest(nothing, store, model)
    skipped = ingest(["", folder / "cars", "green.JPEG"], store, model).skipped
    assert [image.reason for image in skipped] == [
        "the path is empty",
        "a folder, not a file: give it as the source by itself",
    ]


def test_nodes_that_share_an_id_and_say_other_things_are_counted(folder, store, model):
    """One row each: an id that someone chose, or the same file or text under new ids."""
    green, red = str(folder / "green.JPEG"), str(folder / "cars" / "fast" / "red.png")
    remark = "1 nodes have the id of another one, or its text, and say other things: one is kept"
    for given in (
        [ImageNode(id_="sku", image_path=green), ImageNode(id_="sku", image_path=red)],
        [ImageNode(image_path=green, text="front"), ImageNode(image_path=green, text="back")],
        [TextNode(text="Confidential", metadata={"page": 1}), TextNode(text="Confidential", metadata={"page": 2})],
    ):
        store.clear()
        report = ingest(given, store, model)
        assert (store.count(), report.notes) == (1, (remark,)), given
    assert ingest([ImageNode(image_path=green), Path(green), ImageNode(image_path=green)], store, model).notes == ()


def test_a_generator_is_read_as_it_is_needed(tmp_path, store, model):
    """Our choice: a window of 256 is looked up at a time, and what came before is stored by then."""
    paint(tmp_path / "red.png", "red")

    def breaks_off():
        for number in range(300):
            (tmp_path / f"{number}.png").symlink_to("red.png")
            yield tmp_path / f"{number}.png"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ingest(breaks_off(), store, model, batch_size=4)
    assert 256 - 3 * 4 <= store.count() <= 256


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
    green = nearest(store, model.get_text_embedding("green"))
    assert green.image_path == path, "an image by its pixels, whatever its caption says"
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


def test_what_cannot_be_ingested_at_all_is_refused(folder, tmp_path, store, model):
    for source in ([b"bytes"], [Image.new("RGB", (1, 1))], [None]):
        with pytest.raises(IngestError, match="save the image first"):
            ingest(source, store, model)
    with pytest.raises(IngestError, match="there is no file or folder"):
        ingest(tmp_path / "nowhere", store, model)
    with pytest.raises(IngestError, match="batch_size 0"):
        ingest(tmp_path, store, model, batch_size=0)
    with pytest.raises(StoreMismatchError, match="opened for 'colours'"):
        ingest(folder, store, ColourEmbedding(model_name="other"))


# ------------------------------------------------------------------------------------------ sidecar


def test_sidecar_columns_are_stored_and_can_be_filtered(folder, store, model):
    sidecar = {"cars/fast/red.png": {"price": 9.5, "tags": ["a", "b"]}, "blue.jpg": {"price": 3}}
    ingest(folder, store, model, sidecar=sidecar)
    assert [node.metadata["file_name"] for node in store.get_nodes(filters=where("price", 5, ">"))] == ["red.png"]
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
    assert nearest(store, model.get_text_embedding("blue")).metadata["file_name"] == "blue.jpg"
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


@pytest.mark.parametrize(
    ("note", "exact_pixels", "seen"),
    [("float32", None, 640), ("float32", False, 80), ("int8 openvino", None, 80), ("int8 openvino", True, 640)],
)
def test_a_large_jpeg_is_decoded_at_a_part_of_its_size_only_where_pixels_need_not_be_exact(
    tmp_path, store, monkeypatch, note, exact_pixels, seen
):
    """Our choice: an eighth at most, never below twice what the model sees (16); the row has the file's own size."""
    sizes = []

    class Watching(ColourEmbedding):
        def prepare_image(self, image):
            sizes.append(image.width)
            return super().prepare_image(image)

    monkeypatch.setattr(ColourEmbedder, "note", note)
    paint(tmp_path / "large.jpg", "red", size=(640, 480))
    report = ingest_images(tmp_path, store, Watching(), exact_pixels=exact_pixels, show_progress=False)
    assert sizes[-1] == seen
    assert [node.metadata["width"] for node in nodes(store).values()] == [640]
    assert any("a part of their size" in note for note in report.notes) == (seen == 80)


def test_progress_shows_rate_and_total(folder, store, model, capfd):
    ingest_images(folder, store, model)
    shown = capfd.readouterr().err
    assert "3/3" in shown
    assert "image" in shown
    assert "100%" in shown


def test_reading_goes_on_while_the_model_works(tmp_path, store):
    """Our choice: while one batch is embedded, the next is read."""

    working, reading = threading.Event(), threading.Event()

    class Busy(ColourEmbedding):
        def prepare_image(self, image):
            if image.width >= 16:  # of the second batch
                assert working.wait(30)
                reading.set()
            return super().prepare_image(image)

        def embed_images(self, images):
            working.set()
            assert reading.wait(30)
            return super().embed_images(images)

    for number in range(12):
        paint(tmp_path / f"{number:02d}.png", list(COLOURS)[number % 8], size=(number + 8, 20))
    assert ingest(tmp_path, store, Busy(), batch_size=8).indexed == 12


def test_reports_of_nothing():
    report = IngestReport(indexed=0, replaced=0, updated=0, unchanged=0, removed=0, skipped=(), seconds=0.0)
    assert report.images_per_second == 0.0
    assert SimpleNamespace(**report.to_dict()).embedded == 0


# ------------------------------------------------------------------------------------------ watched and stopped


def draw(folder, first, end):
    """Images of different sizes, so that no two files are alike."""
    for number in range(first, end):
        paint(folder / f"{number:02}.png", list(COLOURS)[number % len(COLOURS)], size=(20 + number, 20))


def test_a_watcher_is_told_how_many_are_done_of_how_many(tmp_path, store, model):
    draw(tmp_path / "images", 0, 6)
    told = []
    report = ingest(tmp_path / "images", store, model, batch_size=2, progress=lambda *how: not told.append(how))
    assert counts(report) == {"indexed": 6}
    assert told == sorted(told)
    assert {total for _, total in told} == {6}
    assert told[-1][0] >= 4
    assert not report.notes


def test_a_run_that_is_stopped_says_so_removes_nothing_and_goes_on_later(tmp_path, store, model):
    draw(tmp_path / "images", 0, 12)
    ingest(tmp_path / "images", store, model)
    (tmp_path / "images" / "00.png").unlink()
    draw(tmp_path / "images", 12, 20)
    report = ingest_images(
        tmp_path / "images",
        store,
        model,
        batch_size=2,
        prune=True,
        show_progress=False,
        progress=lambda done, total: done < 13,
    )
    assert 2 <= report.indexed < 8
    assert report.removed == 0
    assert "stopped before its end" in report.notes[0]
    rest = ingest(tmp_path / "images", store, model, prune=True)
    assert (rest.indexed, rest.removed) == (8 - report.indexed, 1)
