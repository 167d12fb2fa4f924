"""The command group: a mistake is one line that names it, words without a command are searched for, and help."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.main import get_command

from mm_retriever.cli import COMMANDS, app, command, refuse_slips
from mm_retriever.demo.catalogue import draw_product
from mm_retriever.errors import QueryError
from tests.support.command_line import run


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["search", "--model", "tiny"], "give words, --image, or both"),
        (["search", "-t", "x", "--model", "tiny", "--db", "missing.db"], "mm-retriever index FOLDER --db missing.db"),
        (["search", "-t", "x", "--top-k", "0"], "greater than or equal to 1"),
        (["search", "-t", "x", "--where", "label"], "is not key=value"),
        (["search", "-t", "x", "--where", "year>new"], "is not a number"),
        (["index", "no-such-folder", "--model", "tiny", "--db", "new.db"], "no-such-folder"),
        (["index", ".", "--model", "no-such-model", "--db", "new.db"], "no-such-model"),
        (["index", ".", "--db", "new.db"], "tiny"),
        (["demo", "archive.tar.gz"], "--amazon"),
        (["demo", "--amazon", "--photos", "."], "exclude each other"),
        (["demo", "--out", "a.png"], "--out 'a.png' is a file"),
        (["convert", "tiny", "a.png"], "OUT 'a.png' is a file"),
        (["index", "a.png", "--report", "."], "--report '.' is a folder"),
        (["index", "a.png", "--model", "tiny", "--revision", "x", "--db", "new.db"], "--revision x is of a hub"),
        (["index", "a.png", "--model", "weights.pth", "--db", "new.db"], "no file of tensors"),
        (["search", "-t", "x", "--rerank", "--rerank-url", "gpu:8000"], "--rerank-url 'gpu:8000': give the address"),
        (["serch"], "did you mean 'search'"),
    ],
)
def test_a_mistake_is_one_line_that_names_it(capfd, tmp_path, monkeypatch, arguments, says):
    """Our choice: errors are one line and exit code 2; a hub out of reach names a local path or `tiny`."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\nno image")
    (tmp_path / "weights.pth").write_bytes(b"no weights")
    code, _, err = run(capfd, *arguments)
    assert code == 2
    lines = [line for line in err.splitlines() if line.startswith("mm-retriever: ")]
    assert len(lines) == 1
    assert says in lines[0]
    assert "Traceback" not in err


RUN_EACH = """
import json, sys
from mm_retriever.cli import main
for arguments in json.loads(sys.argv[1]):
    try:
        main(arguments)
    except SystemExit as end:
        print(end.code)
    print("-----")
"""


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
@pytest.mark.slow
def test_a_terminal_of_few_letters_ends_no_command(encoding, db, tmp_path):
    """Truth: JSON reads back whole, and what cannot be shown is escaped, in results, tables and errors."""
    images, name = tmp_path / "\u7ea2", "\u676f\u5b50 \U0001f375.png"
    images.mkdir()
    draw_product("mug", "plain", "red", seed=1, size=64).save(images / name)
    one, sheet = str(tmp_path / "one.db"), str(tmp_path / "none.png")
    commands = [
        ["index", str(images), "--db", one],
        ["search", "-t", "\u7ea2\u8272\u7684\u676f\u5b50 \U0001f375", "--db", one],
        ["search", "-t", "\u676f", "--db", one, "--json"],
        ["search", "-t", "\u676f", "--db", str(tmp_path / "\u676f.db")],
        ["search", "-t", "a", "--db", str(db), "--min-score", "0.999", "--png", sheet],
    ]
    done = subprocess.run(
        [sys.executable, "-c", RUN_EACH, json.dumps([[*command, "--model", "tiny"] for command in commands])],
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": encoding, "COLUMNS": "200"},
        encoding=encoding,
    )
    assert "Traceback" not in done.stderr, done.stderr
    parts = done.stdout.split("-----\n")[:-1]
    assert [part.split("\n")[-2] for part in parts] == ["0", "0", "0", "2", "0"], done.stderr
    assert json.loads(parts[2].rpartition("\n0")[0])[0]["file_name"] == name
    assert Path(sheet).is_file()


@pytest.mark.parametrize("arguments", [("a red mug",), ("a", "red", "mug"), ("-t", "a red mug"), ("--text=a red mug",)])
def test_words_without_a_command_are_searched_for(capfd, db, arguments):
    code, out, err = run(capfd, *arguments, "--db", db, "-k", 1, "--json")
    assert code == 0, err
    assert json.loads(out) == json.loads(run(capfd, "search", "a red mug", "--db", db, "-k", 1, "--json")[1])


@pytest.mark.parametrize(
    ("word", "command"),
    [("serch", "search"), ("indx", "index"), ("Index", "index"), ("mode", "models"), ("inof", "info")],
)
def test_a_word_that_is_nearly_a_command_is_an_error_that_names_it(capfd, db, word, command):
    """Our choice: a search for `serch` would look like an answer."""
    code, out, err = run(capfd, word, "--db", db)
    assert (code, out) == (2, "")
    assert f"did you mean {command!r}? To search for the word: mm-retriever search --text {word!r}" in err


@pytest.mark.parametrize("word", ["mug", "red", "dress", "shoes", "research index", "-x", "--serch"])
def test_other_words_are_no_slips(word):
    refuse_slips(word, list(COMMANDS))


def test_a_file_is_not_searched_for_by_its_name(leopard):
    with pytest.raises(QueryError, match="search --image"):
        refuse_slips(str(leopard), list(COMMANDS))


def test_an_unknown_option_is_named(capfd):
    code, _, err = run(capfd, "--versoin")
    assert (code, "--versoin" in err) == (2, True)


@pytest.mark.parametrize("arguments", [("-h",), ("search", "-h"), ("index", "--help")])
def test_help_has_groups_and_examples(capfd, arguments):
    code, out, _ = run(capfd, *arguments)
    assert code == 0
    told = {"-h": "What is stored", "search": "Which results", "index": "A sidecar names an image in each row"}
    assert told[arguments[0]] in " ".join(out.split())
    assert "mm-retriever index" in out or "mm-retriever search" in out


def test_a_no_removes_nothing(capfd, db, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("n\n"))
    code, _, err = run(capfd, "clear", "--db", db)
    assert (code, err.splitlines()[-1]) == (130, "mm-retriever: stopped")
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    code, _, err = run(capfd, "clear", "--db", db)
    assert (code, "--yes does it without asking" in err) == (2, True)
    assert json.loads(run(capfd, "info", "--db", db, "--json")[1])["collections"]["mm_retriever"]["rows"] == 9


def test_the_list_of_commands_reads_the_options_of_none(capfd):
    """Truth: typer's own objects; reading 250 options takes longer than the rest of `--help`."""
    listed = get_command(app).commands
    assert {name: (one.help, len(one.params)) for name, one in listed.items()} == {
        name: (command(name).help, 0) for name in COMMANDS
    }
    assert all(command(name).params for name in COMMANDS)


def test_the_package_is_a_command():
    """`python -m mm_retriever`, where no script is on the PATH."""
    done = subprocess.run([sys.executable, "-m", "mm_retriever", "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    assert "search" in done.stdout


def test_what_is_not_there_is_refused_before_anything_is_made(capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for arguments in (["search", "-t", "mug"], ["prune", "x"], ["remove", "x"], ["clear", "-y"], ["info"], ["mcp"]):
        code, _, err = run(capfd, *arguments, "--db", "none.db")
        assert code == 2, arguments
        assert "there is no store 'none.db'" in err
    assert list(tmp_path.iterdir()) == []


def test_a_command_whose_output_is_closed_ends_as_any_other():
    """`>&-`, as some schedulers start programs."""
    command = [sys.executable, "-m", "mm_retriever", "info"]
    done = subprocess.run(["sh", "-c", 'exec "$@" >&-', "sh", *command], stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (0, "")
