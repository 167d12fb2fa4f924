"""The command line: ``mm-retriever index | search | prune | remove | clear | embed | import | ...``.

Without a command, the arguments are those of `search`: `mm-retriever "red dress"` is `mm-retriever search "red dress"`.
A mistyped command, or the name of a file, is an error, and is not searched for.

Commands live in modules by topic. Each imports its code inside the command, so that ``--help`` answers at once; output
is in `mm_retriever.terminal`. Errors of the package are one line on stderr and exit code 2.
"""

from __future__ import annotations

import atexit
import gc
import io
import logging
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from mm_retriever import __version__
from mm_retriever.cli import bulk, demo, evaluate, indexing, mcp, models, search, serve, train
from mm_retriever.cli.options import EXIT_INTERRUPTED, EXIT_USAGE, fail
from mm_retriever.cli.wording import in_cli_words
from mm_retriever.errors import MMRetrieverError, QueryError, one_line

__all__ = ["app", "command", "main"]

_CLOSE = 0.7
"""The difflib ratio from which a word counts as a mistyped command: `serch` and `indx`, but not `red` and `mug`."""


class SearchingGroup(TyperGroup):
    """A group whose default command is `search`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put `search` before arguments that begin with neither a command nor an option of the group."""
        own = {option for parameter in self.get_params(ctx) for option in parameter.opts}
        if args and args[0] not in self.commands and args[0].partition("=")[0] not in own:
            if not ctx.resilient_parsing:  # completion
                refuse_slips(args[0], list(self.commands))
            args = ["search", *args]
        return super().parse_args(ctx, args)


def refuse_slips(word: str, commands: Sequence[str]) -> None:
    """Refuse to search for one bare word that is close to a command, or for the name of a file.

    Raises:
        QueryError: names the likely command, and how to search for the word anyway.
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
    except (OSError, RuntimeError, ValueError):  # not a path
        return
    if exists:
        raise QueryError(
            f"{given} is a file or folder: `mm-retriever search --image` searches by it, `mm-retriever index` puts it "
            "into the store"
        )


class _Commands(SearchingGroup):
    """The commands; reads the options of the one that runs, because reading all of them takes a while."""

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        """The command that the arguments begin with, and the arguments after it."""
        name, titled, rest = super().resolve_command(ctx, args)
        return name, None if titled is None else command(str(titled.name)), rest


app = typer.Typer(
    cls=_Commands,
    help="Search images by text, by image, or by both at once.\n\nWhat begins with no command is a search: "
    '[bold]mm-retriever "red dress"[/bold].',
    epilog="[bold]mm-retriever index ~/Pictures[/bold]  puts a folder into photos.db\n\n"
    '[bold]mm-retriever "a red dress"[/bold]  searches photos.db\n\n'
    '[bold]mm-retriever "the same in red" -i shoe.jpg[/bold]  an image, and what should be different\n\n'
    "[bold]mm-retriever serve[/bold]  the same in a browser",
    rich_markup_mode="rich",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        typer.echo(f"mm-retriever {__version__}")
        raise typer.Exit


COMMANDS: dict[str, Callable[..., None]] = {
    "index": indexing.index,
    "search": search.search,
    "reindex": indexing.reindex,
    "prune": indexing.prune,
    "remove": indexing.remove,
    "clear": indexing.clear,
    "embed": bulk.embed,
    "import": bulk.import_,
    "evaluate": evaluate.evaluate,
    "models": models.models,
    "convert": models.convert,
    "train": train.train,
    "info": models.info,
    "demo": demo.demo,
    "serve": serve.serve,
    "mcp": mcp.mcp,
}
_GROUPS = {
    "Images": ("index", "search"),
    "What is stored": ("reindex", "prune", "remove", "clear", "info"),
    "Other surfaces": ("serve", "mcp"),
    "Models": ("models", "convert", "evaluate", "train"),
    "Millions of images": ("embed", "import"),
}
_EXAMPLES = {
    "index": indexing.EXAMPLES,
    "search": search.EXAMPLES,
}
_RARELY = (200_000, 20, 100)
"""Thresholds of the garbage collector: importing torch and LlamaIndex creates a million objects and hardly any garbage;
scanning them repeatedly takes a tenth of the time of a search."""
_WORKING = COMMANDS.keys() - {"search", "models"}
"""Commands that run long enough to make garbage; the others, a search without a command included, answer and end."""
_CONTINUED = ("index", "reindex", "embed", "import", "train")
for _name, _command in COMMANDS.items():
    _group = next((group for group, names in _GROUPS.items() if _name in names), None)
    app.command(_name, rich_help_panel=_group, help=_command.__doc__)(lambda: None)  # as `--help` lists it


def command(name: str) -> Any:
    """Return click's object of a command, with its options."""
    alone = typer.Typer(add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)
    alone.command(name, epilog=_EXAMPLES.get(name))(COMMANDS[name])
    return typer.main.get_command(alone)


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit: 0 done, 1 done in part, 2 an error that the user can fix, 130 interrupted."""
    if argv is not None:
        _run(list(argv))
    # a process of its own
    code: list[int] = []
    atexit.register(_end, code)  # first, and so called last
    if _WORKING.isdisjoint(sys.argv[1:2]):
        gc.disable()
    try:
        _run(sys.argv[1:])
    except SystemExit as end:
        if isinstance(end.code, int | None):
            code.append(end.code or 0)
        raise


def _end(code: Sequence[int]) -> None:
    """End the process after all other exit handlers.

    Python itself would then free a million objects, which takes half a second and longer. It still ends by itself after
    an unexpected exception, or if output cannot be written, because it reports these.
    """
    gc.freeze()  # otherwise Python scans all objects, several times
    logging.shutdown()
    with suppress(OSError, ValueError):
        for stream in filter(None, (sys.stdout, sys.stderr)):
            stream.flush()
        if code:
            os._exit(code[0])


def _run(arguments: list[str]) -> NoReturn:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    gc.set_threshold(*_RARELY)
    # closed streams, as of `>&-`, are None
    sys.stdout, sys.stderr = (stream or Path(os.devnull).open("w") for stream in (sys.stdout, sys.stderr))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # escape what the terminal's encoding cannot show
            stream.reconfigure(errors="backslashreplace")
    try:
        code = typer.main.get_command(app).main(arguments, "mm-retriever", standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        code = EXIT_INTERRUPTED
    except MMRetrieverError as error:
        fail(in_cli_words(error))
    except OSError as error:
        fail(f"{error.strerror or error}" + (f": {error.filename!r}" if error.filename else ""))
    except Exception as error:
        usage = getattr(error, "format_message", None)  # click's usage errors, whichever click typer brings
        if usage is None:
            raise
        command_path = getattr(getattr(error, "ctx", None), "command_path", "mm-retriever")
        usage_text = str(usage()).rstrip(".")
        if not usage_text:  # a call without arguments, which has printed the help
            sys.exit(EXIT_USAGE)
        fail(f"{usage_text}; `{command_path} --help` says what it takes")
    if code == EXIT_INTERRUPTED:  # set above, or by typer, which prints nothing
        goes_on = arguments[:1] and arguments[0] in _CONTINUED
        message = "stopped; what is done stays: run the same command again to go on" if goes_on else "stopped"
        fail(message, EXIT_INTERRUPTED)
    sys.exit(code if isinstance(code, int) else 0)
