"""`index`, `prune`, `remove` and `clear`: what they take, refuse before a model is loaded, and do to rows."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
from tqdm import tqdm

from mm_retriever.cli.indexing import named_parts
from mm_retriever.cli.options import KEPT
from mm_retriever.demo.catalogue import draw_product
from mm_retriever.errors import QueryError
from mm_retriever.images.header import FORMATS
from tests.support.command_line import run


def test_several_folders_and_images_are_one_run(capfd, images, tmp_path):
    mugs, umbrella, db = images / "mug", images / "umbrella" / "blue stars.jpg", tmp_path / "a.db"
    asked = ("index", mugs, umbrella, images / "phone case", "--db", db, "--json", "--report", tmp_path / "report.json")
    code, out, err = run(capfd, *asked, "--model", "tiny")
    assert (code, json.loads(out)["indexed"]) == (0, 7), err
    assert json.loads((tmp_path / "report.json").read_text())["indexed"] == 7
    code, out, _ = run(capfd, *asked)
    assert (code, json.loads(out)["unchanged"], json.loads(out)["updated"]) == (0, 7, 0)


@pytest.mark.parametrize(
    "given", [(".", "mug"), ("mug", "mug/blue stars.jpg"), ("mug", "mug"), ("mug", "./mug/../mug")]
)
def test_no_image_is_named_twice(images, given):
    """Its label is the folder that it is found in, and would change with every run."""
    with pytest.raises(QueryError, match=r"name it once|is named twice"):
        named_parts([images / one for one in given], prune=False)


def test_a_folder_without_images_says_what_it_holds(capfd, tmp_path):
    """The model does not exist, so none is loaded; and no store is made."""
    folder = tmp_path / "photos"
    folder.mkdir()
    asked = ("index", folder, "--db", tmp_path / "a.db", "--model", "no-such-model")
    code, _, err = run(capfd, *asked)
    assert (code, "there is no image in" in err, "it is empty" in err) == (2, True, True)
    (folder / "a.cr2").write_bytes(b"x")
    code, _, err = run(capfd, *asked)
    assert (code, "1 .cr2 (a camera's raw file: export it" in err) == (2, True), err
    assert not (tmp_path / "a.db").exists()


def test_a_file_that_is_no_image_is_refused_alone_and_reported_beside_one(capfd, images, tmp_path):
    """By its bytes, not its name. The model of the first does not exist, so none is loaded; and no store is made."""
    notes, image, db = tmp_path / "notes.txt", tmp_path / "photo", tmp_path / "a.db"
    notes.write_text("to do")
    image.write_bytes((images / "mug" / "blue stars.jpg").read_bytes())
    code, _, err = run(capfd, "index", notes, "--db", db, "--model", "no-such-model")
    assert (code, err.splitlines()) == (2, [f"mm-retriever: {str(notes)!r}: no image; there are {', '.join(FORMATS)}"])
    assert not db.exists()
    code, out, err = run(capfd, "index", notes, image, "--db", db, "--model", "tiny", "--json")
    told = json.loads(out)
    assert (code, told["indexed"], [one["path"] for one in told["skipped"]]) == (0, 1, [str(notes)]), err


def test_what_goes_only_with_folders_is_said(capfd, images, tmp_path):
    one, db = images / "mug" / "blue stars.jpg", tmp_path / "a.db"
    for arguments, says in (
        ((one, "--prune"), "--prune goes with folders"),
        ((images, "--force"), "--force goes with --prune"),
        ((images / "mug", one.parent.parent / "umbrella", "--sidecar", one), "--sidecar goes with one folder"),
        ((images, "--sidecar", tmp_path / "none.csv"), "there is no sidecar file"),
    ):
        code, _, err = run(capfd, "index", *arguments, "--db", db, "--model", "no-such-model")
        assert (code, says in err) == (2, True), err


def test_a_used_sidecar_is_not_listed_as_not_taken_and_an_item_without_column_is_said(capfd, images, tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "a.jpg").write_bytes((images / "mug" / "blue stars.jpg").read_bytes())
    (folder / "metadata.csv").write_text("file_name,price\na.jpg,5\n")
    (folder / "other.csv").write_text("x\n")
    index = ("index", folder, "--db", tmp_path / "a.db", "--model", "tiny", "--json")
    report = json.loads(run(capfd, *index)[1])
    assert [path for files in report["ignored"] for path in files["paths"]] == [str(folder / "other.csv")]
    report = json.loads(run(capfd, *index, "--no-sidecar", "--item", "sku")[1])
    assert report["unchanged"] == 1
    assert any("no column 'sku'" in note for note in report["notes"])
    assert sum(files["count"] for files in report["ignored"]) == 2


@pytest.mark.parametrize("given", ["", " "])
def test_an_empty_name_is_not_the_working_directory(capfd, images, monkeypatch, given):
    """As of an unset variable: `index "$PHOTOS"`."""
    monkeypatch.chdir(images)
    code, _, err = run(capfd, "index", given, "--db", "a.db", "--model", "no-such-model")
    assert (code, "names no folder and no image" in err) == (2, True), err


def test_a_second_index_embeds_nothing(capfd, images, db):
    """Our choice: run twice, embeds nothing, adds nothing."""
    code, out, _ = run(capfd, "index", images, "--db", db, "--model", "tiny", "--json")
    report = json.loads(out)
    assert code == 0
    assert (report["indexed"], report["unchanged"]) == (0, 9)


def test_a_run_that_is_interrupted_says_how_to_go_on(capfd, images, tmp_path, monkeypatch):
    """Ctrl-C after two images are stored: Python raises it in the main thread, wherever that is."""
    count, updates = tqdm.update, []

    def interrupted(bar: tqdm, number: float = 1) -> bool | None:
        updates.append(number)
        if len(updates) == 2:
            raise KeyboardInterrupt
        return count(bar, number)

    index = ("index", images, "--db", tmp_path / "a.db", "--model", "tiny", "--batch-size", 2)
    with monkeypatch.context() as patch:
        patch.setattr(tqdm, "update", interrupted)
        code, _, err = run(capfd, *index)
    assert code == 130, err
    assert "mm-retriever: stopped; what is done stays: run the same command again to go on" in err.splitlines()
    code, out, _ = run(capfd, *index, "--json")
    report = json.loads(out)
    assert (code, report["unchanged"] + report["indexed"]) == (0, 9)
    assert report["unchanged"] >= 2
    assert report["indexed"]


def test_columns_are_found_said_kept_and_dropped(capfd, tmp_path):
    """A Hugging Face folder: its metadata.jsonl is found; a column `rank` and the caption are in the results."""
    photos = tmp_path / "photos"
    photos.mkdir()
    draw_product("mug", "stars", "blue", seed=7, size=96).save(photos / "a.png")
    rows = [{"file_name": "A.png", "text": "a blue mug", "rank": 5}, {"file_name": "gone.png", "text": "x"}]
    (photos / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = ("--db", tmp_path / "a.db", "--model", "tiny")
    code, said, _ = run(capfd, "index", photos, *options)
    assert code == 0
    assert "1 sidecar rows unused" in said
    assert "note: columns are taken from 'metadata.jsonl', found in the folder" in said
    assert "1 of 2 rows match no image: 'gone.png'" in said
    for arguments, kept in (((), True), (("--no-sidecar",), True), (("--no-sidecar", "--drop-columns"), False)):
        assert run(capfd, "index", photos, *options, *arguments)[0] == 0
        row = json.loads(run(capfd, "search", *options, "-t", "a mug", "--json")[1])[0]
        assert row["rank"] == 1
        assert (row.get("text"), row.get("metadata")) == (("a blue mug", {"rank": 5}) if kept else (None, None))
    code, _, err = run(capfd, "index", photos, *options, "--sidecar", "x.csv", "--no-sidecar")
    assert (code, "exclude each other" in err) == (2, True)


LOOKS = [(kind, colour) for kind in ("mug", "umbrella", "phone case") for colour in ("red", "blue")]


def photos(folder: Path) -> Path:
    folder.mkdir()
    for number, (kind, colour) in enumerate(LOOKS):
        draw_product(kind, "plain", colour, seed=number, size=96).save(folder / f"{colour} {kind}.png")
    return folder


@pytest.mark.slow
def test_a_command_that_prunes_and_cannot_read_every_file_says_how_many_and_fails(capfd, tmp_path, monkeypatch):
    """A bad block: the files are there, their times are new, and nobody knows what is in them."""
    monkeypatch.chdir(tmp_path)
    index = ("index", "photos", "--db", "a.db", "--model", "tiny")
    folder = photos(tmp_path / "photos")
    assert run(capfd, *index)[0] == 0
    for path in folder.glob("red*"):
        os.utime(path, (1, 1))
    real = os.open

    def fails(path, *args, **kwargs):
        if "red" in str(path):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", fails)
    code, out, err = run(capfd, *index, "--prune")
    assert (code, err.splitlines()[-1]) == (1, f"mm-retriever: 3 rows were kept: {KEPT}")
    assert "3 kept that cannot be looked at or read, 3 skipped" in out
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert run(capfd, *index, "--prune")[0] == 0


@pytest.mark.slow
def test_a_folder_is_moved_pruned_and_removed_without_a_model(capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    index = ("--db", "a.db", "--model", "tiny")
    photos(tmp_path / "old")
    assert run(capfd, "index", "old", *index)[0] == 0
    (tmp_path / "old").rename(tmp_path / "new")
    code, out, _ = run(capfd, "index", "new", "--prune", "--json", *index)
    said = json.loads(out)
    assert (code, said["moved"], said["embedded"]) == (0, 6, 0)
    code, _, err = run(capfd, "index", "old", "--prune", *index)
    assert code == 2
    assert "there is no folder" in err
    code, out, err = run(capfd, "search", "-t", "a mug", "-k", "50", "--each-once", "--json", *index)
    assert len(json.loads(out)) == 6
    assert "6 of the 50 results that were asked for: the collection holds 6 rows, and --each-once" in err

    (tmp_path / "new").rename(tmp_path / "away")
    code, _, err = run(capfd, "prune", "new", "--db", "a.db")
    assert code == 2
    assert "6 of the 6 images stored" in err
    assert "--force" in err
    code, out, _ = run(capfd, "remove", "new/red mug.png", "--where", "file_name=blue mug.png", "--db", "a.db")
    assert (code, out) == (0, "2 rows removed, 4 left\n")
    code, out, _ = run(capfd, "prune", "new", "--db", "a.db")
    assert (code, out) == (0, "4 of 4 rows removed\n")
    assert run(capfd, "prune", "new", "--db", "a.db")[0] == 2

    assert run(capfd, "index", "away", *index)[0] == 0
    code, out, _ = run(capfd, "clear", "--db", "a.db", "--yes")
    assert (code, out) == (0, "6 rows removed\n")
