"""Files to a Phi-3 Vision model, ready to answer, and its processor."""

from __future__ import annotations

import re

import torch

from mm_retriever.checkpoint import ModelFiles, load_strict, locate, read_state_dict, skeleton
from mm_retriever.devices import as_device, as_dtype, stored_dtype
from mm_retriever.from_pretrained import without_progress_bar
from mm_retriever.packed_linear import pack_linears
from mm_retriever.phi3_vision.config import DEFAULT_MODEL, MODELS, read_config
from mm_retriever.phi3_vision.model import CPU_ATTENTION, Phi3Vision
from mm_retriever.phi3_vision.processor import Phi3VisionProcessor, read_processor
from mm_retriever.phi3_vision.tower import Phi3VisionConfig


def load_phi3_vision(
    name: str = DEFAULT_MODEL,
    *,
    revision: str | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    num_crops: int | None = None,
) -> tuple[Phi3Vision, Phi3VisionProcessor]:
    """Model, ready to answer, and processor. For quantisation or a device map, call ``Phi3Vision.from_pretrained``.

    Args:
        name: Hub id, local folder with the official files, or "tiny", which comes with the package.
        revision: Of the hub repository.
        device: By default the fastest there is: CUDA, else MPS, else the CPU.
        dtype: By default what the weights are stored in; float32 where that is float16 and the device a CPU.
        num_crops: Most crops per image; by default what ``preprocessor_config.json`` says (16 or 4).

    Raises:
        ModelNotFoundError: The name leads nowhere.
        CheckpointError: Weights are missing, do not fit, or are none too many.
    """
    files = locate(name, MODELS, revision=revision)
    config = read_config(files)
    processor = read_processor(files, config, num_crops)
    device = as_device(device)
    model = _load_weights(files, config, as_dtype(dtype, default=stored_dtype(config.dtype, device)))
    model.generation_config.eos_token_id = list(processor.stop_ids)
    model.generation_config.pad_token_id = config.pad_token_id
    model.to(device).eval()  # type: ignore[arg-type]
    return quick_on_cpu(model) if device.type == "cpu" else model, processor


def quick_on_cpu(model: Phi3Vision) -> Phi3Vision:
    """Choose what computes fastest on a CPU, to the same results; return the model."""
    if model.config._attn_implementation == "sdpa":
        model.set_attn_implementation({"": CPU_ATTENTION})
    return pack_linears(model)


def _load_weights(files: ModelFiles, config: Phi3VisionConfig, dtype: torch.dtype) -> Phi3Vision:
    empty = skeleton(lambda: Phi3Vision(config), files.weights)
    unused = re.compile("|".join(empty._keys_to_ignore_on_load_unexpected or ()))
    state = {key: tensor for key, tensor in read_state_dict(files.weights).items() if not unused.search(key)}
    load_strict(empty, state, source=files.weights, device="meta")  # compares names and shapes, copies nothing
    with without_progress_bar():
        model = Phi3Vision.from_pretrained(None, config=config, state_dict=state, dtype=dtype)
    assert isinstance(model, Phi3Vision)
    return model
