"""A command that names no model takes the one whose vectors the collection holds."""

from __future__ import annotations

import json
import subprocess
import sys

from tests.support.command_line import run
from tests.support.drawn_store import draw_images


def test_search_and_index_take_the_model_of_the_collection(tmp_path, capfd):
    """Nothing is asked and nothing is downloaded: the default model is not on this machine."""
    db, images = tmp_path / "a.db", draw_images(tmp_path / "images")
    assert run(capfd, "index", images, "--db", db, "--model", "tiny")[0] == 0
    code, out, _ = run(capfd, "search", "--text", "a mug", "--db", db, "--json", "-k", 1)
    assert code == 0
    assert json.loads(out)[0]["label"] == "mug"
    code, out, _ = run(capfd, "index", images, "--db", db, "--json")
    assert (code, json.loads(out)["unchanged"]) == (0, 12)


def test_a_model_that_is_named_wins_and_is_checked(tmp_path, capfd):
    db = tmp_path / "a.db"
    run(capfd, "index", draw_images(tmp_path / "images"), "--db", db, "--model", "tiny")
    code, _, err = run(capfd, "search", "--text", "a mug", "--db", db, "--model", tmp_path / "none")
    assert code == 2
    assert "none" in err


def test_a_folder_that_is_elsewhere_now_is_asked_for(tmp_path, capfd, monkeypatch):
    """A collection keeps the name of a folder, not its place."""
    from mm_retriever.embedders.registry import convert_model

    folder, db = tmp_path / "models" / "ours", tmp_path / "a.db"
    convert_model("tiny", folder)
    run(capfd, "index", draw_images(tmp_path / "images"), "--db", db, "--model", folder)
    code, _, err = run(capfd, "search", "--text", "a mug", "--db", db)
    assert code == 2
    assert "holds vectors of the model 'ours, float32'" in err
    assert "give --model" in err
    monkeypatch.chdir(folder.parent)
    assert run(capfd, "search", "--text", "a mug", "--db", db)[0] == 0


def test_the_package_is_a_command():
    """`python -m mm_retriever`, where no script is on the PATH."""
    done = subprocess.run([sys.executable, "-m", "mm_retriever", "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    assert "search" in done.stdout
