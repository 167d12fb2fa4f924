"""Visualized BGE for transformers: its config, its model class, and what the Auto classes know of them.

For what is done to models with other libraries: save, offload, adapt, quantise, train. Our own loader takes the plain
torch of `network.py`, whose modules these are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoProcessor, PreTrainedModel, initialization
from transformers.configuration_utils import PreTrainedConfig

from mm_retriever.embedders.visualized_bge.eva_vit import (
    EvaVisionConfig,
    EvaVisionTower,
    RotaryPositions,
    rope_frequencies,
)
from mm_retriever.embedders.visualized_bge.network import (
    MODEL_TYPE,
    BgeTextConfig,
    Encodes,
    Shape,
    config_from_tensors,
    read_config,
)
from mm_retriever.embedders.visualized_bge.processor import VisualizedBGEProcessor

__all__ = [
    "BgeTextConfig",
    "VisualizedBGE",
    "VisualizedBGEConfig",
    "config_from_tensors",
    "read_config",
    "with_parts_of",
]


class VisualizedBGEConfig(Shape, PreTrainedConfig):
    """A `Shape` as transformers keeps it."""

    model_type = MODEL_TYPE

    def __init__(
        self,
        vision: Mapping[str, Any] | EvaVisionConfig | None = None,
        text: Mapping[str, Any] | BgeTextConfig | None = None,
        rounded: Mapping[str, str] | None = None,
        **kwargs: Any,
    ) -> None:
        Shape.__init__(self, vision, text, rounded)
        PreTrainedConfig.__init__(self, **kwargs)

    @classmethod
    def of(cls, shape: Shape) -> VisualizedBGEConfig:
        """The config of a plain shape."""
        return shape if isinstance(shape, cls) else cls(shape.vision, shape.text, shape.rounded)

    @property
    def vocab_size(self) -> int:
        """Entries of the word embeddings, under the name that transformers knows."""
        return int(self.text["vocab_size"])

    @vocab_size.setter
    def vocab_size(self, size: int) -> None:
        self.text["vocab_size"] = int(size)


class VisualizedBGE(Encodes, PreTrainedModel):
    """The model as transformers knows it."""

    config_class = VisualizedBGEConfig
    config: VisualizedBGEConfig
    base_model_prefix = ""
    main_input_name = "pixel_values"
    _no_split_modules = ["Block", "EncoderLayer", "TextEmbeddings"]  # noqa: RUF012 - as transformers declares it
    supports_gradient_checkpointing = True

    def __init__(self, config: VisualizedBGEConfig) -> None:
        super().__init__(config)
        self.add_parts(config)
        self.post_init()  # type: ignore[no-untyped-call]

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)  # type: ignore[no-untyped-call]
        if isinstance(module, EvaVisionTower):
            initialization.normal_(module.cls_token, std=0.02)
            initialization.normal_(module.pos_embed, std=0.02)
        elif isinstance(module, RotaryPositions):
            cos, sin = rope_frequencies(self.config.vision_shape)
            initialization.copy_(module.freqs_cos, cos)
            initialization.copy_(module.freqs_sin, sin)

    def get_input_embeddings(self) -> nn.Embedding:
        """The word embeddings, which transformers resizes and PEFT hooks into."""
        return self.bge_embeddings.word_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Other word embeddings; the config follows their number."""
        self.bge_embeddings.word_embeddings = value  # type: ignore[assignment]
        self.config.vocab_size = self.bge_embeddings.word_embeddings.num_embeddings


def with_parts_of(network: Encodes) -> VisualizedBGE:
    """The model of a plain network: the same modules, and so the same weights, under transformers' class."""
    with torch.device("meta"):
        model = VisualizedBGE(VisualizedBGEConfig.of(network.config))
    for name, part in network.named_children():
        setattr(model, name, part)
    model.fingerprint = network.fingerprint
    model.train(network.training)
    return model


# transformers' Auto classes know the model as soon as this module is imported
AutoConfig.register(MODEL_TYPE, VisualizedBGEConfig, exist_ok=True)
AutoModel.register(VisualizedBGEConfig, VisualizedBGE, exist_ok=True)
AutoProcessor.register(VisualizedBGEConfig, VisualizedBGEProcessor, exist_ok=True)
