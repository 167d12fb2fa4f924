"""Visualized BGE: text, a picture, or both into one vector. Owns preprocessing and model; knows nothing of LlamaIndex.

A picture's tokens from the EVA02 tower go between [CLS] and the words of a BERT or XLM-RoBERTa encoder; the vector is
that encoder's output at [CLS], L2-normalised. Module attributes keep the checkpoint's names.

Source: VISTA (arXiv:2406.04292), FlagEmbedding research/visual_bge (github.com/FlagOpen/FlagEmbedding at 7ed43d67,
MIT). Rewritten; checked against its outputs stage by stage.
"""

from __future__ import annotations

import os
import re
import shutil
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoProcessor, BertConfig, PreTrainedModel, initialization
from transformers.configuration_utils import PreTrainedConfig
from transformers.models.bert.modeling_bert import BertLayer

from mm_retriever.devices import DTYPES, as_device, as_dtype, default_device, input_device
from mm_retriever.errors import CheckpointError, ModelNotFoundError, shown
from mm_retriever.models.checkpoint import (
    PUBLISHED,
    SAFETENSORS,
    ModelFiles,
    fingerprint,
    load_strict,
    locate,
    locate_tokenizer,
    read_json,
    read_state_dict,
    reason_of,
    skeleton,
    warn_if_not_published,
)
from mm_retriever.models.eva_vit import (
    EvaVisionConfig,
    EvaVisionTower,
    RotaryPositions,
    attend,
    check_sizes,
    rope_frequencies,
    split_heads,
)
from mm_retriever.models.visualized_bge_processor import PIXEL_MEAN, PIXEL_STD, VisualizedBGEProcessor, crop_square

__all__ = [
    "DTYPES",
    "PIXEL_MEAN",
    "PIXEL_STD",
    "VisualizedBGE",
    "VisualizedBGEConfig",
    "VisualizedBGEProcessor",
    "as_device",
    "as_dtype",
    "convert_checkpoint",
    "crop_square",
    "default_device",
    "load_processor",
    "load_visualized_bge",
]

OFFICIAL_HEAD_WIDTH = 64  # of both published models; no tensor tells it
# in the official files, never used by the branch that runs
DEAD_KEYS = re.compile(
    r"bge_pooler\..*|bge_embeddings\.position_ids|model_visual\.logit_scale|model_visual\.visual\.(norm|head)\..*"
    r"|model_visual\.visual\.blocks\.\d+\.attn\.rope\..*"
)


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
        vision = vision if isinstance(vision, EvaVisionConfig) else EvaVisionConfig(**(vision or {}))
        text = text if isinstance(text, BgeTextConfig) else BgeTextConfig(**(text or {}))
        self.vision: dict[str, Any] = {**asdict(vision), "stem_channels": list(vision.stem_channels)}
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
        return {"vision": self.vision, "text": {key: value for key, value in self.text.items() if key != "dropout"}}

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
        words = self.word_embeddings(input_ids) + self.token_type_embeddings(input_ids.new_zeros(()))
        first = self.first_position
        if image_tokens is not None:
            # parity: picture tokens get no token type, and positions start at 0 even for XLM-R
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
        """(B, 3, H, W) -> (B, N, D): a picture as tokens of the text side, without the tower's own CLS."""
        tokens: Tensor = self.visual_proj(self.model_visual["visual"](pixel_values.to(self.dtype))[:, 1:])
        return tokens

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Vectors of texts; ``attention_mask`` is 0 behind the end of a text."""
        return normalized(self.bge_encoder(self.bge_embeddings(input_ids), key_mask(attention_mask)))

    def encode_image(self, pixel_values: Tensor) -> Tensor:
        """Vectors of pictures: the original's picture alone is a picture beside an empty text."""
        text = self.config.text_shape
        empty = torch.tensor([[text.cls_token_id, text.sep_token_id]], device=pixel_values.device)
        return self.encode_multimodal(pixel_values, empty.expand(len(pixel_values), -1))

    def encode_multimodal(
        self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor | None = None
    ) -> Tensor:
        """Vectors of picture-and-text pairs, row by row."""
        return self.encode_beside(self.image_tokens(pixel_values), input_ids, attention_mask)

    def encode_beside(self, image_tokens: Tensor, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """As :meth:`encode_multimodal`, from :meth:`image_tokens`: one picture beside many texts is looked at once."""
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


def load_visualized_bge(
    name: str | os.PathLike[str] = "BAAI/bge-visualized-base-en-v1.5",
    *,
    tokenizer: str | os.PathLike[str] | None = None,
    revision: str | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
) -> tuple[VisualizedBGE, VisualizedBGEProcessor]:
    """A model ready for inference and the processor that feeds it.

    Args:
        name: "tiny", a local folder or weight file, a published name, or any hub repository in our layout.
        tokenizer: ``tokenizer.json``, its folder or a hub name; default: beside the weights, else as published.
        revision: of the hub repository of the weights.
        device: default: CUDA, else MPS, else the CPU.
        dtype: of the computation; default float32.

    Raises:
        ModelNotFoundError: the name leads to no files.
        CheckpointError: the files are damaged, unsafe, or of another model.
    """
    usable = as_device(device)
    files = locate(name, family="visualized_bge", revision=revision)
    config, state = _read(files)
    model = _filled(config, state, files, device=usable, dtype=as_dtype(dtype))
    tokens = _tokenizer(files, config, tokenizer)
    return model, VisualizedBGEProcessor(config, tokens)


def load_processor(name: str | os.PathLike[str], *, revision: str | None = None) -> VisualizedBGEProcessor:
    """The processor alone, without reading weights where a config.json says what they are.

    Raises:
        ModelNotFoundError: the name leads to no files.
        CheckpointError: the files are damaged, or of another model.
    """
    files = locate(name, family="visualized_bge", revision=revision)
    config = _read(files)[0] if files.config is None else _read_config(files.config)
    return VisualizedBGEProcessor(config, _tokenizer(files, config, None))


def convert_checkpoint(
    weights: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    tokenizer: str | os.PathLike[str] | None = None,
    dtype: torch.dtype | str | None = None,
    revision: str | None = None,
) -> Path:
    """Writes ``config.json``, ``model.safetensors`` and ``tokenizer.json`` into the folder ``out`` and returns it.

    The floats keep the format that they have in the file unless ``dtype`` is given.
    """
    files = locate(weights, family="visualized_bge", revision=revision)
    config, state = _read(files)
    stored = state["visual_proj.weight"].dtype if "visual_proj.weight" in state else torch.float32
    model = _filled(config, state, files, device=torch.device("cpu"), dtype=as_dtype(dtype, default=stored))
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f"{SAFETENSORS}.part"
    save_file(model.state_dict(), part, metadata={"format": "pt"})
    part.replace(folder / SAFETENSORS)
    if (own := fingerprint(model.state_dict())) != model.fingerprint:
        config.rounded = {own: model.fingerprint}
    config.architectures = [VisualizedBGE.__name__]
    config.dtype = model.dtype
    config.save_pretrained(folder)
    try:
        source = _tokenizer(files, config, tokenizer)
    except ModelNotFoundError as error:
        warnings.warn(f"{folder} has no tokenizer.json: {error}", UserWarning, stacklevel=2)
    else:
        if source.resolve() != (folder / "tokenizer.json").resolve():
            shutil.copyfile(source, folder / "tokenizer.json")
    return folder


def _read(files: ModelFiles) -> tuple[VisualizedBGEConfig, dict[str, Tensor]]:
    warn_if_not_published(files.weights)
    state = {key: tensor for key, tensor in read_state_dict(files.weights).items() if not DEAD_KEYS.fullmatch(key)}
    if files.config is None:
        return _config_of(state, files.weights), state
    return _read_config(files.config), state


def _read_config(path: Path) -> VisualizedBGEConfig:
    content = read_json(path)
    if content.get("model_type") != VisualizedBGEConfig.model_type:
        kind = shown(content.get("model_type"))
        raise CheckpointError(f"{path} is of model_type {kind}, expected {VisualizedBGEConfig.model_type!r}")
    try:
        rounded = content.get("rounded") if isinstance(content.get("rounded"), dict) else None
        return VisualizedBGEConfig(vision=content.get("vision"), text=content.get("text"), rounded=rounded)
    except (TypeError, ValueError, StrictDataclassError) as error:
        raise CheckpointError(f"{path} does not describe a Visualized BGE model: {reason_of(error)}") from error


def _config_of(state: Mapping[str, Tensor], source: Path) -> VisualizedBGEConfig:
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


def _filled(
    config: VisualizedBGEConfig,
    state: Mapping[str, Tensor],
    files: ModelFiles,
    *,
    device: torch.device,
    dtype: torch.dtype,
) -> VisualizedBGE:
    model = skeleton(lambda: VisualizedBGE(config), files.weights)
    load_strict(model, state, source=files.weights, device=device, dtype=dtype)
    model.fingerprint = fingerprint(state)
    if config.rounded.get(model.fingerprint):  # a rounded copy, unchanged since: still the same model
        model.fingerprint = config.rounded[model.fingerprint]
    model.train(False)
    return model


def _tokenizer(files: ModelFiles, config: VisualizedBGEConfig, given: str | os.PathLike[str] | None) -> Path:
    """Given, else beside the weights, else the published one of this kind of text side."""
    if given is not None:
        return locate_tokenizer(given)
    if files.tokenizer is not None:
        return files.tokenizer
    kind = (
        "BAAI/bge-visualized-m3" if config.text["model_type"] == "xlm-roberta" else "BAAI/bge-visualized-base-en-v1.5"
    )
    repo = PUBLISHED[kind].tokenizer_repo
    try:
        return locate_tokenizer(repo)
    except ModelNotFoundError as error:
        raise ModelNotFoundError(
            f"no tokenizer.json beside {files.weights}, and the model hub cannot be reached for that of {repo!r}; "
            "put the file there or name it with tokenizer="
        ) from error


# transformers' Auto classes know the model as soon as this module is imported
AutoConfig.register(VisualizedBGEConfig.model_type, VisualizedBGEConfig, exist_ok=True)
AutoModel.register(VisualizedBGEConfig, VisualizedBGE, exist_ok=True)
AutoProcessor.register(VisualizedBGEConfig, VisualizedBGEProcessor, exist_ok=True)
