"""``mm-retriever models | convert | info``: what to choose from, weights, versions, and what a store holds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mm_retriever.cli.options import Token, home
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
    weights: Annotated[str, typer.Argument(help="Official .pth or .pkl file, folder or published name.")],
    out: Annotated[Path, typer.Argument(help="Folder to write.", callback=home)],
    tokenizer: Annotated[
        str | None, typer.Option(help="Folder with the tokenizer, if it is not beside WEIGHTS.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Store as float32, bfloat16 or float16. Default: as they are.")
    ] = None,
) -> None:
    """Write the safetensors form of official weights, of any model family: loads faster, and cannot contain code."""
    from mm_retriever.embedders.registry import convert_model

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
    token: Token = None,
) -> None:
    """Versions, devices and bundled models; with --db, what a store holds."""
    from importlib.metadata import version

    import torch

    from mm_retriever.devices import available_devices
    from mm_retriever.embedders.registry import published_models
    from mm_retriever.store import Verification, check_exists, describe_store, recall_store, verify_store
    from mm_retriever.terminal import print_facts

    facts = {package: version(package) for package in PACKAGES}
    facts["devices"] = f"{', '.join(available_devices())}; {torch.get_num_threads()} threads"
    models = dict(published_models())
    facts["bundled models"] = ", ".join(
        f"{name} (drawn products only)" for name, entry in models.items() if entry.folder
    )
    facts["published models"] = ", ".join(name for name, entry in models.items() if not entry.folder)
    verified: dict[str, Verification | str] = {}
    if db is not None:
        check_exists(db)
        for name, described in describe_store(db, token=token).items():
            facts[f"collection {name}"] = _described(described, models)
        verified = verify_store(db, token=token) if verify else {}
        facts |= {f"verified {name}": str(verification) for name, verification in verified.items()}
        if recall:
            facts |= {f"recall {name}": str(measured) for name, measured in recall_store(db, token=token).items()}
    elif verify or recall:
        raise QueryError(f"{'--verify' if verify else '--recall'} needs a store: give --db")
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
