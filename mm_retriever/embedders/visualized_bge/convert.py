"""An official checkpoint as a folder of safetensors, config and tokenizer."""

from __future__ import annotations

import os
import shutil
import warnings
from pathlib import Path

import torch
from safetensors.torch import save_file

from mm_retriever.checkpoint import SAFETENSORS, fingerprint, locate
from mm_retriever.devices import as_dtype
from mm_retriever.embedders.visualized_bge import MODELS
from mm_retriever.embedders.visualized_bge.encoder import find_tokenizer
from mm_retriever.embedders.visualized_bge.loading import fill_model, read_checkpoint
from mm_retriever.embedders.visualized_bge.model import VisualizedBGE
from mm_retriever.errors import ModelNotFoundError


def convert_checkpoint(
    weights: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    tokenizer: str | os.PathLike[str] | None = None,
    dtype: torch.dtype | str | None = None,
    revision: str | None = None,
) -> Path:
    """Writes ``config.json``, ``model.safetensors`` and ``tokenizer.json`` into the folder ``out`` and returns it.

    The floats keep the format that they have in the file unless ``dtype`` is given.
    """
    files = locate(weights, MODELS, revision=revision)
    config, state = read_checkpoint(files)
    stored = state["visual_proj.weight"].dtype if "visual_proj.weight" in state else torch.float32
    model = fill_model(config, state, files, device=torch.device("cpu"), dtype=as_dtype(dtype, default=stored))
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f"{SAFETENSORS}.part"
    save_file(model.state_dict(), part, metadata={"format": "pt"})
    part.replace(folder / SAFETENSORS)
    if (own := fingerprint(model.state_dict())) != model.fingerprint:
        config.rounded = {own: model.fingerprint}
    config.architectures = [VisualizedBGE.__name__]
    config.dtype = model.dtype
    config.save_pretrained(folder)
    try:
        source = find_tokenizer(files, config, tokenizer)
    except ModelNotFoundError as error:
        warnings.warn(f"{folder} has no tokenizer.json: {error}", UserWarning, stacklevel=2)
    else:
        if source.resolve() != (folder / "tokenizer.json").resolve():
            shutil.copyfile(source, folder / "tokenizer.json")
    return folder
