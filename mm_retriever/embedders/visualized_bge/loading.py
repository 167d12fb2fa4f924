"""Files to a Visualized BGE model and its processor: bundled, local, published as one .pth file, or in our layout."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mm_retriever.checkpoint import ModelFiles, load_strict, locate, read_state_dict, skeleton
from mm_retriever.devices import as_device, as_dtype
from mm_retriever.embedders.folder import (
    copy_tokenizer,
    find_tokenizer,
    original_fingerprint,
    warn_if_not_published,
    write_folder,
)
from mm_retriever.embedders.visualized_bge import DEFAULT_MODEL, MODELS
from mm_retriever.embedders.visualized_bge.network import Shape, VisualizedBGENetwork, config_from_tensors, read_config
from mm_retriever.embedders.visualized_bge.processor import VisualizedBGEProcessor, tokenizer_repo

if TYPE_CHECKING:
    from mm_retriever.embedders.visualized_bge.model import VisualizedBGE

# in the official files, never used by the branch that runs
DEAD_KEYS = re.compile(
    r"bge_pooler\..*|bge_embeddings\.position_ids|model_visual\.logit_scale|model_visual\.visual\.(norm|head)\..*"
    r"|model_visual\.visual\.blocks\.\d+\.attn\.rope\..*"
)


def load_visualized_bge(
    name: str | os.PathLike[str] = DEFAULT_MODEL,
    *,
    tokenizer: str | os.PathLike[str] | None = None,
    revision: str | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
) -> tuple[VisualizedBGE, VisualizedBGEProcessor]:
    """A model ready for inference, under transformers' class, and the processor that feeds it.

    Args:
        name: "tiny", a local folder or weight file, a published name, or any hub repository in our layout.
        tokenizer: ``tokenizer.json``, its folder or a hub name; default: beside the weights, else as published.
        revision: of the hub repository of the weights.
        device: default: CUDA, else MPS, else the CPU.
        dtype: of the computation; default float32.

    Raises:
        ModelNotFoundError: the name leads to no files.
        CheckpointError: the files are damaged, unsafe, or of another model.
    """
    from mm_retriever.embedders.visualized_bge.model import with_parts_of

    device = as_device(device)  # before anything is downloaded
    files = locate(name, MODELS, revision=revision)
    network, processor = load_files(files, device=device, dtype=dtype, tokenizer=tokenizer)
    return with_parts_of(network), processor


def load_files(
    files: ModelFiles,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
) -> tuple[VisualizedBGENetwork, VisualizedBGEProcessor]:
    """As :func:`load_visualized_bge`, from files that were found already, and in plain torch."""
    config, state = read_checkpoint(files)
    model = fill_model(config, state, files, device=as_device(device), dtype=as_dtype(dtype))
    return model, VisualizedBGEProcessor(config, find_tokenizer(files, tokenizer, tokenizer_repo(config)))


def read_checkpoint(files: ModelFiles) -> tuple[Shape, dict[str, Tensor]]:
    """Return the config and the tensors, without those that no code reads."""
    warn_if_not_published(files.weights, MODELS)
    state = {key: tensor for key, tensor in read_state_dict(files.weights).items() if not DEAD_KEYS.fullmatch(key)}
    if files.config is None:
        return config_from_tensors(state, files.weights), state
    return read_config(files.config), state


def fill_model(
    config: Shape,
    state: Mapping[str, Tensor],
    files: ModelFiles,
    *,
    device: torch.device,
    dtype: torch.dtype,
) -> VisualizedBGENetwork:
    """Return the model with these tensors in it, ready for inference."""
    model = skeleton(lambda: VisualizedBGENetwork(config), files.weights)
    load_strict(model, state, source=files.weights, device=device, dtype=dtype)
    model.fingerprint = original_fingerprint(state, {"rounded": config.rounded})
    model.train(False)
    return model


def convert_files(
    files: ModelFiles,
    out: str | os.PathLike[str],
    *,
    tokenizer: str | os.PathLike[str] | None = None,
    dtype: torch.dtype | str | None = None,
) -> Path:
    """Writes the files of a model as a folder and returns it; the floats keep their format without ``dtype``."""
    from mm_retriever.embedders.visualized_bge.model import VisualizedBGE, VisualizedBGEConfig

    shape, state = read_checkpoint(files)
    stored = state["visual_proj.weight"].dtype if "visual_proj.weight" in state else torch.float32
    model = fill_model(shape, state, files, device=torch.device("cpu"), dtype=as_dtype(dtype, default=stored))
    config = VisualizedBGEConfig.of(shape)
    config.architectures = [VisualizedBGE.__name__]
    config.dtype = model.dtype
    content = json.loads(config.to_json_string())
    folder = write_folder(out, model.state_dict(), content, original=model.fingerprint)
    copy_tokenizer(folder, files, tokenizer, tokenizer_repo(shape))
    return folder
