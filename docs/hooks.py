"""Pages that are written from the code when the site is built: command line, environment variables, models."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_type_hints

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that the code says."""
    for path, content in generated().items():
        files.append(File.generated(config, path, content=content))
    return files


def generated() -> dict[str, str]:
    """Return the generated pages by their path below docs/."""
    return {
        "reference/command-line.md": command_line(),
        "reference/environment.md": environment(),
        "reference/models.md": models(),
    }


def command_line() -> str:
    """Return every command with its arguments and options, as `--help` has them."""
    from mm_retriever.cli import COMMANDS

    pages = [
        "# Command line\n\nEvery command answers `--help`. Exit codes: 0 done; 1 done in part; 2 an error that you can "
        "repair, in one line; 130 interrupted. `mm-retriever --install-completion` completes commands, options and "
        "names of models in your shell."
    ]
    for name, command in commands():
        kinds = get_type_hints(COMMANDS[name])
        rows = [_row(option, _kind(kinds[option.name])) for option in command.params if option.name != "help"]
        table = "\n".join(["| | value | what it does |", "| --- | --- | --- |", *rows]) if rows else "No options."
        pages.append(f"## mm-retriever {name}\n\n{_cell(command.help)}\n\n{table}")
    return "\n\n".join(pages) + "\n"


def commands() -> Iterator[tuple[str, Any]]:
    """Yield the commands of the command line by name, as click has them."""
    from mm_retriever.cli import COMMANDS, command

    for name in COMMANDS:
        yield name, command(name)


def _row(parameter: Any, kind: str) -> str:
    names = [*parameter.opts, *parameter.secondary_opts]
    if parameter.param_type_name == "argument":
        names = [parameter.name.upper()]
    notes = []
    if parameter.required:
        notes.append("required")
    elif parameter.default not in (None, False, (), []) and not callable(parameter.default):
        notes.append(f"default `{parameter.default}`")
    if parameter.envvar:
        notes.append(f"[`{parameter.envvar}`](environment.md)")
    words = _cell(getattr(parameter, "help", "") or "")
    return f"| {', '.join(f'`{name}`' for name in names)} | {kind} | {words}{_in_brackets(notes)} |"


def _kind(hint: Any) -> str:
    """Return what is typed after an option, "" for one that stands alone."""
    if hint in _KINDS:
        return _KINDS[hint]
    kinds = {_kind(part) for part in get_args(hint) if part is not NoneType}
    return kinds.pop() if len(kinds) == 1 else "one of a few words"


def _in_brackets(notes: list[str]) -> str:
    return f" ({'; '.join(notes)})" if notes else ""


def _cell(text: str) -> str:
    return re.sub(r"([|<>*_\[\]])", r"\\\1", " ".join((text or "").split()))


_KINDS = {bool: "", float: "number", int: "number", str: "text", Path: "path"}

OWN_VARIABLES = {
    "COLUMNS": "Width at which tables are folded; where it is not set, only a terminal folds them.",
    "GOMP_SPINCOUNT": "On Linux, how long torch's threads wait for each other before they sleep; `10000` where neither "
    "it nor `OMP_WAIT_POLICY` is set.",
    "HF_HUB_OFFLINE": "`1`: model hubs are never asked; a model that is not on this machine is an error.",
    "HF_HOME": "Where `huggingface_hub` keeps downloaded models.",
    "HF_TOKEN": "The token that `huggingface_hub` sends for models that need one.",
    "MM_RETRIEVER_DEBUG": "Any value: an error of the command line is shown with its traceback.",
    "OMP_NUM_THREADS": "How many CPU threads torch computes with.",
    "RAY_ADDRESS": "The Ray cluster that `embed --ray` and `embed_to_shards_on_ray` run on.",
    "TOKENIZERS_PARALLELISM": "Of the tokenizers library; the command line sets `false` where it is not set.",
    "WORLD_SIZE": "Set by `torchrun` and `accelerate launch`: how many processes train together.",
    "XDG_CACHE_HOME": "Where converted weights, web thumbnails and vectors of `evaluate` are; default `~/.cache`.",
    "XDG_RUNTIME_DIR": "Where the socket of an open Milvus Lite file is made; default the temporary folder.",
}
"""Variables that are no option of a command."""


def environment() -> str:
    """Return every environment variable that this package reads."""
    options: dict[str, list[str]] = {}
    meanings: dict[str, str] = {}
    for name, command in commands():
        for parameter in command.params:
            if parameter.envvar:
                options.setdefault(str(parameter.envvar), []).append(f"`{name} {parameter.opts[0]}`")
                meanings.setdefault(str(parameter.envvar), _cell(parameter.help))
    rows = {variable: f"{meanings[variable]} Same as {', '.join(options[variable])}." for variable in options}
    lines = [f"| `{variable}` | {meaning} |" for variable, meaning in sorted((rows | OWN_VARIABLES).items())]
    return "\n".join(
        [
            "# Environment variables",
            "",
            "An option on the command line goes before its variable. Give secrets by the variable: other users of the "
            "machine can see command lines.",
            "",
            "| variable | meaning |",
            "| --- | --- |",
            *lines,
            "",
            "There is no configuration file. What else can be set is an argument in Python: "
            "[embedding](embedding.md), [store](store.md), [retrieval](retrieval.md), [reranking](reranking.md).",
            "",
        ]
    )


def models() -> str:
    """Return what `mm-retriever models --json` knows, as tables."""
    from mm_retriever.cli.models import model_rows

    parts = [
        "# Models",
        "`mm-retriever models` prints this list and says which weights are on this machine. Memory is that of the "
        "weights alone, at 4 bytes a parameter (fp32) and 2 (bf16). Figures are those that the authors published.",
    ]
    rows = model_rows()
    for kind, title in (("embedding", "Embedding models"), ("reranker", "Rerankers")):
        lines = ["| model | vector | fp32 | bf16 | image with text | languages | licence |", "|" + " --- |" * 7]
        notes = []
        for row in (row for row in rows if row["kind"] == kind):
            sizes = [_gigabytes(row["bytes_float32"]), _gigabytes(row["bytes_bfloat16"])]
            cells = [f"`{row['name']}`", row["dimension"], *sizes, row["composed"], row["languages"], row["licence"]]
            lines.append("| " + " | ".join("" if cell is None else str(cell) for cell in cells) + " |")
            needs = [f'needs `pip install "mm-retriever[{row["extra"]}]"`'] if row["extra"] else []
            facts = [_cell(fact) for fact in (row["note"], *row["figures"]) if fact]
            notes.append(f"- `{row['name']}`: {'; '.join([*facts, *needs])}")
        parts += [f"## {title}", "\n".join(lines), "\n".join(notes)]
    return "\n\n".join(parts) + "\n"


def _gigabytes(size: int | None) -> str:
    return "" if size is None else f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
