"""Rows on the command line: moved folders, what is gone, what is removed; exit codes say what was not done."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from mm_retriever.cli import main
from mm_retriever.cli.options import KEPT
from mm_retriever.demo.catalogue import draw_product

LOOKS = [(kind, colour) for kind in ("mug", "umbrella", "phone case") for colour in ("red", "blue")]


@pytest.fixture
def run(capfd, tmp_path, monkeypatch):
    """The exit code and what was printed."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stopped:
            main([str(one) for one in arguments])
        out, err = capfd.readouterr()
        return int(stopped.value.code or 0), out, err

    return run


def photos(folder: Path) -> Path:
    folder.mkdir()
    for number, (kind, colour) in enumerate(LOOKS):
        draw_product(kind, "plain", colour, seed=number, size=96).save(folder / f"{colour} {kind}.png")
    return folder


@pytest.mark.slow
def test_a_command_that_prunes_and_cannot_read_every_file_says_how_many_and_fails(run, tmp_path, monkeypatch):
    """A bad block: the files are there, their times are new, and nobody knows what is in them."""
    index = ("index", "photos", "--db", "a.db", "--model", "tiny")
    folder = photos(tmp_path / "photos")
    assert run(*index)[0] == 0
    for path in folder.glob("red*"):
        os.utime(path, (1, 1))
    real = os.open

    def fails(path, *args, **kwargs):
        if "red" in str(path):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", fails)
    code, out, err = run(*index, "--prune")
    assert (code, err.splitlines()[-1]) == (1, f"mm-retriever: 3 rows were kept: {KEPT}")
    assert "3 kept that cannot be looked at or read, 3 skipped" in out
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert run(*index, "--prune")[0] == 0


@pytest.mark.slow
def test_a_folder_is_moved_pruned_and_removed_without_a_model(run, tmp_path):
    index = ("--db", "a.db", "--model", "tiny")
    photos(tmp_path / "old")
    assert run("index", "old", *index)[0] == 0
    (tmp_path / "old").rename(tmp_path / "new")
    code, out, _ = run("index", "new", "--prune", "--json", *index)
    said = json.loads(out)
    assert (code, said["moved"], said["embedded"]) == (0, 6, 0)
    code, _, err = run("index", "old", "--prune", *index)
    assert code == 2
    assert "there is no folder" in err
    code, out, err = run("search", "-t", "a mug", "-k", "50", "--each-once", "--json", *index)
    assert len(json.loads(out)) == 6
    assert "6 of the 50 results that were asked for: the collection holds 6 rows, and --each-once" in err

    (tmp_path / "new").rename(tmp_path / "away")
    code, _, err = run("prune", "new", "--db", "a.db")
    assert code == 2
    assert "6 of the 6 images stored" in err
    assert "--force" in err
    code, out, _ = run("remove", "new/red mug.png", "--where", "file_name=blue mug.png", "--db", "a.db")
    assert (code, out) == (0, "2 rows removed, 4 left\n")
    code, out, _ = run("prune", "new", "--db", "a.db")
    assert (code, out) == (0, "4 of 4 rows removed\n")
    assert run("prune", "new", "--db", "a.db")[0] == 2

    assert run("index", "away", *index)[0] == 0
    code, out, _ = run("clear", "--db", "a.db", "--yes")
    assert (code, out) == (0, "6 rows removed\n")


def test_what_is_not_there_is_refused_before_anything_is_made(run, tmp_path):
    for command in (["search", "-t", "mug"], ["prune", "x"], ["remove", "x"], ["clear", "-y"], ["info"], ["mcp"]):
        code, _, err = run(*command, "--db", "none.db")
        assert code == 2, command
        assert "there is no store 'none.db'" in err
    assert list(tmp_path.iterdir()) == []
