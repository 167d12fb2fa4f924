"""The code blocks of README and documentation, run as a reader runs them.

A page's blocks run in order, in one namespace and one folder, where the catalogue that `mm-retriever demo` draws lies
in `demo/` (a smaller one). Blocks of `python` and `bash` run; a block after ``<!-- not run: REASON -->`` is only
checked: its commands must exist with these options.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mm_retriever.cli import COMMANDS, command, main

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
SHOWN = ("text", "diff", "json", "yaml", "nginx")  # what a reader only looks at
_FENCE = re.compile(r"(?:<!-- not run: ([^\n]+) -->\n+)?^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A block of code of a page."""

    page: Path
    line: int
    language: str
    code: str
    not_run: str  # why; "" if it runs


def blocks(page: Path) -> list[Block]:
    """The blocks of a page in its order."""
    text = page.read_text(encoding="utf-8")
    return [
        Block(page, text.count("\n", 0, found.start(3)) + 1, found[2], found[3], found[1] or "")
        for found in _FENCE.finditer(text)
    ]


def run(page: Path) -> None:
    """Run the blocks of a page in the current folder."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks(page):
        if block.language == "bash":
            for words in commands(block.code):
                check(words) if block.not_run else execute(words)
        elif block.language == "python":
            filler = "\n" * (block.line - 1)  # so that a traceback has the line of the page
            code = compile(filler + block.code, str(page), "exec")
            if not block.not_run:
                exec(code, namespace)
        else:
            assert block.language in SHOWN, f"{page}:{block.line}: a block of {block.language!r} is not tested"


def commands(code: str) -> Iterator[list[str]]:
    """The commands of a block of shell, as words."""
    for line in code.replace("\\\n", " ").splitlines():
        if words := shlex.split(line, comments=True):
            yield words


def execute(words: Sequence[str]) -> None:
    """Run a command; what installs something, or would take minutes, is checked only."""
    if words[0] != "mm-retriever":
        if not check(words):
            subprocess.run(list(words), check=True, capture_output=True, timeout=60)
    elif words[1] != "demo" or "--help" in words:
        try:
            main(list(words[1:]))
        except SystemExit as ended:
            assert not ended.code, f"{shlex.join(words)} ended with {ended.code}"


def check(words: Sequence[str]) -> bool:
    """Hold a command against what there is; whether it is of a kind that can be checked."""
    if words[0] == "mm-retriever" and words[1] != "--version":
        name, given = (words[1], words[2:]) if words[1] in COMMANDS else ("search", words[1:])
        with command(name).make_context(name, list(given)):
            return True
    if words[0] == "mm-retriever":
        return True
    if words[0] == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        assert set(words[1:]) <= set(targets), words
        return True
    if words[0] == "python" and words[1].endswith(".py"):
        assert (ROOT / words[1]).is_file(), words
        text = (ROOT / words[1]).read_text(encoding="utf-8")
        assert all(word in text for word in words[2:] if word.startswith("--")), words
        return True
    if "pip" in words[:3] and "install" in words:
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"][
            "optional-dependencies"
        ]
        named = re.findall(r"\[([\w,-]+)\]", " ".join(words))
        assert {extra for names in named for extra in names.split(",")} <= set(extras), words
        return True
    return False
