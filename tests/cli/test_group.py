"""What begins with no command is a search; a slip of the finger is not."""

from __future__ import annotations

import io
import json
import sys

import pytest
from typer.main import get_command

from mm_retriever.cli import COMMANDS, app, command, refuse_slips
from mm_retriever.errors import QueryError
from tests.support.command_line import run


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
