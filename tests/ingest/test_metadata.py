"""What is stored beside an image: nothing of the caller's is lost or overwritten, and EXIF is read with care."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
from llama_index.core.schema import ImageNode, NodeWithScore, TextNode
from PIL import Image, TiffImagePlugin

from mm_retriever.bulk import embed_to_shards
from mm_retriever.ingest.exif import exif_columns
from mm_retriever.ingest.sources import path_id
from mm_retriever.own_keys import LAYERS_KEY, own_value
from mm_retriever.search_tools import ImageSearch
from mm_retriever.search_tools.results import SearchLimits, shown_metadata
from mm_retriever.store import open_store
from mm_retriever.terminal import result_rows
from tests.support.colour_embedding import paint
from tests.support.ingesting import counts, facts, ingest, node_of, where


@pytest.fixture
def folder(tmp_path) -> Path:
    root = tmp_path / "photos"
    paint(root / "cars" / "red.png", "red")
    paint(root / "blue.png", "blue")
    return root


# ------------------------------------------------------------------------------------------ absence is not deletion


def test_a_run_without_a_sidecar_keeps_columns_and_captions(folder, store, model):
    red = folder / "cars" / "red.png"
    ingest(folder, store, model, sidecar={"red.png": {"brand": "acme", "text": "a red car"}})
    assert counts(ingest(folder, store, model)) == {"unchanged": 2}
    assert counts(ingest([ImageNode(image_path=str(red))], store, model)) == {"unchanged": 1}
    assert (node_of(store, red).text, facts(store, red, "brand")) == ("a red car", {"brand": "acme"})
    assert len(store.get_nodes(filters=where("brand", "acme"))) == 1


@pytest.mark.parametrize("change", ["pixels", "time"])
def test_a_changed_file_keeps_its_columns(folder, store, model, change):
    red = folder / "cars" / "red.png"
    ingest(folder, store, model, sidecar={"red.png": {"brand": "acme", "text": "a car"}})
    if change == "pixels":
        paint(red, "yellow")
    else:
        os.utime(red, (1, 1))
    report = ingest(folder, store, model)
    assert counts(report) == ({"replaced": 1, "unchanged": 1} if change == "pixels" else {"unchanged": 2})
    assert (node_of(store, red).text, facts(store, red, "brand")) == ("a car", {"brand": "acme"})
    assert node_of(store, red).metadata["digest"] == hashlib.sha256(red.read_bytes()).hexdigest()
    assert counts(ingest(folder, store, model)) == {"unchanged": 2}


def test_columns_go_where_that_is_asked_for(folder, store, model):
    ingest(folder, store, model, sidecar={"red.png": {"brand": "acme"}, "blue.png": {"brand": "x", "caption": "c"}})
    report = ingest(folder, store, model, drop_columns=True, sidecar={"blue.png": {"brand": "y"}})
    assert counts(report) == {"updated": 2}
    assert facts(store, folder / "cars" / "red.png", "brand") == {}
    assert (node_of(store, folder / "blue.png").text, facts(store, folder / "blue.png", "brand")) == (
        "",
        {"brand": "y"},
    )
    assert report.notes == ("1 images no longer have the column 'brand': what this run says about them has none",)
    assert counts(ingest(folder, store, model, drop_columns=True, sidecar=False)) == {"updated": 1, "unchanged": 1}


def test_a_sidecar_replaces_what_a_sidecar_said_and_nothing_else(folder, store, model):
    """What it no longer says goes with a note, what a node or nobody else said stays, and so do other images'."""
    red, blue = folder / "cars" / "red.png", folder / "blue.png"
    ingest([ImageNode(image_path=str(red), text="mine", metadata={"album": 1})], store, model)
    ingest(folder, store, model, sidecar={"red.png": {"a": 1, "b": 2}, "blue.png": {"a": 3}})
    report = ingest(folder, store, model, sidecar={"red.png": {"a": 5}, "lost.png": {"a": 1}})
    assert counts(report) == {"updated": 1, "unchanged": 1}
    assert facts(store, red, "a", "b", "album") == {"a": 5, "album": 1}
    assert node_of(store, red).text == "mine"
    assert facts(store, blue, "a") == {"a": 3}
    assert report.unused_rows == 1
    assert "1 sidecar rows unused" in str(report)
    assert report.notes == (
        "sidecar: 1 of 2 rows match no image: 'lost.png'",
        "1 images no longer have the column 'b': what this run says about them has none",
        "1 images that the sidecar does not name keep the columns that they have",
    )
    assert ingest(folder, store, model, sidecar={"red.png": {"a": 5}}).updated == 0


def test_rows_of_earlier_versions_stay_as_they_are(folder, store, model, monkeypatch):
    """They say by one digest what they have, and not where it came from."""
    red = folder / "cars" / "red.png"
    ingest(folder, store, model)
    node = node_of(store, red)
    extra = {"brand": "acme", "year": 2020}
    digest = hashlib.sha256(json.dumps(["a car", extra], default=str, sort_keys=True).encode()).hexdigest()
    node.metadata |= extra | {"metadata_digest": digest}
    vector = store.columns([node.node_id], ["embedding"])[node.node_id]["embedding"]
    store.add([node.model_copy(update={"text": "a car", "embedding": list(map(float, vector))})])
    before = node_of(store, red).metadata
    assert counts(ingest(folder, store, model)) == {"unchanged": 2}
    assert counts(ingest(folder, store, model, sidecar={"red.png": {**extra, "text": "a car"}})) in (
        {"unchanged": 2},
        {"updated": 1, "unchanged": 1},
    )
    assert counts(ingest(folder, store, model)) == {"unchanged": 2}
    assert {key: facts(store, red, *before)[key] for key in extra} == extra
    os.utime(red, (1, 1))
    ingest(folder, store, model)
    assert (node_of(store, red).text, facts(store, red, *extra)) == ("a car", extra)
    assert model.embedded == 2, "nothing was embedded again"


# ------------------------------------------------------------------------------------------ our keys and the caller's


GIVEN = {
    "file_name": "catalogue.pdf",
    "file_path": "/docs/catalogue.pdf",
    "label": "mine",
    "width": "30 cm",
    "height": 12,
    "bytes": 7,
    "digest": "abc",
    "mtime_ns": "never",
    "metadata_digest": "x",
}


@pytest.mark.parametrize("way", ["node", "sidecar"])
def test_metadata_of_the_caller_win_over_ours(folder, store, model, way):
    """Ours are beside them, and do their work: nothing is embedded twice, changes are seen, what is gone is pruned."""
    red = folder / "cars" / "red.png"
    source = [ImageNode(image_path=str(red), metadata=GIVEN)] if way == "node" else folder
    options = {} if way == "node" else {"sidecar": {"cars/red.png": GIVEN}}
    ingest(source, store, model, **options)
    embedded = model.embedded
    assert ingest(source, store, model, **options).unchanged == embedded
    assert ingest(folder, store, model, **options).unchanged == embedded
    metadata = node_of(store, red).metadata
    assert {key: metadata.get(key) for key in GIVEN} == GIVEN
    assert own_value(metadata, "file_path") == str(red)
    assert (own_value(metadata, "width"), own_value(metadata, "height")) == (24, 18)
    assert own_value(metadata, "digest") == hashlib.sha256(red.read_bytes()).hexdigest()
    assert "mm_" not in node_of(store, red).get_metadata_str(mode="llm")
    os.utime(red, (1, 1))
    assert ingest(folder, store, model).replaced == 0
    paint(red, "green")
    assert ingest(folder, store, model).replaced == 1
    assert facts(store, red, *GIVEN) == GIVEN
    red.unlink()
    assert ingest(folder, store, model, prune=True).removed == 1


def test_a_text_may_have_a_digest_of_its_own(store, model):
    note = TextNode(id_="note", text="a red letter", metadata={"digest": "mine", "bytes": 3})
    assert ingest([note], store, model).indexed == 1
    assert counts(ingest([note], store, model)) == {"unchanged": 1}
    assert store.get_nodes(["note"])[0].metadata["digest"] == "mine"


def test_nodes_from_one_store_go_into_another(folder, store, model, tmp_path):
    """They bring our keys along. Nothing is refused, and names of our own accounts are left out with a word."""
    ingest(folder, store, model, sidecar={"red.png": {"brand": "acme"}})
    nodes = store.get_nodes([row["id"] for page in store.scan() for row in page])
    with open_store(tmp_path / "other.db", model) as other:
        report = ingest(nodes, other, model)
        assert counts(report) == {"indexed": 2}
        assert any(LAYERS_KEY in note for note in report.notes)
        assert counts(ingest(nodes, other, model)) == {"unchanged": 2}
        assert counts(ingest(folder, other, model)) in ({"unchanged": 2}, {"updated": 1, "unchanged": 1})
        red = node_of(other, folder / "cars" / "red.png").metadata
    assert (red["brand"], red["width"]) == ("acme", 24)


def test_the_label_does_not_depend_on_what_was_indexed_first(folder, store, model):
    """Truth: each order of the same sources ends with the same labels."""
    paint(folder / "cars" / "fast" / "green.png", "green")
    sources = [folder, folder / "cars", [folder / "blue.png", folder / "cars" / "fast" / "green.png"]]
    ends = []
    for order in itertools.permutations(sources):
        store.clear()
        for source in order:
            ingest(source, store, model)
        rows = [row for page in store.scan(["file_name", "label"]) for row in page]
        ends.append({row["file_name"]: row.get("label") for row in rows})
    assert all(end == ends[0] for end in ends)
    assert ends[0] == {"blue.png": "photos", "red.png": "cars", "green.png": "cars/fast"}


def test_a_label_of_the_callers_stays_in_every_order(folder, store, model):
    red = folder / "cars" / "red.png"
    for sources in ((folder / "cars", folder), (folder, folder / "cars")):
        store.clear()
        for source in sources:
            ingest(source, store, model, sidecar={"red.png": {"label": "vehicle"}})
        assert facts(store, red, "label") == {"label": "vehicle"}
        assert own_value(node_of(store, red).metadata, "label") == "cars"


# ------------------------------------------------------------------------------------------ results


def test_columns_in_json_results_are_never_overwritten():
    """The usual shape, and beside it what has a name of ours."""
    metadata = {"rank": 5, "score": "A", "id": 7, "text": "t", "metadata": "m", "brand": "acme", LAYERS_KEY: "{}"}
    rows = result_rows(
        [
            NodeWithScore(node=TextNode(id_="x", text="words", metadata=metadata), score=0.5),
            NodeWithScore(node=ImageNode(id_="y", image_path="/a.png", metadata={"brand": "b"}), score=0.25),
        ]
    )
    assert rows[0] == {
        "rank": 1,
        "id": "x",
        "score": 0.5,
        "text": "words",
        "brand": "acme",
        "metadata": {"rank": 5, "score": "A", "id": 7, "text": "t", "metadata": "m"},
    }
    assert rows[1] == {"rank": 2, "id": "y", "score": 0.25, "brand": "b"}


def test_tools_show_the_callers_columns_and_no_accounts_of_ours():
    metadata = {"digest": "mine", "mm_digest": "ours", "bytes": 7, "brand": "acme", LAYERS_KEY: "{}"}
    assert shown_metadata(metadata, SearchLimits(), without=frozenset()) == {"digest": "mine", "brand": "acme"}


def test_tools_say_how_many_columns_they_do_not_show(folder, store, model):
    ingest([folder / "blue.png"], store, model, sidecar={"blue.png": {f"c{n}": n for n in range(30)}})
    result = ImageSearch(store, model).search(text="blue").results[0]
    assert len(result.metadata) == SearchLimits().metadata
    assert result.note == "17 more metadata not shown"


# ------------------------------------------------------------------------------------------ EXIF


def photograph(path: Path, **changed: Any) -> Path:
    """A photograph of a phone, taken south of the equator and west of Greenwich."""
    exif = Image.Exif()
    exif[0x010F], exif[0x0110] = changed.get("make", "Apple"), changed.get("model", "iPhone 12")
    exif[0x0132] = "2025:01:01 00:00:00"
    details = exif.get_ifd(0x8769)
    details[0x9003] = changed.get("taken", "2024:01:31 12:30:05")
    place = exif.get_ifd(0x8825)
    rational = TiffImagePlugin.IFDRational
    place |= {
        1: "S",
        2: (rational(22), rational(30), rational(0)),
        3: "W",
        4: (rational(43), rational(15), rational(9)),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (24, 18), "red").save(path, exif=exif)
    return path


TRUTH = {"taken": "2024-01-31T12:30:05", "camera": "Apple iPhone 12", "latitude": -22.5, "longitude": -43.2525}


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_date_camera_and_place_are_read(tmp_path, suffix):
    """Truth: what Pillow was told to write."""
    assert exif_columns(photograph(tmp_path / f"a.{suffix}").read_bytes()) == TRUTH


def test_a_tiff_is_its_own_block(tmp_path):
    """Pillow writes the first directory only."""
    found = exif_columns(photograph(tmp_path / "a.tif").read_bytes())
    assert found == {"taken": "2025-01-01T00:00:00", "camera": "Apple iPhone 12"}


def test_what_cameras_write_without_a_clock_or_with_their_name_twice(tmp_path):
    data = photograph(
        tmp_path / "a.jpg", taken="0000:00:00 00:00:00", make="Canon", model="Canon EOS\x1b[31m 5D"
    ).read_bytes()
    found = exif_columns(data)
    assert (found["taken"], found["camera"]) == ("2025-01-01T00:00:00", "Canon EOS [31m 5D")


def test_hostile_exif_is_no_reason_for_anything(tmp_path):
    """Every byte of the block changed at random, cut off anywhere: no error, and nothing of any length."""
    data = photograph(tmp_path / "a.jpg").read_bytes()
    chance = random.Random(7)
    start = data.index(b"Exif")
    for _ in range(3000):
        changed = bytearray(data[: start + chance.randrange(8, 400)])
        for _ in range(chance.randrange(8)):
            changed[chance.randrange(start + 6, len(changed))] = chance.choice((0, 1, 255, chance.randrange(256)))
        assert len(json.dumps(exif_columns(bytes(changed)))) < 1000
    assert exif_columns(b"") == exif_columns(b"II*\0\xff\xff\xff\xff" * 1000) == {}


def test_exif_is_stored_unless_switched_off_and_a_sidecar_wins(tmp_path, store, model):
    path = photograph(tmp_path / "photos" / "a.jpg")
    photograph(tmp_path / "photos" / "b.jpg", model="iPhone 13")
    sidecar = {"a.jpg": {"camera": "a Leica"}}
    ingest(tmp_path / "photos", store, model, sidecar=sidecar)
    assert facts(store, path, *TRUTH) == {**TRUTH, "camera": "a Leica"}
    assert counts(ingest(tmp_path / "photos", store, model, exif=False)) == {"unchanged": 2}
    assert len(store.get_nodes(filters=where("taken", TRUTH["taken"]))) == 2
    photograph(path, taken="2023:05:06 07:08:09")
    ingest(tmp_path / "photos", store, model)
    assert facts(store, path, "taken", "camera") == {"taken": "2023-05-06T07:08:09", "camera": "a Leica"}
    store.clear()
    ingest(tmp_path / "photos", store, model, exif=False)
    assert facts(store, path, *TRUTH) == {}
    assert counts(ingest(tmp_path / "photos", store, model)) == {"unchanged": 2}, "not embedded again for that"


def test_shards_have_the_same_metadata(tmp_path, store, model):
    """EXIF, a caption, keys of ours, a sidecar that lies in the folder; truth: `ingest_images`."""
    import pyarrow.parquet

    folder = tmp_path / "photos"
    photograph(folder / "a.jpg")
    photograph(folder / "sub" / "b.jpg")
    (folder / "metadata.csv").write_text("File Name;Text;digest;price\nA.jpg;a red car;x;1,5\nnone.jpg;y;z;2,5\n")
    ingested = ingest(folder, store, model)
    report = embed_to_shards(folder, tmp_path / "out", model, show_progress=False)
    found = pyarrow.parquet.read_table(tmp_path / "out" / "shards" / "000000.parquet").to_pylist()
    contents = {row["id"]: json.loads(row["_node_content"])["metadata"] for row in found}
    stored = {path_id(str(path)): node_of(store, path) for path in folder.rglob("*.jpg")}
    assert contents == {id_: node.metadata for id_, node in stored.items()}
    assert {row["id"]: row["text"] for row in found} == {id_: node.text for id_, node in stored.items()}
    assert facts(store, folder / "a.jpg", "digest", "price", "taken") == {
        "digest": "x",
        "price": 1.5,
        "taken": TRUTH["taken"],
    }
    assert report.notes == ingested.notes
    assert report.unused_rows == ingested.unused_rows == 1
