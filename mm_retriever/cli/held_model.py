"""The model of a command that names none: the one whose vectors the collection holds."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from mm_retriever.cli import options
from mm_retriever.errors import QueryError

_NOTE = re.compile(
    r"(?P<name>.*?)(?:, (?P<dtype>float32|bfloat16|float16|int8)(?P<openvino> openvino)?\b.*)?", re.DOTALL
)


class Wanted(NamedTuple):
    """What loads a model: its name; dtype and backend where they are said."""

    name: str
    dtype: str | None
    backend: str | None


def model_to_load(
    model: str | None,
    dtype: str | None,
    backend: str | None = None,
    *,
    url: str | None,
    db: str,
    collection: str,
    token: str | None,
) -> Wanted:
    """The model to load, and how: as is given, else as the collection was made.

    Args:
        model: of `--model`; it wins, and is checked when the store is opened.
        dtype: of `--dtype`; it wins.
        backend: of `--backend`; it wins.
        url: of `--model-url`; the server chooses the dtype.
        db: the store, which may not be there yet.
        collection: its collection, likewise.
        token: of the store's server.

    Raises:
        QueryError: the collection's model has no name by which this command may load it.
    """
    if model is not None:
        return Wanted(model, dtype, backend)
    space, note = _held(db, collection, token)
    if not (space or note):
        return Wanted(options.REAL_MODEL, dtype, backend)
    kept = _NOTE.fullmatch(note)
    assert kept is not None  # any text
    name = kept["name"] if kept["dtype"] else note.rpartition(", ")[0]
    if space.startswith("remote@"):
        raise QueryError(
            f"the collection holds vectors of the model {name!r}, which a server computes: give --model and --model-url"
        )
    if url is not None:
        raise QueryError("--model-url needs --model: the name under which the server serves the model")
    if not _may_be_loaded(name):
        raise QueryError(
            f"the collection holds vectors of the model {note or space!r}, which is not on this machine by that name: "
            "give --model, a name or a folder"
        )
    held = "openvino" if kept["openvino"] else "torch"
    if backend is None and dtype != "float16":  # which OpenVINO does not take here
        backend = held
    return Wanted(name, dtype or (kept["dtype"] if backend in (None, held) else None), backend)


def _may_be_loaded(name: str) -> bool:
    """Whether it is a published model or on this machine: what a store says fetches nothing else from the hub."""
    from mm_retriever.embedders.registry import published_models

    if name in dict(published_models()) or (name and Path(name).exists()):
        return True
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        return any(isinstance(try_to_load_from_cache(name, file), str) for file in ("config.json", "modules.json"))
    except HFValidationError:
        return False


def _held(db: str, collection: str, token: str | None) -> tuple[str, str]:
    """The model id and the note of a collection; "" where there is none, or it does not say."""
    from mm_retriever.errors import StoreError
    from mm_retriever.store import check_exists, describe_store

    try:
        check_exists(db)
    except StoreError:
        return "", ""
    described = describe_store(db, token=token).get(collection, {})
    space = described.get("model", "")
    return "" if space == "not said" else space, described.get("model_note", "")
