"""Weights that are a function of their own name, and the outputs that the original model code gave with them.

The outputs come from FlagEmbedding research/visual_bge at 7ed43d67 (torch 2.13.0, transformers 4.44.2, float32); no
real checkpoint is needed to compare two implementations.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor

from mm_retriever.embedders.visualized_bge.eva_vit import rope_frequencies
from mm_retriever.embedders.visualized_bge.model import VisualizedBGE, VisualizedBGEConfig

DATA = Path(__file__).parents[1] / "data" / "visualized_bge"
TOLERANCE = 2e-6  # the original's own float32 differs from its float64 by up to 2.4e-7


def weight(name: str, shape: tuple[int, ...]) -> Tensor:
    f32 = np.float32
    seeded = np.random.RandomState(zlib.crc32(name.encode()) & 0xFFFFFFFF)
    z = np.asarray(seeded.standard_normal(shape)).astype(f32)
    if len(shape) >= 2:
        small = "embeddings.weight" in name or name.endswith(("pos_embed", "cls_token"))
        z = z * f32(0.02) if small else z / f32(math.sqrt(math.prod(shape[1:])))
    else:
        z = f32(1) + f32(0.1) * z if name.endswith("weight") else z * f32(0.02)
    return torch.from_numpy(np.asarray(z, dtype=f32))


def fill(model: VisualizedBGE) -> VisualizedBGE:
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if "rope.freqs" not in name and tensor.is_floating_point():
                tensor.copy_(weight(name, tuple(tensor.shape)))
    model.train(False)
    return model


def official_state(config: VisualizedBGEConfig, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """A state dict in the official layout, dead tensors and repeated rope tables included."""
    cos, sin = rope_frequencies(config.vision_shape)
    tables = {"freqs_cos": cos, "freqs_sin": sin}
    state = {}
    for name, shape in shapes.items():
        table = tables.get(name.rpartition(".")[2])
        state[name] = weight(name, shape) if table is None else table
    return state


def golden(name: str) -> dict[str, NDArray[Any]]:
    with np.load(DATA / f"{name}_outputs.npz") as outputs:
        return dict(outputs)


def golden_config(name: str) -> VisualizedBGEConfig:
    original = json.loads((DATA / f"{name}_config.json").read_text())
    vision, text = original["eva"]["vision_cfg"], original["text"]
    kept = ("image_size", "patch_size", "width", "layers", "head_width")
    dropped = ("hidden_act", "bos_token_id", "eos_token_id")
    cls_token_id, sep_token_id = original["empty_text_ids"]
    return VisualizedBGEConfig(
        vision={key: vision[key] for key in kept},
        text={key: value for key, value in text.items() if key not in dropped}
        | {"model_type": original["model_type"], "cls_token_id": cls_token_id, "sep_token_id": sep_token_id},
    )


def word_tokenizer(config: VisualizedBGEConfig, words: list[str]) -> Tokenizer:
    """One id a word; [CLS], [SEP] and padding where the config has them."""
    text = config.text_shape
    special = {"[PAD]": text.pad_token_id, "[CLS]": text.cls_token_id, "[SEP]": text.sep_token_id}
    free = (number for number in range(text.vocab_size) if number not in special.values())
    vocabulary = special | {word: next(free) for word in ["[UNK]", *words]}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[(name, special[name]) for name in ("[CLS]", "[SEP]")]
    )
    return tokenizer


def small_config(**vision: Any) -> VisualizedBGEConfig:
    """Odd, distinct sizes: a swapped axis cannot pass."""
    return VisualizedBGEConfig(
        vision={"image_size": 48, "patch_size": 16, "width": 72, "layers": 2, "head_width": 24, **vision},
        text={
            "vocab_size": 90,
            "hidden_size": 40,
            "num_hidden_layers": 3,
            "num_attention_heads": 5,
            "intermediate_size": 56,
            "max_position_embeddings": 33,
            "cls_token_id": 2,
            "sep_token_id": 3,
        },
    )


def small_model(seed: int = 0, **vision: Any) -> VisualizedBGE:
    torch.manual_seed(seed)
    model = VisualizedBGE(small_config(**vision))
    with torch.no_grad():  # a fresh model's weights are too small to tell inputs apart
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.train(False)
    return model
