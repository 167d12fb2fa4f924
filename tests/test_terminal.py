"""What the command line prints: untrusted text does not command the terminal, become markup, or stop the command."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from pathlib import Path

import pytest
from llama_index.core.schema import NodeWithScore, TextNode

from mm_retriever.cli import main
from mm_retriever.ingest.report import IngestReport, SkippedImage
from mm_retriever.report import Hit, SearchReport
from mm_retriever.search_tools.rows import result_rows
from mm_retriever.terminal import print_facts, print_ingestion, print_json, print_search

COMMANDS = [
    "\x1b]52;c;ZXZpbA==\x07 writes the clipboard",
    "\x1b[2J\x1b[H clears the screen",
    "\x9b31m is red in one sign",
    "\x1b]8;;file:///etc/passwd\x1b\\a link\x1b]8;;\x1b\\",
    "\x1bP$q\x1b\\ asks the terminal to type an answer",
    "a\rb\x08\x7f overwrites",
    "photo\u202egpj.exe\u2066",
    "[red]bold[/nope] [link=file:///etc/passwd]here[/link]",
    "half a pair \ud800 and a byte that is no text \udcff",
    "line\nbreak\x85\u2028\x0b\x0c",
]
CONTROLS = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


@pytest.mark.parametrize("text", COMMANDS)
def test_no_text_commands_the_terminal(capfd: pytest.CaptureFixture[str], tried: Counter[str], text: str) -> None:
    """Truth: what reached the terminal, in every place where a file name, a label, a reason or a description stands."""
    hits = (Hit(1, text, 0.5, f"/{text}/{text}", None, text, text),)
    print_search(SearchReport(text, Path(f"/{text}"), hits, hits, text, text, text, (("wanted", text),)))
    print_ingestion(IngestReport(1, 0, 0, 0, 0, (SkippedImage(text, text),), 1.0))
    print_facts({text: text})
    node = NodeWithScore(node=TextNode(id_="a", text=text, metadata={"file_path": text}), score=0.5)
    print_json(result_rows([node]))
    tried["hostile texts shown"] += 4
    out, err = capfd.readouterr()
    assert not CONTROLS.search(out + err)
    assert "nope" not in text or out.count("[/nope]") > 3


@pytest.mark.parametrize("text", COMMANDS)
def test_json_keeps_what_a_terminal_would_not_take(capfd: pytest.CaptureFixture[str], text: str) -> None:
    """Truth: read back, it is what was given."""
    print_json({"path": text})
    out, _ = capfd.readouterr()
    assert json.loads(out) == {"path": text}
    assert not CONTROLS.search(out)


def test_files_with_any_name_are_indexed_and_listed(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, tried: Counter[str]
) -> None:
    """Truth: a file name is any bytes but two; a broken image is listed by its name."""
    folder = tmp_path / "images"
    folder.mkdir()
    names = [os.fsencode(text.replace("/", "_").replace("\ud800", "")) for text in COMMANDS]
    for name in names:
        Path(os.fsdecode(bytes(folder) + b"/" + name + b".png")).write_bytes(b"no picture")
    for extra in ([], ["--json"]):
        with pytest.raises(SystemExit) as stopped:
            main(["index", str(folder), "--db", str(tmp_path / "a.db"), "--model", "tiny", *extra])
        out, err = capfd.readouterr()
        assert not stopped.value.code
        assert not CONTROLS.search(out + err.replace("\r", ""))  # the bar of progress writes over itself
        tried["hostile texts shown"] += len(names)
    assert len(json.loads(out)["skipped"]) == len(names)


@pytest.mark.slow
def test_an_error_repeats_nothing_that_commands(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Truth: one line on stderr, in which the sign is spelled out."""
    for text in COMMANDS:
        with pytest.raises(SystemExit) as stopped:
            main(["search", "--db", str(tmp_path / "none.db"), "--where", text, "-t", "x"])
        assert stopped.value.code == 2
        with pytest.raises(SystemExit):
            main(
                ["index", f"{tmp_path}/{text}".replace("\ud800", ""), "--db", str(tmp_path / "a.db"), "--model", "tiny"]
            )
        weights = tmp_path / (text.replace("/", "_").replace("\ud800", "") + ".pth")
        weights.write_bytes(b"no weights")
        with pytest.raises(SystemExit) as stopped:
            main(["convert", str(weights), str(tmp_path / "out")])
        assert stopped.value.code == 2
        out, err = capfd.readouterr()
        assert not CONTROLS.search(out + err)
