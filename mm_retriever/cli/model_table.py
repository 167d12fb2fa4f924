"""The models that have a name, as people choose among them: a table, or JSON."""

from __future__ import annotations

import re
import shutil
import sys
import textwrap
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution, requires
from importlib.util import find_spec
from typing import Any

import typer

from mm_retriever.checkpoint import SAFETENSORS, SAFETENSORS_INDEX, ModelEntry
from mm_retriever.errors import one_line

_HEADINGS = ("name", "dim", "params", "fp32", "bf16", "composed")
_WIDTHS = (36, 5, 7, 7, 7, 8)
_NOTE = "fp32, bf16: the weights alone in memory, 4 and 2 bytes a parameter"


def model_rows() -> list[dict[str, Any]]:
    """What is known of every model that has a name, embedding models first; None where it is not known."""
    from mm_retriever.embedders.registry import published_models
    from mm_retriever.rerank.registry import published_rerankers

    kinds = (("embedding", published_models()), ("reranker", published_rerankers()))
    return [_row(kind, name, entry) for kind, entries in kinds for name, entry in entries]


def _row(kind: str, name: str, entry: ModelEntry) -> dict[str, Any]:
    parameters = entry.parameters
    return {
        "kind": kind,
        "name": name,
        "dimension": entry.dimension,
        "parameters": parameters,
        "bytes_float32": None if parameters is None else 4 * parameters,
        "bytes_bfloat16": None if parameters is None else 2 * parameters,
        "file_bytes": entry.size,
        "composed": entry.composed,
        "languages": entry.languages or None,
        "licence": entry.licence or None,
        "note": entry.note or None,
        "figures": list(entry.figures),
        "extra": entry.needs or None,
        "extra_installed": _is_installed(entry.needs) if entry.needs else None,
        "here": _is_here(entry),
    }


def _is_installed(extra: str) -> bool:
    """Whether the packages of an extra are there; an extra that this package does not declare is a module's name."""
    marked = re.compile(rf"([\w.-]+).*;.*extra == ['\"]{re.escape(extra)}['\"]")
    needed = [match[1] for requirement in requires("mm-retriever") or () if (match := marked.match(requirement))]
    if not needed:
        return find_spec(extra.replace("-", "_")) is not None
    try:
        return all(distribution(name) is not None for name in needed)
    except PackageNotFoundError:
        return False


def _is_here(entry: ModelEntry) -> bool | None:
    """Whether its weights are on this machine; None for a model that has none, because a server does the work."""
    if entry.folder is not None:
        return True
    if not entry.repo:
        return None
    from huggingface_hub import try_to_load_from_cache

    names = (entry.file,) if entry.file else (SAFETENSORS, SAFETENSORS_INDEX, "pytorch_model.bin")
    return any(isinstance(try_to_load_from_cache(entry.repo, name), str) for name in names)


# ------------------------------------------------------------------------------------------ for people


def print_models(rows: list[dict[str, Any]]) -> None:
    """A line a model, and what else is known of it below; broken to the terminal's width, and never where piped."""
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    for kind, title in (("embedding", "embedding models, for --model"), ("reranker", "rerankers, for --rerank-model")):
        typer.echo(title)
        typer.echo(_line(_HEADINGS))
        for row in rows:
            if row["kind"] == kind:
                typer.echo(_line(_cells(row)))
                for line in _facts(row):
                    typer.echo(_indented(one_line(line, 10_000), width))
        typer.echo("")
    typer.echo(_NOTE)


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    dimension = "-" if row["dimension"] is None else str(row["dimension"])
    sizes = (_short(row["parameters"]), *(_short(row[key], "B") for key in ("bytes_float32", "bytes_bfloat16")))
    return (one_line(row["name"], 200), dimension, *sizes, row["composed"])


def _line(cells: tuple[str, ...]) -> str:
    first, *rest = zip(cells, _WIDTHS, strict=True)
    numbers = [cell.rjust(width) for cell, width in rest[:-1]]
    return " ".join([first[0].ljust(first[1]), *numbers, rest[-1][0]]).rstrip()


def _facts(row: dict[str, Any]) -> Iterator[str]:
    known = (row["note"], row["languages"], row["licence"] and f"licence {row['licence']}")
    if about := "; ".join(filter(None, known)):
        yield about
    yield from row["figures"]
    if row["extra"]:
        installed = "installed" if row["extra_installed"] else f'pip install "mm-retriever[{row["extra"]}]"'
        yield f"needs the extra [{row['extra']}]: {installed}"
    if row["here"] is not None:
        yield "its weights are on this machine" if row["here"] else "not on this machine yet: downloaded once"


def _indented(line: str, width: int | None) -> str:
    return textwrap.indent(line if width is None else textwrap.fill(line, max(40, width - 4)), "    ")


def _short(number: int | None, unit: str = "") -> str:
    """A number with two or three digits: 1.6 M, 393 M, 4.1 G; "-" for an unknown one."""
    if number is None:
        return "-"
    for scale, sign in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if number >= scale:
            value = number / scale
            return f"{value:.0f} {sign}{unit}" if value >= 99.5 else f"{value:.1f} {sign}{unit}"
    return f"{number} {unit}".rstrip()
