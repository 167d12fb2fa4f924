"""Models as folders of this package: ``config.json``, ``model.safetensors``, ``tokenizer.json``."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from mm_retriever.checkpoint import SAFETENSORS, ModelFiles, Models, fingerprint, locate_tokenizer
from mm_retriever.errors import ModelNotFoundError
from mm_retriever.files import cache_folder, drafted


def original_fingerprint(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> str:
    """Return the fingerprint of these weights; for an unchanged rounded copy, that of the original weights."""
    own, rounded = fingerprint(state), config.get("rounded")
    return str(rounded.get(own, own)) if isinstance(rounded, Mapping) else own


def write_folder(
    out: str | os.PathLike[str], state: Mapping[str, Tensor], config: Mapping[str, Any], *, original: str
) -> Path:
    """Write ``config.json`` and ``model.safetensors`` into the folder ``out`` and return it.

    Args:
        out: created if missing.
        state: tensors by name, in the float format to be stored.
        config: the facts that the tensors do not tell.
        original: fingerprint of the weights before any rounding, which is stored with a rounded copy.
    """
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    with drafted(folder / SAFETENSORS) as draft:
        save_file({key: tensor.contiguous() for key, tensor in state.items()}, draft, metadata={"format": "pt"})
    rounded = {} if (own := fingerprint(state)) == original else {"rounded": {own: original}}
    content = {key: value for key, value in config.items() if key != "rounded"} | rounded
    text = json.dumps(content, indent=2, sort_keys=True) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")
    return folder


def find_tokenizer(files: ModelFiles, given: str | os.PathLike[str] | None, repo: str) -> Path:
    """Return ``tokenizer.json``: the given one, else that beside the weights, else that of a hub repository.

    Raises:
        ModelNotFoundError: there is none, and the hub is out of reach.
    """
    if given is not None:
        return locate_tokenizer(given)
    if files.tokenizer is not None:
        return files.tokenizer
    try:
        return locate_tokenizer(repo)
    except ModelNotFoundError as error:
        raise ModelNotFoundError(
            f"no tokenizer.json beside {files.weights}, and the model hub cannot be reached for that of {repo!r}; "
            "put the file there or name it with tokenizer="
        ) from error


def copy_tokenizer(folder: Path, files: ModelFiles, given: str | os.PathLike[str] | None, repo: str) -> None:
    """Copy ``tokenizer.json`` into the folder; warn if none is available."""
    try:
        source = find_tokenizer(files, given, repo)
    except ModelNotFoundError as error:
        warnings.warn(f"{folder} has no tokenizer.json: {error}", UserWarning, stacklevel=3)
        return
    if source.resolve() != (folder / "tokenizer.json").resolve():
        shutil.copyfile(source, folder / "tokenizer.json")


def warn_if_not_published(weights: Path, models: Models) -> None:
    """Warn if a file with a published name differs from the published file."""
    published = next((entry for entry in models.values() if entry.file == weights.name and entry.sha256), None)
    if published is None:
        return
    size = weights.stat().st_size
    if size != published.size:
        differs = f"it has {size:,} bytes, the published file {published.size:,}"
    elif (digest := _sha256(weights)) != published.sha256:
        differs = f"its sha256 is {digest}, that of the published file {published.sha256}"
    else:
        return
    warnings.warn(f"{weights} is not the published {published.file}: {differs}", UserWarning, stacklevel=3)


def _sha256(path: Path) -> str:
    """The SHA-256 of a file, kept in the user's cache by path, size and time of change."""
    status = path.stat()
    identity = f"{path.resolve()}|{status.st_size}|{status.st_mtime_ns}"
    cache = cache_folder("sha256")
    remembered = cache / hashlib.sha256(identity.encode()).hexdigest()
    with suppress(OSError):
        if len(known := remembered.read_text(encoding="ascii")) == 64:
            return known
    running = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**22):
            running.update(block)
    digest = running.hexdigest()
    with suppress(OSError):  # with a read-only home it is computed again each time
        cache.mkdir(parents=True, exist_ok=True)
        remembered.write_text(digest, encoding="ascii")
    return digest
