"""The EVA02 vision tower: a batch of images in, all tokens after the last block out. Knows nothing of text or files.

Only the branch that Visualized BGE runs: pre-norm blocks with sub-LayerNorm, rotary positions, SwiGLU; no final norm,
no head, no pooling. Module attributes keep the checkpoint's names.

Source: EVA-CLIP (github.com/baaivision/EVA, MIT; arXiv:2303.15389) as shipped in FlagEmbedding research/visual_bge
(github.com/FlagOpen/FlagEmbedding at 7ed43d67, MIT; arXiv:2406.04292). Rewritten; checked against its outputs stage by
stage.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LAYER_NORM_EPS = 1e-6
ROPE_BASE = 10_000.0
MAX_LAYERS = 256
MAX_SIZE = 10_000_000
PLAIN_ATTENTION_SCORES = 2**25  # scores of one layer that may stand in memory at once: 64 MiB in bfloat16


_KINDS: dict[str, type | tuple[type, ...]] = {"int": int, "float": (int, float), "str": str}


def check_sizes(config: Any) -> None:
    """Raises ValueError for a value in a config dataclass that no model has: configs are untrusted."""
    for name, kind in type(config).__annotations__.items():
        value = getattr(config, name)
        if not isinstance(value, _KINDS[kind]):
            raise ValueError(f"{name} {value!r} is no {kind}")
        most = MAX_LAYERS if name.endswith("layers") else MAX_SIZE
        least = 0 if name.endswith("_id") else 1
        if isinstance(value, bool) or (isinstance(value, int) and not least <= value <= most):
            raise ValueError(f"{name} {value!r} is not between {least} and {most:,}")


@dataclass(frozen=True, kw_only=True)
class EvaVisionConfig:
    """Shape of the tower; the defaults are EVA02-CLIP-B-16 of bge-visualized-base-en-v1.5."""

    image_size: int = 224
    patch_size: int = 16
    width: int = 768
    layers: int = 12
    head_width: int = 64
    mlp_ratio: float = 2.6667
    rope_sequence_length: int = 16

    def __post_init__(self) -> None:
        check_sizes(self)
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}")
        if self.width % self.head_width or self.head_width % 4:
            raise ValueError(f"width {self.width} needs heads of {self.head_width}, a multiple of 4, that divide it")

    @property
    def grid(self) -> int:
        """Patches along one side."""
        return self.image_size // self.patch_size

    @property
    def patches(self) -> int:
        """Patch tokens of one image, without CLS."""
        return self.grid**2


def rope_frequencies(config: EvaVisionConfig) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every patch position, each (grid * grid, head_width), float32.

    The first half of a head turns with the row, the second with the column; each angle stands twice, interleaved.

    Source: ``VisionRotaryEmbeddingFast`` of EVA-CLIP rope.py.
    """
    half = config.head_width // 2
    frequencies = 1.0 / (ROPE_BASE ** (torch.arange(0, half, 2)[: half // 2].float() / half))
    positions = torch.arange(config.grid) / config.grid * config.rope_sequence_length
    angles = (positions[:, None] * frequencies).repeat_interleave(2, dim=-1)  # (grid, half)
    rows = angles[:, None, :].expand(config.grid, config.grid, half)
    columns = angles[None, :, :].expand(config.grid, config.grid, half)
    angles = torch.cat((rows, columns), dim=-1).reshape(config.patches, config.head_width)
    return angles.cos(), angles.sin()


class RotaryPositions(nn.Module):
    """The checkpoint's tables of angles, as the complex numbers that turn queries and keys by their place."""

    freqs_cos: Tensor
    freqs_sin: Tensor

    def __init__(self, config: EvaVisionConfig) -> None:
        super().__init__()
        self.heads = config.width // config.head_width
        cos = torch.empty(config.patches, config.head_width)
        sin = torch.empty_like(cos)  # a tensor in two places would be a shared weight
        if not cos.is_meta:  # there it has no numbers, and torch would load its compiler for the shapes alone
            cos, sin = rope_frequencies(config)
        self.register_buffer("freqs_cos", cos)
        self.register_buffer("freqs_sin", sin)

    def forward(self) -> Tensor:
        """(1 + patches, width / 2) complex64, the same for every head; CLS, the first token, is not turned.

        Traced: (1 + patches, width / 2, 2), because graphs of other libraries have no complex numbers.
        """
        cos, sin = self.freqs_cos[:, ::2].float(), self.freqs_sin[:, ::2].float()
        if torch.jit.is_tracing():  # type: ignore[attr-defined,no-untyped-call]
            cos = torch.cat((torch.ones_like(cos[:1]), cos)).repeat(1, self.heads)
            sin = torch.cat((torch.zeros_like(sin[:1]), sin)).repeat(1, self.heads)
            return torch.stack((cos, sin), dim=-1)
        turns = torch.complex(cos, sin)
        return torch.cat((torch.ones_like(turns[:1]), turns)).repeat(1, self.heads)


def rotate(projected: Tensor, turns: Tensor) -> Tensor:
    """(B, N, D) with every pair (x0, x1) turned as the complex number x0 + i x1: one pass, in float32."""
    if not turns.is_complex():
        x0, x1 = projected.view(*projected.shape[:-1], -1, 2).unbind(-1)
        cos, sin = turns.unbind(-1)
        return torch.stack((x0 * cos - x1 * sin, x0 * sin + x1 * cos), dim=-1).flatten(-2)
    pairs = torch.view_as_complex(projected.float().view(*projected.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * turns).flatten(-2).to(projected.dtype)


def split_heads(states: Tensor, head_width: int) -> Tensor:
    """(B, N, D) -> (B, N, H, head_width)."""
    return states.view(*states.shape[:-1], -1, head_width)


def attend(query: Tensor, key: Tensor, value: Tensor, *, mask: Tensor | None = None, dropout: float = 0.0) -> Tensor:
    """Softmax attention over (B, N, H, head); returns (B, N, D). ``mask`` (B, 1, 1, N) is True where a key counts."""
    query, key, value = (heads.transpose(1, 2) for heads in (query, key, value))  # (B, H, N, head)
    scores = query.shape[0] * query.shape[1] * query.shape[2] * key.shape[2]
    if query.dtype == torch.bfloat16 and query.device.type == "cpu" and scores <= PLAIN_ATTENTION_SCORES:
        # two plain products run at three times the rate of torch's CPU flash kernel in bfloat16
        weights = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
        if mask is not None:
            weights = weights.masked_fill(~mask, -torch.inf)
        context = F.dropout(weights.softmax(-1), dropout) @ value
    else:
        context = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)
    return context.transpose(1, 2).flatten(2)  # (B, N, D)


class Attention(nn.Module):
    """Self-attention with rotary positions and a LayerNorm before the output projection; keys have no bias."""

    def __init__(self, config: EvaVisionConfig) -> None:
        super().__init__()
        width = config.width
        self.head_width = config.head_width
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.inner_attn_ln = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.proj = nn.Linear(width, width)

    def forward(self, hidden_states: Tensor, turns: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D); ``turns`` as :class:`RotaryPositions` returns them."""
        # each projection is called as a module, never by its weight: offloading, adapters and quantisation hang there
        query = rotate(self.q_proj(hidden_states) + self.q_bias, turns)
        key = rotate(self.k_proj(hidden_states), turns)
        value = self.v_proj(hidden_states) + self.v_bias
        context = attend(*(split_heads(states, self.head_width) for states in (query, key, value)))
        projected: Tensor = self.proj(self.inner_attn_ln(context))
        return projected


class SwiGLU(nn.Module):
    """Gated MLP with a LayerNorm before the output projection."""

    def __init__(self, config: EvaVisionConfig) -> None:
        super().__init__()
        hidden = int(config.width * config.mlp_ratio)
        self.w1 = nn.Linear(config.width, hidden)
        self.w2 = nn.Linear(config.width, hidden)
        self.ffn_ln = nn.LayerNorm(hidden, eps=LAYER_NORM_EPS)
        self.w3 = nn.Linear(hidden, config.width)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        projected: Tensor = self.w3(self.ffn_ln(F.silu(self.w1(hidden_states)) * self.w2(hidden_states)))
        return projected


class CheckpointedLayer(nn.Module):
    """A layer that can be computed twice, for less memory: transformers sets these two where it finds the first."""

    gradient_checkpointing = False
    _gradient_checkpointing_func: Any = None

    def __call__(self, *inputs: Any) -> Any:
        """As of any module; while gradients are checkpointed, again on the way back."""
        if self.gradient_checkpointing and self.training:
            return self._gradient_checkpointing_func(super().__call__, *inputs)
        return super().__call__(*inputs)


class Block(CheckpointedLayer):
    """One pre-norm layer: attention, then MLP, each added to what came in."""

    def __init__(self, config: EvaVisionConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width, eps=LAYER_NORM_EPS)
        self.attn = Attention(config)
        self.norm2 = nn.LayerNorm(config.width, eps=LAYER_NORM_EPS)
        self.mlp = SwiGLU(config)

    def forward(self, hidden_states: Tensor, turns: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        hidden_states = hidden_states + self.attn(self.norm1(hidden_states), turns)
        hidden_states = hidden_states + self.mlp(self.norm2(hidden_states))
        return hidden_states  # noqa: RET504 (the two lines are one pattern)


class PatchStem(nn.Module):
    """One convolution as large as its stride: the original's patch embedding."""

    def __init__(self, config: EvaVisionConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, config.width, config.patch_size, stride=config.patch_size)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, N, D)."""
        patches: Tensor = self.proj(pixel_values).flatten(2).transpose(1, 2)  # (B, N, D), row-major
        return patches


class EvaVisionTower(nn.Module):
    """The whole tower: CLS and patch tokens straight after the last block."""

    def __init__(self, config: EvaVisionConfig) -> None:
        super().__init__()
        self.config = config
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + config.patches, config.width))
        self.patch_embed = PatchStem(config)
        self.rope = RotaryPositions(config)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, 1 + N, D)."""
        side = self.config.image_size
        if pixel_values.shape[1:] != (3, side, side):
            raise ValueError(f"pixel_values of shape {tuple(pixel_values.shape)}, expected (B, 3, {side}, {side})")
        patches = self.patch_embed(pixel_values)
        hidden_states = torch.cat((self.cls_token.expand(patches.shape[0], -1, -1), patches), dim=1) + self.pos_embed
        turns = self.rope()
        for block in self.blocks:
            hidden_states = block(hidden_states, turns)
        return hidden_states
