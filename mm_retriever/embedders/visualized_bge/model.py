"""The Visualized BGE model: a text, an image, or both into one vector.

An image's tokens from the EVA02 tower go between [CLS] and the words of a BERT or XLM-RoBERTa encoder; the vector is
that encoder's output at [CLS], L2-normalised. Module attributes keep the checkpoint's names.

Source: VISTA (arXiv:2406.04292), FlagEmbedding research/visual_bge (github.com/FlagOpen/FlagEmbedding at 7ed43d67,
MIT). Rewritten; checked against its outputs stage by stage.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel, initialization
from transformers.models.bert.modeling_bert import BertLayer

from mm_retriever.devices import input_device
from mm_retriever.embedders.visualized_bge.config import BgeTextConfig, VisualizedBGEConfig
from mm_retriever.embedders.visualized_bge.eva_vit import (
    EvaVisionTower,
    RotaryPositions,
    attend,
    rope_frequencies,
    split_heads,
)


class TextEmbeddings(nn.Module):
    """The text side's embedding tables and LayerNorm, which image tokens pass through too."""

    def __init__(self, config: BgeTextConfig) -> None:
        super().__init__()
        self.first_position = config.first_position
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, input_ids: Tensor, image_tokens: Tensor | None = None) -> Tensor:
        """(B, T, D) of a text alone, or (B, 1 + N + T - 1, D) with ``image_tokens`` (B, N, D) after [CLS]."""
        words = self.word_embeddings(input_ids) + self.token_type_embeddings(input_ids.new_zeros(()))
        first = self.first_position
        if image_tokens is not None:
            # parity: image tokens get no token type, and positions start at 0 even for XLM-R
            words, first = torch.cat((words[:, :1], image_tokens, words[:, 1:]), dim=1), 0
        positions = torch.arange(first, first + words.shape[1], device=input_ids.device)
        hidden_states = words + self.position_embeddings(positions)
        normed: Tensor = self.dropout(self.LayerNorm(hidden_states))
        return normed


class EncoderLayer(BertLayer):
    """transformers' own layer and parts, called so that it may compute fewer rows than it looks at."""

    def forward(self, queries: Tensor, hidden_states: Tensor, mask: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """The rows in ``queries`` (B, Q, D), which look at all ``hidden_states`` (B, T, D)."""
        own = self.attention.self
        query, key, value = (
            split_heads(projected, own.attention_head_size)
            for projected in (own.query(queries), own.key(hidden_states), own.value(hidden_states))
        )
        mask = None if mask is None else mask.to(query.device)
        context = attend(query, key, value, mask=mask, dropout=own.dropout.p if self.training else 0.0)
        attended = self.attention.output(context, queries)
        hidden: Tensor = self.output(self.intermediate(attended), attended)
        return hidden


class TextEncoder(nn.Module):
    """BERT's layers, the last of which computes only what [CLS] needs."""

    def __init__(self, config: BgeTextConfig) -> None:
        super().__init__()
        layers = (EncoderLayer(config.layer_config()) for _ in range(config.num_hidden_layers))  # type: ignore[no-untyped-call]
        self.layer = nn.ModuleList(layers)

    def forward(self, hidden_states: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, T, D) -> (B, D), the output at the first token; ``mask`` (B, 1, 1, T) is True where there is a token."""
        for layer in self.layer[:-1]:
            hidden_states = layer(hidden_states, hidden_states, mask)
        last: Tensor = self.layer[-1](hidden_states[:, :1], hidden_states, mask)
        return last[:, 0]


class VisualizedBGE(PreTrainedModel):
    """Every ``encode_*`` returns (B, D), float32, L2-normalised, differentiable."""

    config_class = VisualizedBGEConfig
    base_model_prefix = ""
    main_input_name = "pixel_values"
    _no_split_modules = ["Block", "EncoderLayer", "TextEmbeddings"]  # noqa: RUF012 - as transformers declares it
    supports_gradient_checkpointing = True

    fingerprint: str = ""  # of the weights that were loaded, before any rounding: tells one set from another

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

    def get_input_embeddings(self) -> nn.Embedding:
        """The word embeddings, which transformers resizes and PEFT hooks into."""
        return self.bge_embeddings.word_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Other word embeddings; the config follows their number."""
        self.bge_embeddings.word_embeddings = value  # type: ignore[assignment]
        self.config.vocab_size = value.num_embeddings

    @property
    def input_device(self) -> torch.device:
        """Where inputs go: beside the weights, or, where those are offloaded, the CPU."""
        return input_device(self.bge_embeddings.LayerNorm.weight)

    def image_tokens(self, pixel_values: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, N, D): an image as tokens of the text side, without the tower's own CLS."""
        tokens: Tensor = self.visual_proj(self.model_visual["visual"](pixel_values.to(self.dtype))[:, 1:])
        return tokens

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Vectors of texts; ``attention_mask`` is 0 after the end of a text."""
        return normalized(self.bge_encoder(self.bge_embeddings(input_ids), key_mask(attention_mask)))

    def encode_image(self, pixel_values: Tensor) -> Tensor:
        """Vectors of images: in the original, an image alone is an image beside an empty text."""
        text = self.config.text_shape
        empty = torch.tensor([[text.cls_token_id, text.sep_token_id]], device=pixel_values.device)
        return self.encode_multimodal(pixel_values, empty.expand(len(pixel_values), -1))

    def encode_multimodal(
        self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor | None = None
    ) -> Tensor:
        """Vectors of image-text pairs, row by row."""
        return self.encode_beside(self.image_tokens(pixel_values), input_ids, attention_mask)

    def encode_beside(self, image_tokens: Tensor, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """As :meth:`encode_multimodal`, from :meth:`image_tokens`: an image beside many texts is encoded once."""
        mask = key_mask(attention_mask, image_tokens=image_tokens.shape[1])
        return normalized(self.bge_encoder(self.bge_embeddings(input_ids, image_tokens), mask))

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


def normalized(vectors: Tensor) -> Tensor:
    """Rows of length 1, float32 whatever the model computes in: a half-precision row would not have length 1."""
    return F.normalize(vectors.float(), dim=-1)


def key_mask(attention_mask: Tensor | None, *, image_tokens: int = 0) -> Tensor | None:
    """(B, 1, 1, T) bool for attention, or None when nothing is padded: attention without a mask is faster."""
    if attention_mask is None or bool(attention_mask.all()):
        return None
    mask = attention_mask.bool()
    seen = mask.new_ones(len(mask), image_tokens)
    return torch.cat((mask[:, :1], seen, mask[:, 1:]), dim=1)[:, None, None, :]  # (B, 1, 1, T)


AutoModel.register(VisualizedBGEConfig, VisualizedBGE, exist_ok=True)
