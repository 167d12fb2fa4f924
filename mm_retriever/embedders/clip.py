"""CLIP for the families that are built on it: transformers' own model, its tokenizer, both towers in passes.

The model runs one pass at a time for all threads: matrix products use every core anyway, and memory stays bounded.

Source: CLIP (arXiv:2103.00020) as in transformers' ``CLIPModel``.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel

from mm_retriever.checkpoint import ModelFiles, load_strict, skeleton
from mm_retriever.checkpoint import fingerprint as fingerprint_of
from mm_retriever.devices import as_device, as_dtype, in_passes, input_device, passes
from mm_retriever.embedders.embedder import Content
from mm_retriever.embedders.folder import copy_tokenizer, write_folder
from mm_retriever.errors import CheckpointError, reason_of, shown
from mm_retriever.packed_linear import pack_linears
from mm_retriever.threads import ForkLock, check_forked
from mm_retriever.tokenizer import read_tokenizer, valid_unicode

logger = logging.getLogger(__name__)

M = TypeVar("M", bound=nn.Module)
T = TypeVar("T")

TOKENIZER_REPO = "openai/clip-vit-base-patch16"  # the same for CLIP models of every size
LEGACY_EOS = 2  # transformers pools a text at its highest id where a config has this one

_TEXT = {"vocab_size", "max_position_embeddings"}
_VISION = {"image_size", "patch_size"}
_BOTH = {"hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "hidden_act", "layer_norm_eps"}
_MAX_LAYERS, _MAX_SIZE = 200, 2**20  # no model has more; configs are untrusted
_PROBES = ("Phone case with this, in RED", "déjà vu – 50 €\n\tnaïve", "手机壳 スマホケース чехол", "a" * 40)


def clip_config(content: Mapping[str, Any], source: str | os.PathLike[str]) -> CLIPConfig:
    """Return the shape that a CLIP's `config.json` describes; its other fields are ignored.

    Raises:
        CheckpointError: it does not describe a CLIP.
    """
    sides: dict[str, dict[str, Any]] = {}
    for side, own in (("text", _TEXT), ("vision", _VISION)):
        given: dict[str, Any] = {}
        for key in (f"{side}_config", f"{side}_config_dict"):  # old files have both; the second wins in transformers
            part = content.get(key) or {}
            if not isinstance(part, Mapping):
                raise CheckpointError(f"{os.fspath(source)}: {key} is {shown(part)}, expected an object")
            given |= {name: value for name, value in part.items() if name in own | _BOTH}
        sides[side] = given
    width = content.get("projection_dim", 512)
    try:
        for given in (*sides.values(), {"projection_dim": width}):
            check_sizes(given)
        # parity: the published configs say 2, which makes transformers pool a text at its highest id
        text = sides["text"] | {"eos_token_id": LEGACY_EOS, "bos_token_id": 0, "pad_token_id": 1}
        config = CLIPConfig(text_config=text, vision_config=sides["vision"], projection_dim=width)
        parts: tuple[Any, ...] = (config.text_config, config.vision_config)
        for part in parts:
            part.projection_dim = width
    except Exception as error:  # transformers checks values with errors of its own
        raise CheckpointError(f"{os.fspath(source)} does not describe a CLIP model: {reason_of(error)}") from error
    return config


def check_sizes(given: Mapping[str, Any]) -> None:
    """Raise ValueError for a size that no model has."""
    for name, value in given.items():
        if name in ("hidden_act", "layer_norm_eps"):
            continue
        most = _MAX_LAYERS if name.endswith("layers") else _MAX_SIZE
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
            raise ValueError(f"{name} {shown(value)} is not between 1 and {most:,}")


def config_content(config: CLIPConfig) -> dict[str, Any]:
    """Return the content of `config.json` for `clip_config`."""
    text = {name: getattr(config.text_config, name) for name in sorted(_TEXT | _BOTH)}
    vision = {name: getattr(config.vision_config, name) for name in sorted(_VISION | _BOTH)}
    return {
        "projection_dim": config.projection_dim,
        "text_config": text | {"eos_token_id": LEGACY_EOS, "model_type": "clip_text_model"},
        "vision_config": vision | {"model_type": "clip_vision_model"},
    }


def fill_positions(clip: nn.Module, device: torch.device) -> None:
    """Create the tables of positions, which no checkpoint holds, for a model that was on the meta device."""
    for module in clip.modules():
        if isinstance(table := getattr(module, "position_ids", None), Tensor):
            module.position_ids = torch.arange(table.shape[-1], device=device).expand((1, -1))


def filled(
    build: Callable[[], M],
    state: Mapping[str, Tensor],
    files: ModelFiles,
    *,
    device: torch.device | str | None,
    dtype: torch.dtype | str | None,
) -> M:
    """Return the model of `build` with these tensors, ready for inference."""
    to = as_device(device)
    model = skeleton(build, files.weights)
    load_strict(model, state, source=files.weights, device=to, dtype=as_dtype(dtype))
    fill_positions(model, to)
    model.train(False)
    return pack_linears(model)


def convert_clip(
    build: Callable[[], nn.Module],
    state: Mapping[str, Tensor],
    files: ModelFiles,
    out: str | os.PathLike[str],
    config: Mapping[str, Any],
    *,
    original: str,
    tokenizer: str | os.PathLike[str] | None,
    dtype: torch.dtype | str | None,
) -> Path:
    """Write the files of a model as a folder and return it; without ``dtype`` the floats keep their format.

    Args:
        build: returns the model that the tensors are checked against.
        state: tensors by name.
        files: the files that they were read from.
        out: the folder.
        config: the facts that the tensors do not tell.
        original: fingerprint of the weights before any rounding.
        tokenizer: if not beside the weights.
        dtype: of the stored floats.
    """
    load_strict(skeleton(build, files.weights), state, source=files.weights, device="meta")
    if dtype is not None:
        state = {key: tensor.to(as_dtype(dtype)) for key, tensor in state.items()}
    folder = write_folder(out, state, config, original=original)
    copy_tokenizer(folder, files, tokenizer, TOKENIZER_REPO)
    return folder


def clip_tokenizer(path: Path, config: CLIPConfig) -> Tokenizer:
    """Return the tokenizer in a file, checked against the model.

    Raises:
        CheckpointError: it is not a tokenizer, or that of another model.
    """
    tokenizer = read_tokenizer(path)
    tokenizer.no_truncation()  # a file may carry both
    tokenizer.no_padding()
    text: Any = config.text_config
    size, room = tokenizer.get_vocab_size(), text.vocab_size
    if size > room:
        raise CheckpointError(f"{path} has {size:,} entries, the model {room:,}: not its tokenizer")
    empty = tokenizer.encode("").ids
    if len(empty) != 2 or empty[1] != size - 1:
        raise CheckpointError(
            f"{path} writes an empty text as {shown(empty)}; CLIP needs a start and an end, and the end has the "
            "highest id: not its tokenizer"
        )
    return tokenizer


class ClipEncoder(ABC):
    """An `Embedder` whose vectors are computed from the features of a CLIP's two towers.

    Args:
        clip: ready for inference.
        tokenizer: from `clip_tokenizer`.
        name: for people.
        family: the first word of `space`.
        fingerprint: of the weights, before any rounding.
        facts: further facts that decide the outputs, besides the weights.
    """

    def __init__(
        self,
        clip: CLIPModel,
        tokenizer: Tokenizer,
        *,
        name: str,
        family: str,
        fingerprint: str,
        facts: Sequence[Any] = (),
    ) -> None:
        self.clip = clip
        self.tokenizer = tokenizer
        self.name = name
        self.note = str(clip.dtype).removeprefix("torch.")
        self._text = cast(Any, clip.config.text_config)
        self._vision = cast(Any, clip.config.vision_config)
        self.dimension = int(self._text.projection_dim)  # length of every vector
        self.side = int(self._vision.image_size)
        self.room = int(self._text.max_position_embeddings)
        self.parts: dict[str, Callable[..., Tensor]] = {"text": self._text_pass, "image": self._image_pass}
        self._turn = ForkLock()
        self._loaded_in = os.getpid()
        self._said_cut = False
        inputs = [config_content(clip.config), *facts, self.token_ids(_PROBES)]
        digest = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:6]
        self.space = f"{family}@{fingerprint}.{digest}"

    @property
    def torch_model(self) -> CLIPModel:
        """The module whose weights the parts use."""
        return self.clip

    @property
    def device(self) -> str:
        """The device of the model."""
        return str(self._device)

    @property
    def _device(self) -> torch.device:
        return input_device(self.clip.logit_scale)

    @abstractmethod
    def prepare(self, image: Image.Image) -> NDArray[Any]:
        """(H, W, 3): all that the model will see of an image."""

    @abstractmethod
    def pixel_values(self, images: Sequence[NDArray[Any]]) -> Tensor:
        """(B, 3, H, W) float32 of prepared images."""

    @abstractmethod
    def texts_and_images(self, contents: Sequence[Content]) -> tuple[list[str | None], list[NDArray[Any] | None]]:
        """The text and the image of each content that its vector is computed from; None where there is none."""

    @abstractmethod
    def compose(self, text_features: Tensor, image_features: Tensor) -> Tensor:
        """(B, D), not normalised, of the features of both towers; zeros stand for a missing text or image."""

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """The content of `config.json` in a folder of this package."""

    def encode(self, contents: Sequence[Content], *, query: bool = False) -> NDArray[np.float32]:
        """(B, D), L2-normalised, row by row.

        Args:
            contents: what to embed.
            query: makes no difference to these families.

        Raises:
            QueryError: the model cannot embed this kind of content.
        """
        text_features, image_features = self._both_features(*self.texts_and_images(contents))
        with self._turn, torch.inference_mode():
            return unit_rows(self.compose(text_features, image_features))

    @property
    def network(self) -> nn.Module:
        """See `Trainable`, as of the three below."""
        return self.clip

    @property
    def sides(self) -> Mapping[str, Sequence[nn.Module]]:
        """Both towers with their projections."""
        clip = self.clip
        return {"text": [clip.text_model, clip.text_projection], "image": [clip.vision_model, clip.visual_projection]}

    def vectors(self, contents: Sequence[Content], *, query: bool = False) -> Tensor:
        """(B, D) with gradients, in one pass."""
        texts, images = self.texts_and_images(contents)
        features = self._of_present(texts, self._text_rows), self._of_present(images, self._image_rows)
        return F.normalize(self.compose(*features).float(), dim=-1)

    def _of_present(self, inputs: Sequence[T | None], features: Callable[[list[T]], Tensor]) -> Tensor:
        """(B, D) with gradients; zeros for missing inputs."""
        present = {row: given for row, given in enumerate(inputs) if given is not None}
        computed = torch.zeros((len(inputs), self.dimension), device=self._device)
        if present:
            computed[list(present)] = features(list(present.values())).float()
        return computed

    def save(self, folder: Path) -> None:
        """Write ``config.json``, ``model.safetensors`` and ``tokenizer.json``."""
        state = self.network.state_dict()
        write_folder(folder, state, self.config(), original=fingerprint_of(state))
        self.tokenizer.save(str(folder / "tokenizer.json"))

    def token_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of every text, start and end included; a text too long is cut, but keeps its end token.

        The originals crash on such a text. The first cut is logged.
        """
        rows = [encoding.ids for encoding in self.tokenizer.encode_batch([valid_unicode(text) for text in texts])]
        longest = max(map(len, rows), default=0)
        if longest > self.room and not self._said_cut:
            self._said_cut = True
            logger.warning(
                "%s reads the first %d tokens of a text: one of %d was cut, as will be all such texts",
                self.name, self.room, longest,
            )  # fmt: skip
        return [ids if len(ids) <= self.room else [*ids[: self.room - 1], ids[-1]] for ids in rows]

    def text_features(self, texts: Sequence[str]) -> Tensor:
        """(B, D) float32, not normalised; texts of similar length share a pass."""
        ids = self.token_ids(texts)
        order = sorted(range(len(ids)), key=lambda row: len(ids[row]))
        features = torch.empty((len(ids), self.dimension), device=self._device)
        lengths = [len(ids[row]) for row in order]

        def encode_part(part: range) -> None:
            rows = [order[place] for place in part]
            with self._turn, torch.inference_mode():
                features[rows] = self.parts["text"](self._padded([ids[row] for row in rows])).float()

        in_passes(passes(lengths, int(self._text.intermediate_size), self._device.type), encode_part)
        return features

    def _text_rows(self, texts: Sequence[str]) -> Tensor:
        return self._text_pass(self._padded(self.token_ids(texts)))

    def _padded(self, ids: Sequence[Sequence[int]]) -> Tensor:
        rows = torch.zeros((len(ids), max(map(len, ids))), dtype=torch.long)
        for place, row in enumerate(ids):
            rows[place, : len(row)] = torch.tensor(row)
        return rows.to(self._device)

    def _text_pass(self, input_ids: Tensor) -> Tensor:
        # attention is causal, and a text is pooled at its end token, so padding after it has no effect
        pooled = self.clip.text_model(input_ids=input_ids, attention_mask=self._text_mask(input_ids)).pooler_output
        projected: Tensor = self.clip.text_projection(pooled)
        return projected

    def _text_mask(self, input_ids: Tensor) -> Tensor | None:
        return None

    def image_features(self, images: Sequence[NDArray[Any]]) -> Tensor:
        """(B, D) float32 of prepared images, not normalised."""
        features = torch.empty((len(images), self.dimension), device=self._device)
        patches = (self.side // int(self._vision.patch_size)) ** 2 + 1

        def encode_part(part: range) -> None:
            with self._turn, torch.inference_mode():
                pixel_values = self.pixel_values([images[row] for row in part]).to(self._device)
                features[part.start : part.stop] = self.parts["image"](pixel_values).float()

        in_passes(passes([patches] * len(images), int(self._vision.intermediate_size), self._device.type), encode_part)
        return features

    def _image_rows(self, images: Sequence[NDArray[Any]]) -> Tensor:
        return self._image_pass(self.pixel_values(images).to(self._device))

    def _image_pass(self, pixel_values: Tensor) -> Tensor:
        projected: Tensor = self.clip.visual_projection(self.clip.vision_model(pixel_values=pixel_values).pooler_output)
        return projected

    def _both_features(
        self, texts: Sequence[str | None], images: Sequence[NDArray[Any] | None]
    ) -> tuple[Tensor, Tensor]:
        """(B, D) of texts and of images, zeros for missing ones; equal inputs are computed once."""
        check_forked(self._loaded_in, self._device.type)
        return (
            self._once(texts, lambda text: text, self.text_features),
            self._once(images, lambda image: image.tobytes(), self.image_features),
        )

    def _once(
        self, inputs: Sequence[T | None], key: Callable[[T], Hashable], features: Callable[[list[T]], Tensor]
    ) -> Tensor:
        places: dict[Hashable, int] = {}
        distinct: list[T] = []
        rows, of = [], []
        for row, given in enumerate(inputs):
            if given is None:
                continue
            place = places.setdefault(key(given), len(distinct))
            if place == len(distinct):
                distinct.append(given)
            rows.append(row)
            of.append(place)
        computed = torch.zeros((len(inputs), self.dimension), device=self._device)
        if distinct:
            computed[rows] = features(distinct)[of]
        return computed


def unit_rows(vectors: Tensor) -> NDArray[np.float32]:
    """(B, D) of length 1, on the CPU."""
    return np.asarray(F.normalize(vectors.float(), dim=-1).cpu().numpy(), dtype=np.float32)
