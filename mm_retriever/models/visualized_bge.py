"""Visualized BGE: text, a picture, or both into one vector. Owns preprocessing and model; knows nothing of LlamaIndex.

A picture's tokens from the EVA02 tower go between [CLS] and the words of a BERT or XLM-RoBERTa encoder; the vector is
that encoder's output at [CLS], L2-normalised. Module attributes keep the checkpoint's names.

Source: VISTA (arXiv:2406.04292), FlagEmbedding research/visual_bge (github.com/FlagOpen/FlagEmbedding at 7ed43d67,
MIT). Rewritten; checked against its outputs stage by stage.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import BertConfig, PreTrainedModel, initialization
from transformers.configuration_utils import PreTrainedConfig
from transformers.models.bert.modeling_bert import BertLayer

from mm_retriever.models.eva_vit import (
    EvaVisionConfig,
    EvaVisionTower,
    RotaryPositions,
    attend,
    rope_frequencies,
    split_heads,
)

PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)  # CLIP's, of RGB in 0..1
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True, kw_only=True)
class BgeTextConfig:
    """Shape of the text side; the defaults are bge-base-en-v1.5. ``model_type``: "bert" or "xlm-roberta"."""

    model_type: str = "bert"
    vocab_size: int = 30_522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    pad_token_id: int = 0
    cls_token_id: int = 101
    sep_token_id: int = 102
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.model_type not in ("bert", "xlm-roberta"):
            raise ValueError(f"text model_type {self.model_type!r} is not one of 'bert', 'xlm-roberta'")

    @property
    def first_position(self) -> int:
        """Position of the first token of a text alone: XLM-R counts from behind its padding index."""
        return self.pad_token_id + 1 if self.model_type == "xlm-roberta" else 0

    def layer_config(self) -> BertConfig:
        """What transformers' ``BertLayer`` wants to know; XLM-R's layers are the same."""
        return BertConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            num_attention_heads=self.num_attention_heads,
            intermediate_size=self.intermediate_size,
            layer_norm_eps=self.layer_norm_eps,
            hidden_dropout_prob=self.dropout,
            attention_probs_dropout_prob=self.dropout,
        )


class VisualizedBGEConfig(PreTrainedConfig):
    """``vision`` and ``text`` hold the fields of :class:`EvaVisionConfig` and :class:`BgeTextConfig` as plain dicts."""

    model_type = "visualized_bge"

    def __init__(
        self,
        vision: Mapping[str, Any] | EvaVisionConfig | None = None,
        text: Mapping[str, Any] | BgeTextConfig | None = None,
        **kwargs: Any,
    ) -> None:
        vision = vision if isinstance(vision, EvaVisionConfig) else EvaVisionConfig(**(vision or {}))
        text = text if isinstance(text, BgeTextConfig) else BgeTextConfig(**(text or {}))
        self.vision: dict[str, Any] = {**asdict(vision), "stem_channels": list(vision.stem_channels)}
        self.text: dict[str, Any] = asdict(text)
        super().__init__(**kwargs)

    @property
    def vision_shape(self) -> EvaVisionConfig:
        """``vision`` as a frozen dataclass."""
        return EvaVisionConfig(**self.vision)

    @property
    def text_shape(self) -> BgeTextConfig:
        """``text`` as a frozen dataclass."""
        return BgeTextConfig(**self.text)

    @property
    def dimension(self) -> int:
        """Length of an embedding."""
        return int(self.text["hidden_size"])

    def room(self, *, beside_image: bool = False) -> int:
        """Most text tokens the position table has room for, [CLS] and [SEP] counted."""
        text = self.text_shape
        # parity: beside a picture the original counts positions from 0, XLM-R's offset or not
        taken = self.vision_shape.patches if beside_image else text.first_position
        return text.max_position_embeddings - taken


class TextEmbeddings(nn.Module):
    """The text side's embedding tables and LayerNorm, which picture tokens pass through too."""

    def __init__(self, config: BgeTextConfig) -> None:
        super().__init__()
        self.first_position = config.first_position
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, input_ids: Tensor, image_tokens: Tensor | None = None) -> Tensor:
        """(B, T, D) of a text alone, or (B, 1 + N + T - 1, D) with ``image_tokens`` (B, N, D) behind [CLS]."""
        words = self.word_embeddings(input_ids) + self.token_type_embeddings.weight[0]
        positions = self.position_embeddings.weight
        if image_tokens is None:
            hidden_states = words + positions[self.first_position : self.first_position + words.shape[1]]
        else:
            # parity: picture tokens get no token type, and positions start at 0 even for XLM-R
            hidden_states = torch.cat((words[:, :1], image_tokens, words[:, 1:]), dim=1)
            hidden_states = hidden_states + positions[: hidden_states.shape[1]]
        normed: Tensor = self.dropout(self.LayerNorm(hidden_states))
        return normed


class TextEncoder(nn.Module):
    """BERT's layers: transformers' own modules, run so that the last layer computes only what [CLS] needs."""

    def __init__(self, config: BgeTextConfig) -> None:
        super().__init__()
        self.layer = nn.ModuleList(BertLayer(config.layer_config()) for _ in range(config.num_hidden_layers))

    def forward(self, hidden_states: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, T, D) -> (B, D), the output at the first token; ``mask`` (B, 1, 1, T) is True where there is a token."""
        for layer in self.layer[:-1]:
            hidden_states = encoder_layer(layer, hidden_states, hidden_states, mask)
        return encoder_layer(self.layer[-1], hidden_states[:, :1], hidden_states, mask)[:, 0]


def encoder_layer(layer: Any, queries: Tensor, hidden_states: Tensor, mask: Tensor | None) -> Tensor:
    """One BERT layer for the rows in ``queries``, which look at all ``hidden_states``."""
    own = layer.attention.self

    query, key, value = (
        split_heads(projected, own.attention_head_size)
        for projected in (own.query(queries), own.key(hidden_states), own.value(hidden_states))
    )
    context = attend(query, key, value, mask=mask, dropout=own.dropout.p if layer.training else 0.0)
    attended = layer.attention.output(context, queries)
    hidden: Tensor = layer.output(layer.intermediate(attended), attended)
    return hidden


class VisualizedBGE(PreTrainedModel):
    """Every ``encode_*`` returns (B, D), L2-normalised, differentiable."""

    config_class = VisualizedBGEConfig
    base_model_prefix = ""
    main_input_name = "pixel_values"
    _no_split_modules = ["Block", "BertLayer"]  # noqa: RUF012

    def __init__(self, config: VisualizedBGEConfig) -> None:
        super().__init__(config)
        vision, text = config.vision_shape, config.text_shape
        self.bge_embeddings = TextEmbeddings(text)
        self.bge_encoder = TextEncoder(text)
        self.model_visual = nn.ModuleDict({"visual": EvaVisionTower(vision)})
        self.visual_proj = nn.Linear(vision.width, text.hidden_size)
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

    def image_tokens(self, pixel_values: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, N, D): a picture as tokens of the text side, without the tower's own CLS."""
        tokens: Tensor = self.visual_proj(self.model_visual["visual"](pixel_values.to(self.dtype))[:, 1:])
        return tokens

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Vectors of texts; ``attention_mask`` is 0 behind the end of a text."""
        cls = self.bge_encoder(self.bge_embeddings(input_ids), key_mask(attention_mask))
        return F.normalize(cls, dim=-1)

    def encode_image(self, pixel_values: Tensor) -> Tensor:
        """Vectors of pictures: the original's picture alone is a picture beside an empty text."""
        text = self.config.text_shape
        empty = torch.tensor([[text.cls_token_id, text.sep_token_id]], device=pixel_values.device)
        return self.encode_multimodal(pixel_values, empty.expand(len(pixel_values), -1))

    def encode_multimodal(
        self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor | None = None
    ) -> Tensor:
        """Vectors of picture-and-text pairs, row by row."""
        tokens = self.image_tokens(pixel_values)
        mask = key_mask(attention_mask, image_tokens=tokens.shape[1])
        return F.normalize(self.bge_encoder(self.bge_embeddings(input_ids, tokens), mask), dim=-1)

    def forward(
        self,
        pixel_values: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Whichever ``encode_*`` fits what is given."""
        if pixel_values is None:
            if input_ids is None:
                raise ValueError("neither pixel_values nor input_ids given; pass one of them, or both")
            return self.encode_text(input_ids, attention_mask)
        if input_ids is None:
            return self.encode_image(pixel_values)
        return self.encode_multimodal(pixel_values, input_ids, attention_mask)


def key_mask(attention_mask: Tensor | None, *, image_tokens: int = 0) -> Tensor | None:
    """(B, 1, 1, T) bool for attention, or None when nothing is padded: attention without a mask is faster."""
    if attention_mask is None or bool(attention_mask.all()):
        return None
    mask = attention_mask.bool()
    seen = mask.new_ones(len(mask), image_tokens)
    return torch.cat((mask[:, :1], seen, mask[:, 1:]), dim=1)[:, None, None, :]  # (B, 1, 1, T)


class VisualizedBGEProcessor:
    """Pictures to ``pixel_values``, texts to ``input_ids`` and ``attention_mask``; threads may share it.

    Args:
        config: of the model that will read the output.
        tokenizer: a ``tokenizers.Tokenizer``, or the path of its ``tokenizer.json``.
    """

    def __init__(self, config: VisualizedBGEConfig, tokenizer: Tokenizer | str | Path) -> None:
        self.config = config
        self.tokenizer = tokenizer if isinstance(tokenizer, Tokenizer) else Tokenizer.from_file(str(tokenizer))
        self.tokenizer.no_truncation()  # a file may carry both; lengths depend on what stands beside the text
        self.tokenizer.no_padding()

    def pixel_values(self, images: Sequence[Image.Image]) -> Tensor:
        """(B, 3, H, W) float32 of pictures of any size and mode."""
        side = self.config.vision_shape.image_size
        pixels = np.empty((len(images), side, side, 3), dtype=np.uint8)
        for row, image in enumerate(images):
            pixels[row] = np.asarray(crop_square(image, side))
        values = torch.from_numpy(pixels).permute(0, 3, 1, 2).to(torch.float32).contiguous()  # (B, 3, H, W)
        mean, std = (torch.tensor(channel).view(3, 1, 1) for channel in (PIXEL_MEAN, PIXEL_STD))
        return values.div_(255).sub_(mean).div_(std)

    def tokens(self, texts: Sequence[str], *, beside_image: bool = False) -> dict[str, Tensor]:
        """``input_ids`` and ``attention_mask``, each (B, T), padded on the right to the longest text.

        A text too long for the room there is loses its end, as the tokenizer's own truncation would have it.
        """
        room = self.config.room(beside_image=beside_image)
        rows = [encoding.ids for encoding in self.tokenizer.encode_batch(list(texts))]
        rows = [ids if len(ids) <= room else [*ids[: room - 1], ids[-1]] for ids in rows]
        longest = max(map(len, rows), default=0)
        input_ids = torch.full((len(rows), longest), self.config.text_shape.pad_token_id)
        attention_mask = torch.zeros_like(input_ids)
        for row, ids in enumerate(rows):
            input_ids[row, : len(ids)] = torch.tensor(ids)
            attention_mask[row, : len(ids)] = 1
        return {"input_ids": input_ids, "attention_mask": attention_mask}


def crop_square(image: Image.Image, side: int) -> Image.Image:
    """RGB of ``side`` x ``side``: the short side resized to it, the middle cut out.

    Source: torchvision's Resize (bicubic, antialias) and CenterCrop, in the order of EVA-CLIP transform.py.
    """
    if image.mode not in ("RGB", "L", "CMYK"):
        image = image.convert("RGB")
    width, height = image.size
    short, long = min(width, height), max(width, height)
    resized_long = int(side * long / short)
    # parity: the original resizes in the file's own mode and converts to RGB only afterwards
    size = (side, resized_long) if width <= height else (resized_long, side)
    image = image.resize(size, Image.Resampling.BICUBIC)
    left, top = round((size[0] - side) / 2), round((size[1] - side) / 2)
    return image.crop((left, top, left + side, top + side)).convert("RGB")
