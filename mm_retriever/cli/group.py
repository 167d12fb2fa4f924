"""The command line's one rule beside click's: what begins with no command is a search.

`mm-retriever "red dress"` is `mm-retriever search "red dress"`, and `mm-retriever -i shoe.jpg` is a search too. What
looks like a command with a slip of the finger, or like a file, is an error that says so, and is not searched for.
"""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from typer.core import TyperGroup

from mm_retriever.errors import QueryError, one_line

_CLOSE = 0.7
"""Of difflib's ratio: `serch`, `indx` and `serve-` are commands; `red` and `mug` are words."""


class SearchingGroup(TyperGroup):
    """A group whose default command is `search`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put `search` before arguments that begin with no command and no option of the group."""
        own = {option for parameter in self.get_params(ctx) for option in parameter.opts}
        if args and args[0] not in self.commands and args[0].partition("=")[0] not in own:
            if not ctx.resilient_parsing:  # completion
                refuse_slips(args[0], list(self.commands))
            args = ["search", *args]
        return super().parse_args(ctx, args)


def refuse_slips(word: str, commands: Sequence[str]) -> None:
    """Refuse to search for one bare word that is close to a command, or for the name of a file.

    Raises:
        QueryError: says what may be meant, and how to search for the word all the same.
    """
    if word.startswith("-") or any(map(str.isspace, word)):
        return
    given = repr(one_line(word, 200))
    if close := get_close_matches(word.lower(), commands, n=1, cutoff=_CLOSE):
        raise QueryError(
            f"there is no command {given}: did you mean {close[0]!r}? To search for the word: "
            f"mm-retriever search --text {given}"
        )
    try:
        exists = Path(word).expanduser().exists()
    except (OSError, RuntimeError, ValueError):  # no path at all
        return
    if exists:
        raise QueryError(
            f"{given} is a file or folder: `mm-retriever search --image` searches by it, `mm-retriever index` puts it "
            "into the store"
        )
