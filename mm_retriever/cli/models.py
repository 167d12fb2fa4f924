"""``mm-retriever models | convert | info``: what to choose from, weights, versions, and what a store holds."""

from __future__ import annotations

import re
import shutil
import sys
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, distribution, requires
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mm_retriever.cli.options import Token, check_places, home
from mm_retriever.errors import QueryError, one_line

if TYPE_CHECKING:
    from mm_retriever.checkpoint import ModelEntry


_COMPOSED = {
    "trained": "composed, as it was trained",
    "sum": "by the sum of both vectors",
    "no": "not embedded",
}
PACKAGES = ("mm-retriever", "torch", "transformers", "llama-index-core", "pymilvus", "pillow")


def models(as_json: Annotated[bool, typer.Option("--json", help="Print them as JSON.")] = False) -> None:
    """The models to choose from: size, memory, languages, licence, published figures, what each needs. Loads none."""
    from mm_retriever.terminal import print_json

    rows = model_rows()
    if as_json:
        print_json(rows)
    else:
        print_models(rows)


def convert(
    weights: Annotated[
        str, typer.Argument(help="Official .pth or .pkl file, folder or published name.", callback=home)
    ],
    out: Annotated[Path, typer.Argument(help="Folder to write.", callback=home)],
    tokenizer: Annotated[
        str | None, typer.Option(help="Folder with the tokenizer, if it is not beside WEIGHTS.", callback=home)
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Store as float32, bfloat16 or float16. Default: as they are.")
    ] = None,
) -> None:
    """Write the safetensors form of official weights, of any model family: loads faster, and cannot contain code."""
    from mm_retriever.embedders.registry import convert_model

    check_places(folders={"OUT": out})
    written = convert_model(weights, out, tokenizer=tokenizer, dtype=dtype)
    typer.echo(f"wrote {written}; use it with --model {written}")


def info(
    db: Annotated[str | None, typer.Option(help="A store to describe.")] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Also read all that the store holds, and check it for damage.")
    ] = False,
    recall: Annotated[
        bool, typer.Option("--recall", help="Also measure how many of the nearest rows the index finds.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the same as JSON.")] = False,
    token: Token = None,
) -> None:
    """Versions, devices and bundled models; with --db, what a store holds."""
    if verify and db is None:
        raise QueryError("--verify needs a store: give --db")
    if recall and db is None:
        raise QueryError("--recall needs a store: give --db")
    from importlib.metadata import version

    from mm_retriever.embedders.registry import published_models
    from mm_retriever.store import Verification, check_exists, describe_store, recall_store, store_columns, verify_store
    from mm_retriever.terminal import print_facts, print_json

    collections: dict[str, dict[str, Any]] = {}
    verified: dict[str, Verification | str] = {}
    measured_recall: dict[str, str] = {}
    columns: dict[str, list[str] | str] = {}
    if db is not None:
        check_exists(db)
        collections = describe_store(db, token=token)
        columns = store_columns(db, token=token)
        verified = verify_store(db, token=token) if verify else {}
        if recall:
            measured_recall = {name: str(measured) for name, measured in recall_store(db, token=token).items()}
    import torch

    from mm_retriever.devices import available_devices

    models = dict(published_models())
    report: dict[str, Any] = {
        "versions": {package: version(package) for package in PACKAGES},
        "devices": available_devices(),
        "threads": torch.get_num_threads(),
        "bundled_models": [name for name, entry in models.items() if entry.folder],
        "published_models": [name for name, entry in models.items() if not entry.folder],
    }
    if db is not None:
        report["collections"] = collections
        report["columns"] = columns
    if verify:
        report["verified"] = {name: item if isinstance(item, str) else asdict(item) for name, item in verified.items()}
    if recall:
        report["recall"] = measured_recall
    if as_json:
        print_json(report)
    else:
        facts = dict(report["versions"])
        facts["devices"] = f"{', '.join(report['devices'])}; {report['threads']} threads"
        facts["bundled models"] = ", ".join(f"{name} (drawn products only)" for name in report["bundled_models"])
        facts["published models"] = ", ".join(report["published_models"])
        facts |= {f"collection {name}": _described(described, models) for name, described in collections.items()}
        facts |= {
            f"columns {name}": names if isinstance(names, str) else ", ".join(names) for name, names in columns.items()
        }
        facts |= {f"verified {name}": str(verification) for name, verification in verified.items()}
        facts |= {f"recall {name}": measured for name, measured in measured_recall.items()}
        print_facts(facts)
    for verification in verified.values():
        if not isinstance(verification, str):
            verification.raise_damage()


def _described(collection: Mapping[str, Any], models: Mapping[str, ModelEntry]) -> str:
    """Rows and model of a collection: its name and note, whether it composes or adds, its space, its dimension."""
    name, _, _ = collection.get("model_note", "").rpartition(", ")
    entry = models.get(name)
    facts = [
        f"{collection['rows']} rows",
        f"model {collection.get('model_note') or 'not named'}",
        "" if entry is None else f"image with text {_COMPOSED[entry.composed]}",
        f"space {collection['model']}",
        f"dimension {collection['dimension']}",
    ]
    if whole := collection.get("left_by_reindex"):
        facts.insert(0, f"left by a reindex of {whole} that has not ended: the next one goes on with it or removes it")
    return ", ".join(filter(None, facts))


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

    from mm_retriever.checkpoint import SAFETENSORS, SAFETENSORS_INDEX

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
