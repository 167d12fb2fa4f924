"""Visualized BGE in plain torch: a text, an image, or both into one vector, and the shape of a model.

An image's tokens from the EVA02 tower go between [CLS] and the words of a BERT or XLM-RoBERTa encoder; the vector is
that encoder's output at [CLS], L2-normalised. Module attributes keep the checkpoint's names. The shape comes from a
`config.json`, or is told from the tensors of an official checkpoint. Loads no transformers, whose import takes longer
than a search; `model.py` is the same for transformers.

Source: VISTA (arXiv:2406.04292), FlagEmbedding research/visual_bge (github.com/FlagOpen/FlagEmbedding at 7ed43d67,
MIT); the text side is transformers' BertLayer. Rewritten; checked against their outputs stage by stage.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mm_retriever.checkpoint import read_json
from mm_retriever.devices import input_device
from mm_retriever.embedders.visualized_bge.eva_vit import (
    CheckpointedLayer,
    EvaVisionConfig,
    EvaVisionTower,
    attend,
    check_sizes,
    split_heads,
)
from mm_retriever.errors import CheckpointError, reason_of, shown

MODEL_TYPE = "visualized_bge"
OFFICIAL_HEAD_WIDTH = 64  # of both published models; no tensor tells it


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
        check_sizes(self)
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(f"{self.num_attention_heads} attention heads do not divide hidden_size {self.hidden_size}")
        if self.model_type not in ("bert", "xlm-roberta"):
            raise ValueError(f"text model_type {self.model_type!r} is not one of 'bert', 'xlm-roberta'")

    @property
    def first_position(self) -> int:
        """Position of the first token of a text alone: XLM-R counts from after its padding index."""
        return self.pad_token_id + 1 if self.model_type == "xlm-roberta" else 0


_PATCH_STEM: Mapping[str, Any] = {"stem": "patch", "stem_channels": []}
"""What configs written by earlier versions say of the tower's stem, which there is only one of."""


def _without_stem(vision: Any) -> dict[str, Any]:
    if not isinstance(vision, Mapping):
        raise TypeError(f"vision is {type(vision).__name__}, expected an object")
    if (stem := vision.get("stem", "patch")) != "patch":
        raise ValueError(f"vision stem {stem!r} is not 'patch', the only one")
    return {key: value for key, value in vision.items() if key not in _PATCH_STEM}


class Shape:
    """Shape of a model: ``vision`` and ``text`` hold the fields of the two dataclasses as plain dicts.

    ``rounded``: fingerprint of these weights to that of those they were rounded from; says nothing of other weights.
    """

    def __init__(
        self,
        vision: Mapping[str, Any] | EvaVisionConfig | None = None,
        text: Mapping[str, Any] | BgeTextConfig | None = None,
        rounded: Mapping[str, str] | None = None,
    ) -> None:
        vision = vision if isinstance(vision, EvaVisionConfig) else EvaVisionConfig(**_without_stem(vision or {}))
        text = text if isinstance(text, BgeTextConfig) else BgeTextConfig(**(text or {}))
        self.vision: dict[str, Any] = asdict(vision)
        self.text: dict[str, Any] = asdict(text)
        self.rounded: dict[str, str] = dict(rounded or {})

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

    def inputs(self) -> dict[str, Any]:
        """Return all that decides what the weights make of their inputs, and that no tensor says."""
        vision = {**self.vision, **_PATCH_STEM}  # as fingerprints have always counted it
        return {"vision": vision, "text": {key: value for key, value in self.text.items() if key != "dropout"}}

    def room(self, *, beside_image: bool = False) -> int:
        """Most text tokens the position table has room for, [CLS] and [SEP] counted."""
        text = self.text_shape
        # parity: beside an image the original counts positions from 0, XLM-R's offset or not
        taken = self.vision_shape.patches if beside_image else text.first_position
        return text.max_position_embeddings - taken


def read_config(path: Path) -> Shape:
    """The config that a `config.json` describes.

    Raises:
        CheckpointError: it is no JSON, or describes another model.
    """
    content = read_json(path)
    if content.get("model_type") != MODEL_TYPE:
        kind = shown(content.get("model_type"))
        raise CheckpointError(f"{path} is of model_type {kind}, expected {MODEL_TYPE!r}")
    try:
        rounded = content.get("rounded") if isinstance(content.get("rounded"), dict) else None
        return Shape(vision=content.get("vision"), text=content.get("text"), rounded=rounded)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path} does not describe a Visualized BGE model: {reason_of(error)}") from error


def config_from_tensors(state: Mapping[str, Tensor], source: Path) -> Shape:
    """The shape of an official checkpoint, which comes without a config, told from its tensors."""

    def shape(key: str) -> Sequence[int]:
        if key not in state:
            raise CheckpointError(f"{source} is not a Visualized BGE checkpoint: it has no tensor {key!r}")
        return (*state[key].shape, 0, 0, 0, 0)

    def layers(pattern: str) -> int:
        return 1 + max((int(match[1]) for key in state if (match := re.match(pattern, key))), default=-1)

    vocab_size, hidden_size = shape("bge_embeddings.word_embeddings.weight")[:2]
    width, _, patch_size = shape("model_visual.visual.patch_embed.proj.weight")[:3]
    patches, head_width = shape("model_visual.visual.rope.freqs_cos")[:2]
    types = shape("bge_embeddings.token_type_embeddings.weight")[0]
    family = (
        {"model_type": "xlm-roberta", "layer_norm_eps": 1e-5, "pad_token_id": 1, "cls_token_id": 0, "sep_token_id": 2}
        if types == 1
        else {"model_type": "bert"}
    )
    try:
        return Shape(
            vision={
                "image_size": patch_size * round(patches**0.5),
                "patch_size": patch_size,
                "width": width,
                "layers": layers(r"model_visual\.visual\.blocks\.(\d{1,4})\."),
                "head_width": head_width,
            },
            text={
                "vocab_size": vocab_size,
                "hidden_size": hidden_size,
                "num_hidden_layers": layers(r"bge_encoder\.layer\.(\d{1,4})\."),
                "num_attention_heads": hidden_size // OFFICIAL_HEAD_WIDTH,
                "intermediate_size": shape("bge_encoder.layer.0.intermediate.dense.weight")[0],
                "max_position_embeddings": shape("bge_embeddings.position_embeddings.weight")[0],
                "type_vocab_size": types,
                **family,
            },
        )
    except (ValueError, ZeroDivisionError) as error:
        raise CheckpointError(
            f"{source} is not in the official layout ({error}); put a config.json beside it"
        ) from error


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


class Projection(nn.Module):
    """To the width of the encoder, added to what came in, and a LayerNorm."""

    def __init__(self, config: BgeTextConfig, width: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, hidden_states: Tensor, residual: Tensor) -> Tensor:
        """(B, T, W) and (B, T, D) -> (B, T, D)."""
        projected: Tensor = self.LayerNorm(self.dropout(self.dense(hidden_states)) + residual)
        return projected


class Intermediate(nn.Module):
    """To the inner width of the MLP, through GELU."""

    def __init__(self, config: BgeTextConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, W)."""
        activated: Tensor = F.gelu(self.dense(hidden_states))
        return activated


class EncoderLayer(CheckpointedLayer):
    """A layer of BERT, called so that it may compute fewer rows than it looks at. XLM-R's are the same."""

    def __init__(self, config: BgeTextConfig) -> None:
        super().__init__()
        self.head_width = config.hidden_size // config.num_attention_heads
        self.attention_dropout = config.dropout
        width = config.hidden_size
        projections = nn.ModuleDict({name: nn.Linear(width, width) for name in ("query", "key", "value")})
        self.attention = nn.ModuleDict({"self": projections, "output": Projection(config, width)})
        self.intermediate = Intermediate(config)
        self.output = Projection(config, config.intermediate_size)

    def forward(self, queries: Tensor, hidden_states: Tensor, mask: Tensor | None = None) -> Tensor:
        """The rows in ``queries`` (B, Q, D), which look at all ``hidden_states`` (B, T, D)."""
        project: Any = self.attention["self"]
        query, key, value = (
            split_heads(projected, self.head_width)
            for projected in (project.query(queries), project.key(hidden_states), project.value(hidden_states))
        )
        mask = None if mask is None else mask.to(query.device)
        context = attend(query, key, value, mask=mask, dropout=self.attention_dropout if self.training else 0.0)
        attended: Tensor = self.attention["output"](context, queries)
        hidden: Tensor = self.output(self.intermediate(attended), attended)
        return hidden


class TextEncoder(nn.Module):
    """BERT's layers, the last of which computes only what [CLS] needs."""

    def __init__(self, config: BgeTextConfig) -> None:
        super().__init__()
        self.layer = nn.ModuleList(EncoderLayer(config) for _ in range(config.num_hidden_layers))

    def forward(self, hidden_states: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, T, D) -> (B, D), the output at the first token; ``mask`` (B, 1, 1, T) is True where there is a token."""
        for layer in self.layer[:-1]:
            hidden_states = layer(hidden_states, hidden_states, mask)
        last: Tensor = self.layer[-1](hidden_states[:, :1], hidden_states, mask)
        return last[:, 0]


class Encodes(nn.Module):
    """What both classes of the model do: every ``encode_*`` returns (B, D), float32, L2-normalised, differentiable."""

    config: Shape
    bge_embeddings: TextEmbeddings

    fingerprint: str = ""  # of the weights that were loaded, before any rounding: tells one set from another

    def add_parts(self, config: Shape) -> None:
        """Make the modules, as the checkpoint names them."""
        vision, text = config.vision_shape, config.text_shape
        self.bge_embeddings = TextEmbeddings(text)
        self.bge_encoder = TextEncoder(text)
        self.model_visual = nn.ModuleDict({"visual": EvaVisionTower(vision)})
        self.visual_proj = nn.Linear(vision.width, text.hidden_size)

    @property
    def dtype(self) -> torch.dtype:
        """What the weights are computed in."""
        return next(weight.dtype for weight in self.parameters() if weight.is_floating_point())

    @property
    def device(self) -> torch.device:
        """Where the first of the weights is."""
        return next(self.parameters()).device

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


class VisualizedBGENetwork(Encodes):
    """The model in plain torch."""

    def __init__(self, config: Shape) -> None:
        super().__init__()
        self.config = config
        self.add_parts(config)


def normalized(vectors: Tensor) -> Tensor:
    """Rows of length 1, float32 whatever the model computes in: a half-precision row would not have length 1."""
    return F.normalize(vectors.float(), dim=-1)


def key_mask(attention_mask: Tensor | None, *, image_tokens: int = 0) -> Tensor | None:
    """(B, 1, 1, T) bool for attention, or None when nothing is padded: attention without a mask is faster."""
    if attention_mask is None:
        return None
    traced = torch.jit.is_tracing()  # type: ignore[attr-defined,no-untyped-call]
    if not traced and bool(attention_mask.all()):
        return None
    mask = attention_mask.bool()
    image_mask = mask.new_ones(mask.shape[0], image_tokens)  # len() would be fixed in a traced graph
    return torch.cat((mask[:, :1], image_mask, mask[:, 1:]), dim=1)[:, None, None, :]  # (B, 1, 1, T)
