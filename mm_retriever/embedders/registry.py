"""Embedding models by name. A new family is one module with `MODELS`, `recognises` and `load`, and one word here."""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib import import_module
from typing import Any, Protocol, cast

from mm_retriever.checkpoint import ModelEntry, ModelFiles, Models, locate
from mm_retriever.embedders.embedder import Embedder
from mm_retriever.errors import CheckpointError

FAMILIES: tuple[str, ...] = ("visualized_bge",)
"""Modules: of `mm_retriever.embedders`, or, with dots, of anywhere."""


class Family(Protocol):
    """What the module of a model family holds."""

    MODELS: Models

    def recognises(self, files: ModelFiles) -> bool:
        """Whether these files are a model of this family."""
        ...

    def load(self, files: ModelFiles, *, device: Any = None, dtype: Any = None, **options: Any) -> Embedder:
        """The model of these files."""
        ...


def load_embedder(
    name: str | os.PathLike[str],
    *,
    device: Any = None,
    dtype: Any = None,
    revision: str | None = None,
    families: tuple[str, ...] | None = None,
    **options: Any,
) -> Embedder:
    """The model of a name, of any family.

    Args:
        name: a name of `published_models`, a local folder or weight file, or the id of a hub repository.
        device: "cpu", "cuda", "mps", ...; default: the fastest there is.
        dtype: "float32" (default), "bfloat16" or "float16".
        revision: of the hub repository.
        families: which may be considered; default: all.
        **options: of the family.

    Raises:
        ModelNotFoundError: the name leads to no files, or the hub is out of reach.
        CheckpointError: the files are damaged, unsafe, or of no known family.
    """
    known = [_family(module) for module in families or FAMILIES]
    title = os.fspath(name)
    for family in known:
        entry = family.MODELS.get(title)
        if entry is not None and entry.folder is None and not entry.repo:  # a model without files
            return family.load(ModelFiles(name=title), device=device, dtype=dtype, **options)
    files = locate(title, {name: entry for family in known for name, entry in family.MODELS.items()}, revision=revision)
    for family in known:
        if title in family.MODELS or (families and len(known) == 1) or family.recognises(files):
            return family.load(files, device=device, dtype=dtype, **options)
    raise CheckpointError(
        f"{title!r} is a model of no known family ({', '.join(families or FAMILIES)}); "
        f"the models with a name are {', '.join(dict(published_models()))}"
    )


def published_models() -> Iterator[tuple[str, ModelEntry]]:
    """Every model that has a name, family by family."""
    for module in FAMILIES:
        yield from _family(module).MODELS.items()


def _family(module: str) -> Family:
    return cast("Family", import_module(module if "." in module else f"mm_retriever.embedders.{module}"))
