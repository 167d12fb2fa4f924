"""``mm-retriever models | convert | info``: what to choose from, weights, versions, and what a store holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mm_retriever.cli.options import Token, check_places, home
from mm_retriever.errors import QueryError

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
    from mm_retriever.cli.model_table import model_rows, print_models
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
    told: dict[str, Any] = {
        "versions": {package: version(package) for package in PACKAGES},
        "devices": available_devices(),
        "threads": torch.get_num_threads(),
        "bundled_models": [name for name, entry in models.items() if entry.folder],
        "published_models": [name for name, entry in models.items() if not entry.folder],
    }
    if db is not None:
        told["collections"] = collections
        told["columns"] = columns
    if verify:
        told["verified"] = {name: one if isinstance(one, str) else asdict(one) for name, one in verified.items()}
    if recall:
        told["recall"] = measured_recall
    if as_json:
        print_json(told)
    else:
        facts = dict(told["versions"])
        facts["devices"] = f"{', '.join(told['devices'])}; {told['threads']} threads"
        facts["bundled models"] = ", ".join(f"{name} (drawn products only)" for name in told["bundled_models"])
        facts["published models"] = ", ".join(told["published_models"])
        facts |= {f"collection {name}": _described(described, models) for name, described in collections.items()}
        facts |= {f"columns {name}": one if isinstance(one, str) else ", ".join(one) for name, one in columns.items()}
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
