"""The MagicLens model: a CLIP's image and text vectors as two tokens of a small transformer, pooled by attention.

Source: MagicLens (arXiv:2403.19651), ``model.py`` and ``layers.py`` of github.com/google-deepmind/magiclens at 5135f58b
(Apache-2.0), with the CLIP of github.com/google-research/scenic. Rewritten in torch; checked against its outputs stage
by stage. Modules have the original's names; tensors are those of ``nn.Linear`` and ``nn.LayerNorm``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel

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
    """Attention with capped logits; with ``per_dim_scale`` a query's scale is learned, number by number."""

    def __init__(self, width: int, inner: int, heads: int, *, per_dim_scale: bool) -> None:
        super().__init__()
        self.heads, self.head_width = heads, inner // heads
        self.query = nn.Linear(width, inner)
        self.key = nn.Linear(width, inner)
        self.value = nn.Linear(width, inner)
        self.post = nn.Linear(inner, width)
        self.per_dim_scale = nn.Parameter(torch.ones(self.head_width)) if per_dim_scale else None

    def forward(self, queries: Tensor, hidden_states: Tensor) -> Tensor:
        """(B, Q, D) that look at (B, T, D) -> (B, Q, D)."""
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
    """The MLP of a layer, with its LayerNorm and the way around it."""

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
    """CLIP, and what makes one vector of its two."""

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
    """What a `config.json` of ours says, told from the shapes of a flax checkpoint; its files come without a config.

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
