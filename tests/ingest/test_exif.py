"""Date, camera and place of photographs, and where they are stored; the block is untrusted input."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, TiffImagePlugin

from mm_retriever.bulk import embed_to_shards
from mm_retriever.ingest.exif import exif_columns
from mm_retriever.ingest.sources import path_id
from tests.support.ingesting import counts, facts, ingest, node_of, where


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
    for metadata in (*contents.values(), *(node.metadata for node in stored.values())):
        metadata.pop("file_stamp", None)  # noted only of files that are older than two seconds
    assert contents == {id_: node.metadata for id_, node in stored.items()}
    assert {row["id"]: row["text"] for row in found} == {id_: node.text for id_, node in stored.items()}
    assert facts(store, folder / "a.jpg", "digest", "price", "taken") == {
        "digest": "x",
        "price": 1.5,
        "taken": TRUTH["taken"],
    }
    assert report.notes == ingested.notes
    assert report.unused_rows == ingested.unused_rows == 1
