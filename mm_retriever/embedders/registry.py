"""Embedding models by name. A new family is one module with `MODELS`, `recognises` and `load`, and one word here."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, cast

from mm_retriever.checkpoint import ModelEntry, ModelFiles, Models, locate
from mm_retriever.embedders.embedder import Embedder
from mm_retriever.errors import CheckpointError, QueryError

FAMILIES: tuple[str, ...] = ("visualized_bge", "bge_vl", "magiclens", "sentence_transformers")
"""Modules of `mm_retriever.embedders`, or dotted names of any modules. Models on a server have none: see `remote`."""


class Family(Protocol):
    """The module of a model family.

    A family whose files can be converted also has ``convert(files, out, tokenizer=, dtype=)``: it writes
    ``config.json``, ``model.safetensors`` and ``tokenizer.json`` into the folder ``out`` and returns it; without
    ``dtype`` the floats keep the format of the file.
    """

    MODELS: Models

    def recognises(self, files: ModelFiles) -> bool:
        """Whether these files are a model of this family."""
        ...

    def load(self, files: ModelFiles, *, device: Any = None, dtype: Any = None, **options: Any) -> Embedder:
        """Return the model of these files as an `Embedder`.

        Args:
            files: from `locate`.
            device: default: CUDA, else MPS, else the CPU.
            dtype: of the computation; default float32.
            options: of the family; those with a tokenizer take ``tokenizer``: ``tokenizer.json``, its folder or a hub
                name; default: beside the weights, else as published.

        Raises:
            CheckpointError: the files are damaged, unsafe, or of another model.
        """
        ...


def load_embedder(
    name: str | os.PathLike[str],
    *,
    device: Any = None,
    dtype: Any = None,
    revision: str | None = None,
    base_url: str | None = None,
    families: tuple[str, ...] | None = None,
    backend: str = "torch",
    calibration: Any = None,
    **options: Any,
) -> Embedder:
    """Return the model with a name, of any family.

    Args:
        name: a name from `published_models`, a local folder or weight file, or the id of a hub repository; with
            `base_url` the name under which the server serves the model.
        device: "cpu", "cuda", "mps", ...; default: the fastest there is.
        dtype: "float32" (default), "bfloat16" or "float16"; with OpenVINO "float32", "bfloat16" or "int8".
        revision: of the hub repository.
        base_url: of a server that embeds, for example vLLM's "http://gpu:8000/v1"; options are then those of
            `RemoteEmbedding`.
        families: the families to consider; default: all.
        backend: "torch"; "openvino", which is faster on CPUs; or "auto", the fastest that keeps the vectors.
        calibration: a folder of images, or images, that "int8" is calibrated and measured on; default: drawn ones.
        **options: of the family.

    Raises:
        QueryError: an option that does not go with the model.
        ModelNotFoundError: there are no files of that name, or the hub is out of reach.
        CheckpointError: the files are damaged, unsafe, or of no known family.
    """
    if base_url is not None:
        if backend != "torch" or calibration is not None:
            raise QueryError(f"backend={backend!r} is of a model on this machine; the server at base_url has its own")
        served = {"device": device, "dtype": dtype, "revision": revision, "families": families, **options}
        return _served(os.fspath(name), base_url, **served)
    family, files = _resolve(name, revision=revision, families=families or FAMILIES)
    if backend == "torch":
        if dtype == "int8":
            raise QueryError("dtype='int8' is computed by OpenVINO: give backend='openvino' with it")
        return _loaded(family, files, device, dtype, options)
    from mm_retriever.embedders.backends import load_with

    return load_with(
        backend,
        lambda dtype, device: _loaded(family, files, device, dtype, options),
        dtype=None if dtype is None else str(dtype).removeprefix("torch."),
        device=device,
        calibration=calibration,
    )


def _loaded(family: Family, files: ModelFiles, device: Any, dtype: Any, options: Mapping[str, Any]) -> Embedder:
    try:
        return family.load(files, device=device, dtype=dtype, **options)
    except TypeError as error:
        unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        if unknown is None or unknown[1] not in options:
            raise
        raise QueryError(f"{files.name!r} is of a family that has no option {unknown[1]!r}: leave it out") from error


def check_embedder(name: str | os.PathLike[str], *, revision: str | None = None) -> None:
    """Refuse a name that `load_embedder` would refuse, without loading the model; missing files are downloaded.

    Raises:
        ModelNotFoundError: there are no files of that name, or the hub is out of reach.
        CheckpointError: the files are of no known family.
    """
    _resolve(name, revision=revision, families=FAMILIES)


def convert_model(
    name: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    tokenizer: str | os.PathLike[str] | None = None,
    dtype: Any = None,
    revision: str | None = None,
) -> Path:
    """Write a model as ``config.json``, ``model.safetensors`` and ``tokenizer.json`` into ``out``, and return ``out``.

    The folder holds the same model: its `space` is that of the original.

    Args:
        name: as of `load_embedder`.
        out: a folder, created if missing.
        tokenizer: ``tokenizer.json``, its folder or a hub name; default: beside the weights, else as published.
        dtype: of the floats; default: that of the file.
        revision: of the hub repository.

    Raises:
        CheckpointError: as of `load_embedder`, or the family has no weights to convert.
    """
    family, files = _resolve(name, revision=revision, families=FAMILIES)
    convert = getattr(family, "convert", None)
    if convert is None:
        raise CheckpointError(f"{os.fspath(name)!r} is used as it is: there is nothing to convert")
    written: Path = convert(files, out, tokenizer=tokenizer, dtype=dtype)
    return written


def _resolve(
    name: str | os.PathLike[str], *, revision: str | None, families: tuple[str, ...]
) -> tuple[Family, ModelFiles]:
    known = [_family(module) for module in families]
    title = os.fspath(name)
    for family in known:
        entry = family.MODELS.get(title)
        if entry is not None and entry.folder is None and not entry.repo:  # a model without files
            return family, ModelFiles(name=title)
    files = locate(title, {name: entry for family in known for name, entry in family.MODELS.items()}, revision=revision)
    for family in known:
        if title in family.MODELS or (families != FAMILIES and len(known) == 1) or family.recognises(files):
            return family, files
    raise CheckpointError(
        f"{title!r} is a model of no known family ({', '.join(families)}); "
        f"the models with a name are {', '.join(dict(published_models()))}"
    )


def server_options(
    given: Embedder | None,
    base_url: str | None,
    api_key: str | None,
    options: Mapping[str, Any],
    *,
    loads: bool = False,
) -> dict[str, Any]:
    """Return the address and key of a server as options of `load_embedder`; empty without an address.

    Args:
        given: a model that is loaded already.
        base_url: of the server.
        api_key: of the server.
        options: of the family; they are written to files, so they must not hold the key.
        loads: whether there are options about how the model is loaded.

    Raises:
        QueryError: the arguments do not go together.
    """
    if "api_key" in options or "base_url" in options:
        raise QueryError("give base_url and api_key as arguments of their own, not among the options")
    if given is not None and loads:
        raise QueryError(f"{given.name!r} is a loaded model; backend and calibration go with the name of one")
    if base_url is None:
        if api_key is not None:
            raise QueryError("api_key goes with base_url, the address of a server that embeds")
        return {}
    if given is not None:
        raise QueryError(
            f"{given.name!r} is a loaded model; base_url goes with the name under which a server serves one"
        )
    return {"base_url": base_url, "api_key": api_key}


def chosen_backend(embedder: Embedder) -> tuple[str, str]:
    """Return backend and dtype with which another process loads an equal model."""
    dtype, _, by = embedder.note.partition(",")[0].partition(" ")
    return "openvino" if by.startswith("openvino") else "torch", dtype


def _served(
    name: str, base_url: str, *, revision: str | None, families: tuple[str, ...] | None, **options: Any
) -> Embedder:
    """The model that a server serves under a name."""
    if families is not None:
        raise QueryError(f"{', '.join(families)} runs on this machine; ComposedEmbedding asks a server")
    if revision is not None:
        raise QueryError(f"revision={revision!r} is of a hub repository; {name!r} is what the server says it is")
    from mm_retriever.embedders.remote import load

    return load(name, base_url=base_url, **options)


def published_models() -> Iterator[tuple[str, ModelEntry]]:
    """Yield every published model, family by family."""
    for module in FAMILIES:
        yield from _family(module).MODELS.items()


def _family(module: str) -> Family:
    return cast("Family", import_module(module if "." in module else f"mm_retriever.embedders.{module}"))
