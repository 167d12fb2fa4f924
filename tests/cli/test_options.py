"""Options of several commands: paths, and the model of the collection where none is named."""

from __future__ import annotations

import json
from types import SimpleNamespace

from PIL import Image

from mm_retriever.cli.options import REAL_MODEL
from mm_retriever.embedding import DEFAULT_MODEL
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


def test_a_tilde_is_the_home_folder_in_every_path(capfd, db, leopard, tmp_path, monkeypatch):
    """A shell replaces it; clients that start commands from JSON do not."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.db").symlink_to(db)
    (tmp_path / "leopard.png").symlink_to(leopard)
    use = ("--db", "~/a.db", "--model", "tiny")
    code, out, err = run(capfd, "search", *use, "-i", "~/leopard.png", "-k", 1, "--json", "--png", "~/sheet.png")
    assert code == 0, err
    assert len(json.loads(out)) == 1
    assert (tmp_path / "sheet.png").exists()
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").symlink_to(leopard)
    code, out, err = run(capfd, "index", "~/images", "--db", "~/b.db", "--model", "tiny", "--report", "~/report.json")
    assert code == 0, err
    assert (tmp_path / "b.db").is_dir()
    assert (tmp_path / "report.json").exists()
    code, _, err = run(capfd, "info", "--db", "~no-such-user/a.db")
    assert (code, err.count("\n")) == (2, 1)


def test_the_default_model_is_the_librarys():
    """The command line has its own copy of the name: its help loads no torch."""
    assert REAL_MODEL == DEFAULT_MODEL


def test_a_single_image_is_indexed_without_calibrating_on_it(tmp_path, monkeypatch):
    """The truth is the way of every command that gives no folder: the drawn catalogue."""
    from mm_retriever import embedding
    from mm_retriever.cli import options

    given = []

    def made(*_, **settings):
        given.append(settings["calibration"])
        return SimpleNamespace(embedder=None)

    monkeypatch.setattr(embedding, "ComposedEmbedding", made)
    image = tmp_path / "one.png"
    Image.new("RGB", (8, 8)).save(image)
    for source in (image, tmp_path, None):
        options.embed_model("tiny", device=None, dtype="int8", backend="openvino", calibration=source)
    assert given == [None, tmp_path, None]
