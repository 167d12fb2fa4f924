"""What a `config.json` says of a Phi-3 Vision model, checked before anything is built from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig

from mm_retriever.checkpoint import ModelEntry, ModelFiles, Models, read_json
from mm_retriever.errors import CheckpointError, reason_of, shown
from mm_retriever.phi3_vision.tower import Phi3VisionConfig

DEFAULT_MODEL = "microsoft/Phi-3.5-vision-instruct"
MODELS: Models = {
    "tiny": ModelEntry(
        folder=Path(__file__).parent / "tiny", licence="MIT", note="comes with the package; drawn products only"
    ),
    DEFAULT_MODEL: ModelEntry(repo=DEFAULT_MODEL, licence="MIT", note="4.2 billion parameters, 8 GB in bfloat16"),
    "microsoft/Phi-3-vision-128k-instruct": ModelEntry(
        repo="microsoft/Phi-3-vision-128k-instruct", licence="MIT", note="as published first"
    ),
}
MAX_LAYERS = 256  # more than any model has; the file is untrusted


def read_config(files: ModelFiles) -> Phi3VisionConfig:
    """The config among a model's files.

    Raises:
        CheckpointError: it is missing, damaged, or describes another model.
    """
    if files.config is None:
        raise CheckpointError(f"{files.name!r} has no config.json; Phi-3 Vision needs it beside the weights")
    stored = read_json(files.config)
    if stored.get("model_type") != Phi3VisionConfig.model_type:
        kind = shown(stored.get("model_type"))
        raise CheckpointError(f"{str(files.config)!r} describes a model of type {kind}; Phi-3 Vision's is 'phi3_v'")
    try:
        config = Phi3VisionConfig.from_dict(stored)
    except (ValueError, TypeError, KeyError, ArithmeticError, StrictDataclassError) as error:
        raise CheckpointError(
            f"{str(files.config)!r} does not describe a Phi-3 Vision model: {reason_of(error)}"
        ) from error
    assert isinstance(config, Phi3VisionConfig)
    vision: Any = config.vision_config
    turned = config.rope.get("partial_rotary_factor", 1.0)
    for name, value, most in (
        ("num_hidden_layers", config.num_hidden_layers, MAX_LAYERS),
        ("vision_config.num_hidden_layers", vision.num_hidden_layers, MAX_LAYERS),
        ("partial_rotary_factor", turned, 1),
    ):
        if not isinstance(value, int | float) or not 0 < value <= most:
            raise CheckpointError(f"{str(files.config)!r}: {name} {shown(value)} is not above 0 and up to {most}")
    if not isinstance(config.embd_layer or {}, dict):
        raise CheckpointError(f"{str(files.config)!r}: embd_layer {shown(config.embd_layer)} is not a JSON object")
    return config


# transformers' Auto classes know the model as soon as its modules are imported
AutoConfig.register(Phi3VisionConfig.model_type, Phi3VisionConfig, exist_ok=True)
