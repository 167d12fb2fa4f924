"""The shape of a Visualized BGE model: from a `config.json`, or told from the tensors of an official checkpoint."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import AutoConfig, BertConfig
from transformers.configuration_utils import PreTrainedConfig

from mm_retriever.checkpoint import read_json
from mm_retriever.embedders.visualized_bge.eva_vit import EvaVisionConfig, check_sizes
from mm_retriever.errors import CheckpointError, reason_of, shown

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


_PATCH_STEM: Mapping[str, Any] = {"stem": "patch", "stem_channels": []}
"""What configs written by earlier versions say of the tower's stem, which there is only one of."""


def _without_stem(vision: Any) -> dict[str, Any]:
    if not isinstance(vision, Mapping):
        raise TypeError(f"vision is {type(vision).__name__}, expected an object")
    if (stem := vision.get("stem", "patch")) != "patch":
        raise ValueError(f"vision stem {stem!r} is not 'patch', the only one")
    return {key: value for key, value in vision.items() if key not in _PATCH_STEM}


class VisualizedBGEConfig(PreTrainedConfig):
    """``vision`` and ``text`` hold the fields of :class:`EvaVisionConfig` and :class:`BgeTextConfig` as plain dicts.

    ``rounded``: fingerprint of these weights to that of those they were rounded from; says nothing of other weights.
    """

    model_type = "visualized_bge"

    def __init__(
        self,
        vision: Mapping[str, Any] | EvaVisionConfig | None = None,
        text: Mapping[str, Any] | BgeTextConfig | None = None,
        rounded: Mapping[str, str] | None = None,
        **kwargs: Any,
    ) -> None:
        vision = vision if isinstance(vision, EvaVisionConfig) else EvaVisionConfig(**_without_stem(vision or {}))
        text = text if isinstance(text, BgeTextConfig) else BgeTextConfig(**(text or {}))
        self.vision: dict[str, Any] = asdict(vision)
        self.text: dict[str, Any] = asdict(text)
        self.rounded: dict[str, str] = dict(rounded or {})
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
    def vocab_size(self) -> int:
        """Entries of the word embeddings, under the name that transformers knows."""
        return int(self.text["vocab_size"])

    @vocab_size.setter
    def vocab_size(self, size: int) -> None:
        self.text["vocab_size"] = int(size)

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


def read_config(path: Path) -> VisualizedBGEConfig:
    """The config that a `config.json` describes.

    Raises:
        CheckpointError: it is no JSON, or describes another model.
    """
    content = read_json(path)
    if content.get("model_type") != VisualizedBGEConfig.model_type:
        kind = shown(content.get("model_type"))
        raise CheckpointError(f"{path} is of model_type {kind}, expected {VisualizedBGEConfig.model_type!r}")
    try:
        rounded = content.get("rounded") if isinstance(content.get("rounded"), dict) else None
        return VisualizedBGEConfig(vision=content.get("vision"), text=content.get("text"), rounded=rounded)
    except (TypeError, ValueError, StrictDataclassError) as error:
        raise CheckpointError(f"{path} does not describe a Visualized BGE model: {reason_of(error)}") from error


def config_from_tensors(state: Mapping[str, Tensor], source: Path) -> VisualizedBGEConfig:
    """The shape of an official checkpoint, which comes without a config, told from its tensors."""

    def shape(key: str) -> Sequence[int]:
        if key not in state:
            raise CheckpointError(f"{source} is not a Visualized BGE checkpoint: it has no tensor {key!r}")
        return (*state[key].shape, 0, 0, 0, 0)

    def layers(pattern: str) -> int:
        return 1 + max((int(found[1]) for key in state if (found := re.match(pattern, key))), default=-1)

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
        return VisualizedBGEConfig(
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


# transformers' Auto classes know the model as soon as its modules are imported
AutoConfig.register(VisualizedBGEConfig.model_type, VisualizedBGEConfig, exist_ok=True)
