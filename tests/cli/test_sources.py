"""What `index` is given, looked at before a model is loaded."""

from __future__ import annotations

import json

import pytest

from mm_retriever.cli.indexing import named_parts
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
