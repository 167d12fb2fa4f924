"""`MagicLensEncoder`: a MagicLens as an `Embedder`. An image alone is an image with the empty text.

The model is a CLIP's image and text vectors as two tokens of a small transformer, pooled by attention. Where the
original crashes on a text of more than 77 tokens, the end token stays and the rest is cut off: the log says so once.

Source: MagicLens (arXiv:2403.19651), ``model.py``, ``layers.py``, ``data_utils.py`` and ``inference.py`` of
github.com/google-deepmind/magiclens at 5135f58b (Apache-2.0), with the CLIP of github.com/google-research/scenic.
Rewritten in torch; checked against its outputs stage by stage. Modules have the original's names; tensors are those of
``nn.Linear`` and ``nn.LayerNorm``.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel

from mm_retriever.checkpoint import ModelFiles, read_json, read_state_dict
from mm_retriever.embedders.clip import (
    TOKENIZER_REPO,
    ClipEncoder,
    check_sizes,
    clip_config,
    clip_tokenizer,
    config_content,
    convert_clip,
    filled,
)
from mm_retriever.embedders.embedder import Content
from mm_retriever.embedders.folder import find_tokenizer, original_fingerprint
from mm_retriever.embedders.magiclens.flax_file import from_flax, read_flax_file
from mm_retriever.errors import CheckpointError, QueryError, reason_of
from mm_retriever.images.square import CLIP_MEAN, CLIP_STD

CAP = 50.0  # attention logits stay between -CAP and CAP
EPS = 1e-6
POOL_WIDTH = 4  # times the width of the vectors: all heads of the pooling together


@dataclass(frozen=True, kw_only=True)
class MagicLensConfig:
    """Shape of a MagicLens.

    Args:
        clip: of its CLIP.
        num_layers: of the transformer over the two vectors.
        num_heads: of that and of the pooling.
        ff_hidden_size: of that transformer's MLPs.
    """

    clip: CLIPConfig
    num_layers: int = 4
    num_heads: int = 8
    ff_hidden_size: int = 2048

    @property
    def dimension(self) -> int:
        """Length of a vector."""
        return int(self.clip.projection_dim or 0)


class Attention(nn.Module):
    """Attention with capped logits; with ``per_dim_scale`` each number of a query has a learned scale."""

    def __init__(self, width: int, inner: int, heads: int, *, per_dim_scale: bool) -> None:
        super().__init__()
        self.heads, self.head_width = heads, inner // heads
        self.query = nn.Linear(width, inner)
        self.key = nn.Linear(width, inner)
        self.value = nn.Linear(width, inner)
        self.post = nn.Linear(inner, width)
        self.per_dim_scale = nn.Parameter(torch.ones(self.head_width)) if per_dim_scale else None

    def forward(self, queries: Tensor, hidden_states: Tensor) -> Tensor:
        """(B, Q, D) that attend to (B, T, D) -> (B, Q, D)."""
        query, key, value = self.query(queries), self.key(hidden_states), self.value(hidden_states)
        query, key, value = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (query, key, value))
        if self.per_dim_scale is None:
            query = query * self.head_width**-0.5
        else:  # softplus(0) is 1 / 1.442695041
            query = query * (1.442695041 / math.sqrt(self.head_width) * F.softplus(self.per_dim_scale))
        logits = CAP * torch.tanh(query @ key.transpose(-1, -2) / CAP)  # (B, heads, Q, T)
        attended: Tensor = self.post((logits.softmax(-1) @ value).transpose(1, 2).flatten(2))
        return attended


class FeedForward(nn.Module):
    """The MLP of a layer, with its LayerNorm and residual connection."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.layer_norm = nn.LayerNorm(width, eps=EPS)
        self.ffn_layer1 = nn.Linear(width, inner)
        self.ffn_layer2 = nn.Linear(inner, width)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        inner = self.ffn_layer1(self.layer_norm(hidden_states)).relu()
        out: Tensor = hidden_states + self.ffn_layer2(inner)
        return out


class Layer(nn.Module):
    """One pre-norm layer over the image's and the text's vector."""

    def __init__(self, config: MagicLensConfig) -> None:
        super().__init__()
        width = config.dimension
        self.layer_norm = nn.LayerNorm(width, eps=EPS)
        self.self_attention = Attention(width, width, config.num_heads, per_dim_scale=False)
        self.ff_layer = FeedForward(width, config.ff_hidden_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(B, 2, D) -> (B, 2, D)."""
        normed = self.layer_norm(hidden_states)
        out: Tensor = self.ff_layer(hidden_states + self.self_attention(normed, normed))
        return out


class Pooler(nn.Module):
    """Attention of one learned query."""

    def __init__(self, config: MagicLensConfig) -> None:
        super().__init__()
        width = config.dimension
        self.pooling_attn_query = nn.Parameter(torch.zeros(1, width))
        self.pool_attn = Attention(width, POOL_WIDTH * width, config.num_heads, per_dim_scale=True)
        self.pool_attn_ln = nn.LayerNorm(width, eps=EPS)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(B, T, D) -> (B, 1, D)."""
        query = self.pooling_attn_query.expand(len(hidden_states), -1, -1)
        pooled: Tensor = self.pool_attn_ln(self.pool_attn(query, hidden_states))
        return pooled


class MagicLens(nn.Module):
    """CLIP, and the layers that join its two vectors into one."""

    def __init__(self, config: MagicLensConfig) -> None:
        super().__init__()
        self.config = config
        self.clip = CLIPModel(config.clip)
        self.multimodal_encoder = nn.ModuleList(Layer(config) for _ in range(config.num_layers))
        self.contrastive_multimodal_pooler = Pooler(config)

    def compose(self, image_features: Tensor, text_features: Tensor) -> Tensor:
        """(B, D) and (B, D) of CLIP, not normalised -> (B, D), not normalised."""
        hidden_states = torch.stack((image_features, text_features), dim=1).to(self.clip.dtype)  # (B, 2, D)
        for layer in self.multimodal_encoder:
            hidden_states = layer(hidden_states)
        pooled: Tensor = self.contrastive_multimodal_pooler(hidden_states)[:, 0]
        return pooled


def config_of_shapes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Return the content of `config.json`, inferred from the shapes of a flax checkpoint, which has no config.

    Raises:
        KeyError: a tensor is missing.
        ValueError: a tensor has another number of dimensions.
    """

    def layers(prefix: str) -> int:
        return len({key[len(prefix) :].partition("/")[0] for key in shapes if key.startswith(prefix)})

    def side(name: str) -> dict[str, Any]:
        blocks = f"params/clip/{name}/transformer/resblocks_"
        width, heads, _ = shapes[f"{blocks}0/attn/query/kernel"]
        _, inner = shapes[f"{blocks}0/mlp/c_fc/kernel"]
        sizes = {"hidden_size": width, "intermediate_size": inner, "num_attention_heads": heads}
        return sizes | {"num_hidden_layers": layers(blocks)}

    patch_size, *_ = shapes["params/clip/visual/conv1/kernel"]
    positions, _ = shapes["params/clip/visual/positional_embedding"]
    vocab_size, _ = shapes["params/clip/text/token_embedding/embedding"]
    room, _ = shapes["params/clip/text/positional_embedding"]
    _, dimension = shapes["params/clip/visual/proj/kernel"]
    mixer = "params/multimodal_encoder/x_layers_"
    _, num_heads, _ = shapes[f"{mixer}0/self_attention/query/w"]
    _, inner = shapes[f"{mixer}0/ff_layer/ffn_layer1/linear/w"]
    return {
        "model_type": "magiclens",
        "projection_dim": dimension,
        "text_config": side("text") | {"vocab_size": vocab_size, "max_position_embeddings": room},
        "vision_config": side("visual") | {"image_size": patch_size * math.isqrt(positions), "patch_size": patch_size},
        "num_layers": layers(mixer),
        "num_heads": num_heads,
        "ff_hidden_size": inner,
    }


FAMILY = "magiclens"
_SIZES = ("num_layers", "num_heads", "ff_hidden_size")


class MagicLensEncoder(ClipEncoder):
    """Images, and images with a text.

    Args:
        model: ready for inference.
        tokenizer: from `clip_tokenizer`.
        name: for people.
        fingerprint: of the weights, before any rounding.
    """

    def __init__(self, model: MagicLens, tokenizer: Tokenizer, *, name: str, fingerprint: str) -> None:
        self.model = model
        heads = model.contrastive_multimodal_pooler.pool_attn.heads
        super().__init__(
            model.clip, tokenizer, name=name, family=FAMILY, fingerprint=fingerprint, facts=[{"num_heads": heads}]
        )

    def prepare(self, image: Image.Image) -> NDArray[np.float32]:
        """(H, W, 3) in 0..1: the whole image resized to the model's square, divided by its own maximum.

        Floats, because the model was trained on values between the steps of 8 bits.
        """
        # Pillow's bilinear filter widens where it shrinks, as jax.image.resize(antialias=True) does
        channels = image.convert("RGB").split()
        most = max(cast(tuple[int, int], channel.getextrema())[1] for channel in channels)
        size = (self.side, self.side)
        squares = [np.asarray(channel.convert("F").resize(size, Image.Resampling.BILINEAR)) for channel in channels]
        return np.stack(squares, axis=-1).astype(np.float32, copy=False) / np.float32(most or 1)

    def pixel_values(self, images: Sequence[NDArray[np.float32]]) -> Tensor:
        """(B, 3, H, W) float32 of prepared images."""
        values = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
        mean, std = (torch.tensor(channel).view(3, 1, 1) for channel in (CLIP_MEAN, CLIP_STD))
        return (values - mean) / std

    def texts_and_images(
        self, contents: Sequence[Content]
    ) -> tuple[list[str | None], list[NDArray[np.float32] | None]]:
        """An image alone is an image with the empty text.

        Raises:
            QueryError: a content without an image.
        """
        if any(content.image is None for content in contents):
            raise QueryError(
                f"{self.name} embeds images, and images with a text, but no text alone: give an image with it, or "
                "index with a model that embeds texts too, such as BAAI/BGE-VL-base"
            )
        return [content.text for content in contents], [content.image for content in contents]

    def compose(self, text_features: Tensor, image_features: Tensor) -> Tensor:
        """(B, D), by the layers above CLIP."""
        return self.model.compose(image_features, text_features)

    def config(self) -> dict[str, Any]:
        """The content of `config.json` in a folder of this package."""
        return _folder_config(self.model.config)

    @property
    def network(self) -> nn.Module:
        """CLIP and the layers above it."""
        return self.model

    def _text_mask(self, input_ids: Tensor) -> Tensor:
        return input_ids > 0  # parity: 0 is padding to the original, though it is "!" to the tokenizer


def load_files(
    files: ModelFiles,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
) -> MagicLensEncoder:
    """The model of these files, ready for inference."""
    content, config, state = _read(files)
    model = filled(lambda: MagicLens(config), state, files, device=device, dtype=dtype)
    path = find_tokenizer(files, tokenizer, TOKENIZER_REPO)
    original = original_fingerprint(state, content)
    return MagicLensEncoder(model, clip_tokenizer(path, config.clip), name=files.name, fingerprint=original)


def convert_files(
    files: ModelFiles,
    out: str | os.PathLike[str],
    *,
    tokenizer: str | os.PathLike[str] | None = None,
    dtype: torch.dtype | str | None = None,
) -> Path:
    """Write the files of a model as a folder and return it; without ``dtype`` the floats keep their format."""
    content, config, state = _read(files)
    original = original_fingerprint(state, content)
    return convert_clip(
        lambda: MagicLens(config),
        state,
        files,
        out,
        _folder_config(config),
        original=original,
        tokenizer=tokenizer,
        dtype=dtype,
    )


def _folder_config(config: MagicLensConfig) -> dict[str, Any]:
    sizes = {name: getattr(config, name) for name in _SIZES}
    return {**config_content(config.clip), "model_type": FAMILY, **sizes}


def _read(files: ModelFiles) -> tuple[dict[str, Any], MagicLensConfig, dict[str, Tensor]]:
    source = files.config or files.weights
    try:
        if files.weights.suffix == ".pkl":
            arrays = read_flax_file(files.weights)
            content = config_of_shapes({path: tuple(array.shape) for path, array in arrays.items()})
            state = from_flax(arrays)
        elif files.config is None:
            raise CheckpointError(f"{files.weights} has no config.json beside it, which a converted MagicLens has")
        else:
            content, state = read_json(files.config), read_state_dict(files.weights)
        sizes = {name: content[name] for name in _SIZES}
        check_sizes(sizes)
    except KeyError as error:
        raise CheckpointError(f"{source} does not describe a MagicLens: it has no {error}") from error
    except (TypeError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{source} does not describe a MagicLens: {reason_of(error)}") from error
    config = MagicLensConfig(clip=clip_config(content, source), **sizes)
    if config.dimension % config.num_heads:
        raise CheckpointError(f"{source}: {config.num_heads} heads do not divide the vector's {config.dimension}")
    return content, config, state
