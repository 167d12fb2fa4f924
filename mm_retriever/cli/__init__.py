"""The command line: ``mm-retriever index | search | prune | remove | clear | embed | import | ...``.

Commands live in modules by topic. Each imports the work that it calls inside the command, so that ``--help`` answers at
once; what a command shows is `mm_retriever.terminal`'s. Errors of the package are one line on stderr and exit code 2.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Sequence
from typing import Annotated, NoReturn

import typer

from mm_retriever import __version__
from mm_retriever.cli import bulk, demo, indexing, mcp, models, search, serve
from mm_retriever.cli.options import EXIT_INTERRUPTED, fail
from mm_retriever.errors import MMRetrieverError

__all__ = ["app", "main"]

app = typer.Typer(
    help="Search images by text, by image, or by both at once.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
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
    "models": models.models,
    "convert": models.convert,
    "info": models.info,
    "demo": demo.demo,
    "serve": serve.serve,
    "mcp": mcp.mcp,
}
for _name, _command in COMMANDS.items():
    app.command(_name)(_command)


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit: 0 done, 1 done in part, 2 an error that the user can fix, 130 interrupted."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # escape what the terminal's encoding cannot show
            stream.reconfigure(errors="backslashreplace")
    try:
        code = typer.main.get_command(app).main(
            list(sys.argv[1:] if argv is None else argv), "mm-retriever", standalone_mode=False
        )
    except (KeyboardInterrupt, typer.Abort):
        fail("stopped; run the same command again to go on", EXIT_INTERRUPTED)
    except MMRetrieverError as error:
        fail(str(error))
    except OSError as error:
        fail(f"{error.strerror or error}" + (f": {error.filename!r}" if error.filename else ""))
    except Exception as error:
        usage = getattr(error, "format_message", None)  # click's usage errors, whichever click typer brings
        if usage is None:
            raise
        fail(str(usage()))
    sys.exit(code if isinstance(code, int) else 0)
