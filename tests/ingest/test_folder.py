"""What a folder holds beside images is counted and said; what is an image under another name is taken."""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path

import pytest

from mm_retriever.images import load_image
from mm_retriever.ingest import IngestReport
from mm_retriever.ingest.folder import walk
from mm_retriever.terminal import print_ingestion
from tests.support.colour_embedding import paint
from tests.support.ingesting import counts, ingest, nodes


def ignored(report: IngestReport) -> dict[str, int]:
    return {files.kind: files.count for files in report.ignored}


def write(path: Path, data: bytes = b"no image") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def test_every_file_that_is_not_taken_is_counted_by_type_with_what_to_do(folder, store, model, capsys):
    for name in ("a.CR2", "b.cr2", "c.nef", "d.pdf", "e.mov", "f.zip", "g.jp2", "h.xyz", "i", "cars/j.mp4"):
        write(folder / name)
    report = ingest(folder, store, model)
    assert counts(report) == {"indexed": 3}
    assert ignored(report) == {
        ".cr2": 2, "hidden": 2, ".nef": 1, ".pdf": 1, ".mov": 1, ".mp4": 1, ".zip": 1, ".jp2": 1, ".xyz": 1,
        "no suffix": 1, ".txt": 1,
    }  # fmt: skip
    raw = next(files for files in report.ignored if files.kind == ".cr2")
    assert raw.reason == "a camera's raw file: export it as JPEG, TIFF or HEIC"
    assert raw.paths == (str(folder / "a.CR2"), str(folder / "b.cr2"))
    assert str(report).startswith("3 indexed, 13 ignored in ")
    assert report.to_dict()["ignored"][0]["count"] == 2
    print_ingestion(report)
    shown = capsys.readouterr().out
    assert "2 .cr2     a camera's raw file: export it as JPEG, TIFF or HEIC" in shown
    assert "1 of 1 more types" in shown


@pytest.mark.parametrize("name", ["photo.jpg_large", "photo.jpeg!d", "photo", "photo.com_files", "photo.1"])
def test_an_image_under_a_suffix_that_says_nothing_is_taken(tmp_path, store, model, name):
    """Our choice; names that browsers and shops give. Files of well-known other types are not even opened."""
    data = paint(tmp_path / "made.png", "red").read_bytes()
    write(tmp_path / "photos" / name, data)
    write(tmp_path / "photos" / "notes.txt", data)
    report = ingest(tmp_path / "photos", store, model)
    assert counts(report) == {"indexed": 1}
    assert ignored(report) == {".txt": 1}


def test_a_pipe_and_an_unreadable_file_are_counted_and_do_not_hold_the_walk_up(tmp_path, store, model):
    paint(tmp_path / "red.png", "red")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    report = ingest(tmp_path, store, model)
    assert {(files.kind, files.reason) for files in report.ignored} == {
        ("device, pipe or socket", "not a file"),
        ("no suffix", "cannot be read: no such file or directory"),
    }


# ------------------------------------------------------------------------------------------ links to folders


def test_a_linked_folder_is_followed_under_its_own_name(tmp_path, store, model):
    """NAS mounts and albums."""
    paint(tmp_path / "nas" / "deep" / "red.png", "red")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "2024").symlink_to(tmp_path / "nas")
    report = ingest(tmp_path / "photos", store, model)
    assert counts(report) == {"indexed": 1}
    stored = nodes(store)["red.png"].metadata
    assert stored["file_path"] == str(tmp_path / "photos" / "2024" / "deep" / "red.png")
    assert stored["label"] == "2024/deep"


def test_loops_and_second_names_are_walked_once_and_listed(tmp_path):
    """What lies in the folder itself comes first, so that a new link changes no path; then links, by name."""
    photos, nas = tmp_path / "photos", tmp_path / "nas"
    for path in (photos / "z" / "a.png", nas / "inner" / "b.png", tmp_path / "other.png"):
        paint(path, "red")
    links = {
        "a-to-z": photos / "z",
        "nas": nas,
        "nas-inner": nas / "inner",
        "self": photos,
        "up": tmp_path,
        "root": Path("/"),
    }
    for name, target in links.items():
        (photos / name).symlink_to(target)
    (nas / "back").symlink_to(photos)
    (nas / "inner" / "again").symlink_to(nas)
    listed: list[tuple[str, str]] = []
    found = list(walk(str(photos), lambda *_: pytest.fail("nothing is skipped"), lambda *one: listed.append(one)))
    assert found == [str(photos / "z" / "a.png"), str(photos / "nas" / "inner" / "b.png")]
    again, above = "walked already, under another name", "a link to a folder that contains this one"
    assert {(os.path.relpath(path, photos), reason) for _, reason, path in listed} == {
        ("a-to-z", again),
        ("nas/back", again),
        ("nas/inner/again", again),
        ("nas-inner", again),
        ("self", again),
        ("up", above),
        ("root", above),
    }


def test_a_part_that_is_linked_before_the_whole_is_not_walked_twice(tmp_path):
    photos, nas = tmp_path / "photos", tmp_path / "nas"
    for path in (nas / "inner" / "b.png", nas / "c.png"):
        paint(path, "red")
    photos.mkdir()
    (photos / "1").symlink_to(nas / "inner")
    (photos / "2").symlink_to(nas)
    listed: list[str] = []
    found = list(walk(str(photos), lambda *_: None, lambda *one: listed.append(one[2])))
    assert [os.path.relpath(path, photos) for path in found] == ["1/b.png", "2/c.png"]
    assert listed == [str(photos / "2" / "inner")]


# ------------------------------------------------------------------------------------------ names


@pytest.mark.parametrize("forms", [("NFC", "NFD"), ("NFD", "NFC")])
def test_a_folder_is_found_by_its_name_in_either_form_of_unicode(tmp_path, store, model, forms):
    """macOS writes letters and accents apart; who types the name writes them together."""
    on_disk, typed = (unicodedata.normalize(form, "Café") for form in forms)
    paint(tmp_path / on_disk / "red.png", "red")
    assert counts(ingest(tmp_path / typed, store, model)) == {"indexed": 1}


def test_heic_is_taken_from_a_folder(tmp_path, store, model):
    """By its suffix in any case, through the same reader as everything else."""
    heif = pytest.importorskip("pillow_heif")
    heif.from_pillow(load_image(paint(tmp_path / "red.png", "red"))).save(tmp_path / "p.heic")
    (tmp_path / "photos").mkdir()
    (tmp_path / "p.heic").rename(tmp_path / "photos" / "IMG_1.HEIC")
    assert counts(ingest(tmp_path / "photos", store, model)) == {"indexed": 1}
    assert nodes(store)["IMG_1.HEIC"].metadata["width"] == 24
