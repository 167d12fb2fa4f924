"""`SentenceTransformersEncoder`: a `SentenceTransformer` as an `Embedder`, in passes of bounded size."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mm_retriever.embedders.embedder import Content
from mm_retriever.embedders.sentence_files import MAX_PIXELS, plain_text
from mm_retriever.errors import QueryError
from mm_retriever.images.square import LONGEST
from mm_retriever.threads import ForkLock, check_forked
from mm_retriever.tokenizer import valid_unicode

if TYPE_CHECKING:
    from torch import Tensor, nn

logger = logging.getLogger(__name__)

PASS_PIXELS = {"cpu": 2_000_000, "other": 32_000_000}
PASS_ROWS = {"cpu": 8, "other": 64}
"""The most pixels and rows in one pass of the model, by device."""
_CHARACTER = 256  # pixels as costly as one character of text: a patch of 1024 is a token, and so are 4 characters
MAX_ASPECT = 200  # of an image for Qwen's models, whose processor refuses more; narrower ones are widened
_PROBES = ("a photo of a red shoe", "XK-2041", "Ein Foto, 日本語, مرحبا")


class SentenceTransformersEncoder:
    """A model of sentence-transformers as an `Embedder`.

    Args:
        model: a `SentenceTransformer`.
        name: for people.
        weights: their fingerprint.
        dimension: of the vectors; None: the model's.
        text_weight: weight of the text in the sum, for models that do not take image and text together.

    Raises:
        QueryError: the dimension is longer than the model's.
    """

    keeps_weights = True  # sentence-transformers reads the device of inputs from the weights

    def __init__(self, model: Any, *, name: str, weights: str, dimension: int | None, text_weight: float) -> None:
        self.model = model
        self.name = name
        with model.truncate_embeddings(None):
            most = int(model.get_embedding_dimension())
        if dimension is not None and not 1 <= dimension <= most:
            raise QueryError(f"dimension={dimension!r}: {name!r} has vectors of 1 to {most} numbers")
        model.truncate_dim = dimension or model.truncate_dim  # `save` writes it
        self._dimension = int(model.get_embedding_dimension())
        self._text_weight = text_weight
        self._chat = "message" in model.modalities
        self.takes = {kind for kind in ("text", "image", ("image", "text")) if model.supports(kind)}
        self._plain = self.takes == {"text"} and not hasattr(model[0], "model")  # modules that take no mapping
        self._turn = ForkLock()
        self._loaded_in = os.getpid()
        _cut_to_positions(model)
        _pad_as_trained(model)
        self._pixels = Pixels(model) if "image" in self.takes else None
        self.space = f"sentence-transformers@{weights}.{self._inputs()}/{self._dimension}"
        self._cut_is_said = False
        self.parts: dict[str, Callable[..., Any]] = _towers(model)
        self._short_note: str | None = None

    @property
    def torch_model(self) -> Any:
        """The module whose weights the parts use."""
        return self.model[0].model

    @property
    def dimension(self) -> int:
        """Length of every vector."""
        return self._dimension

    @property
    def device(self) -> str:
        """The device of the model."""
        return str(self.model.device)

    @property
    def note(self) -> str:
        """The float format, the instruction for queries, and how an image with a text is embedded."""
        facts = [self._short_note or str(self.model.dtype).removeprefix("torch.")]
        if instruction := self.model.prompts.get("query"):
            facts.append(f"queries told {instruction!r}")
        if self._sums:
            facts.append(f"image and text as a sum, {self._text_weight:g} of it the text")
        return ", ".join(facts)

    @note.setter
    def note(self, how: str) -> None:
        """Replace the float format."""
        self._short_note = how

    @property
    def _sums(self) -> bool:
        return {"text", "image"} <= self.takes and ("image", "text") not in self.takes

    def prepare(self, image: Image.Image) -> NDArray[np.uint8]:
        """(H, W, 3): an image at the size that the model sees.

        Raises:
            QueryError: the model takes no images.
        """
        if self._pixels is None:
            raise QueryError(f"{self.name!r} embeds texts alone: take another model for images")
        return self._pixels.prepare(image.convert("RGB"))

    def encode(self, contents: Sequence[Content], *, query: bool = False) -> NDArray[np.float32]:
        """(B, D), rows of length 1.

        Args:
            contents: what to embed.
            query: use the model's instruction for queries, and not the one for documents.

        Raises:
            QueryError: the model cannot embed this kind of content.
        """
        check_forked(self._loaded_in, self.model.device.type)
        kinds = [_kind(content) for content in contents]
        self._check(kinds)
        vectors = np.empty((len(contents), self._dimension), dtype=np.float32)
        for kind in dict.fromkeys(kinds):
            rows = [row for row, of_row in enumerate(kinds) if of_row == kind]
            given = [contents[row] for row in rows]
            if kind == ("image", "text") and self._sums:
                texts = self._encode([Content(content.text) for content in given], ("text",), query)
                images = self._encode([Content(image=content.image) for content in given], ("image",), query)
                vectors[rows] = _unit(self._text_weight * texts + (1 - self._text_weight) * images)
            else:
                vectors[rows] = self._encode(given, kind, query)
        return vectors

    def _check(self, kinds: Sequence[tuple[str, ...]]) -> None:
        for kind in set(kinds):
            lacking = [part for part in kind if part not in self.takes]
            if lacking:
                known = " or ".join(part if isinstance(part, str) else "an image with a text" for part in self.takes)
                raise QueryError(
                    f"{self.name!r} cannot embed {' and '.join(lacking)} "
                    f"({kinds.count(kind)} of {len(kinds)} contents): it takes {known}"
                )

    def _encode(self, contents: Sequence[Content], kind: tuple[str, ...], query: bool) -> NDArray[np.float32]:
        """(B, D) of contents of one kind."""
        encode = self.model.encode_query if query else self.model.encode_document
        options: dict[str, Any] = {"show_progress_bar": False, "truncate_dim": self._dimension}
        if self._pixels is not None:
            options["processing_kwargs"] = self._pixels.call
        vectors = np.empty((len(contents), self._dimension), dtype=np.float32)
        sizes = [_size(content) for content in contents]
        self._log_cut([content.text for content in contents if "text" in kind])
        for rows in self._passes(sizes):
            inputs = [self._input(contents[row], kind) for row in rows]
            with self._turn:
                computed = encode(inputs, batch_size=len(inputs), **options)
            vectors[rows] = _unit(np.asarray(computed, dtype=np.float32))
        return vectors

    @property
    def network(self) -> nn.Module:
        """See `Trainable`, as of the three below."""
        network: nn.Module = self.model
        return network

    @property
    def sides(self) -> Mapping[str, Sequence[nn.Module]]:
        """The towers of the model that the first module holds, under the names that transformers gives them."""
        model = getattr(self.model[0], "model", self.model)
        inner = getattr(model, "model", model)
        names = {
            "text": ("text_model", "text_projection", "language_model"),
            "image": ("vision_model", "visual_projection", "visual"),
        }
        return {
            side: [getattr(inner, name) for name in given if getattr(inner, name, None) is not None]
            for side, given in names.items()
        }

    def vectors(self, contents: Sequence[Content], *, query: bool = False) -> Tensor:
        """(B, D) with gradients, in one pass for each kind of content."""
        import torch
        import torch.nn.functional as F

        kinds = [_kind(content) for content in contents]
        self._check(kinds)
        parts: list[Tensor] = []
        order: list[int] = []
        for kind in dict.fromkeys(kinds):
            rows = [row for row, of_row in enumerate(kinds) if of_row == kind]
            given = [contents[row] for row in rows]
            if kind == ("image", "text") and self._sums:
                texts, images = self._pass(given, ("text",), query), self._pass(given, ("image",), query)
                parts.append(F.normalize(self._text_weight * texts + (1 - self._text_weight) * images, dim=-1))
            else:
                parts.append(self._pass(given, kind, query))
            order += rows
        return torch.cat(parts)[torch.tensor(order).argsort()]

    def _pass(self, contents: Sequence[Content], kind: tuple[str, ...], query: bool) -> Tensor:
        """(B, D) with gradients of contents of one kind, with the inputs of `SentenceTransformer.encode`."""
        import torch.nn.functional as F

        prompt = self._instruction(query=query) or None
        options: dict[str, Any] = {} if self._pixels is None else {"processing_kwargs": self._pixels.call}
        inputs = [self._input(content, kind) for content in contents]
        features = self.model.preprocess(inputs, prompt=prompt, task="query" if query else "document", **options)
        device = self.model.device
        features = {key: value.to(device) if hasattr(value, "to") else value for key, value in features.items()}
        vectors: Tensor = self.model(features)["sentence_embedding"].float()
        return F.normalize(vectors[:, : self._dimension], dim=-1)

    def save(self, folder: Path) -> None:
        """Write the folder as sentence-transformers does, in safetensors."""
        from mm_retriever.from_pretrained import without_progress_bar, without_video_processor

        with without_progress_bar(), without_video_processor():
            self.model.save_pretrained(str(folder), create_model_card=False)

    def _input(self, content: Content, kind: tuple[str, ...]) -> dict[str, Any] | str:
        """The library's input; the order of the keys is the order in the model's prompt."""
        if self._plain:
            return valid_unicode(content.text)
        given: dict[str, Any] = {}
        if "image" in kind and content.image is not None:
            given["image"] = Image.fromarray(content.image)
        if "text" in kind:
            text = valid_unicode(content.text)
            given["text"] = plain_text(text, self.model.tokenizer) if self._chat else text
        return given

    def _passes(self, sizes: Sequence[int]) -> Iterator[list[int]]:
        """Yield the rows of each pass; rows of similar size form a pass."""
        machine = "cpu" if self.model.device.type == "cpu" else "other"
        part: list[int] = []
        for row in sorted(range(len(sizes)), key=sizes.__getitem__):
            if part and (len(part) >= PASS_ROWS[machine] or (len(part) + 1) * sizes[row] > PASS_PIXELS[machine]):
                yield part
                part = []
            part.append(row)
        if part:
            yield part

    def _log_cut(self, texts: Sequence[str]) -> None:
        """Log once that a text is longer than the model reads."""
        most, tokenizer = self.model.max_seq_length, self.model.tokenizer
        long = [text for text in texts if most and len(text) >= most] if not self._cut_is_said else []
        if not long or not callable(tokenizer):
            return
        cut = sum(len(tokenizer(valid_unicode(text), verbose=False)["input_ids"]) > most for text in long)
        if cut:
            logger.warning(
                "%s reads %d tokens of a text: the rest is cut off (%d of %d texts)", self.name, most, cut, len(texts)
            )
            self._cut_is_said = True

    def _instruction(self, *, query: bool) -> str:
        """The instruction that `encode_query` or `encode_document` of the library takes; the first name counts."""
        prompts: Mapping[str, str] = self.model.prompts
        names = ("query",) if query else ("document", "passage", "corpus")
        return next((prompts[name] for name in names if name in prompts), "")

    def _inputs(self) -> str:
        """Six hex digits of all that decides a document's vector besides the weights."""
        facts: list[Any] = [instruction := self._instruction(query=False)]
        for module in list(self.model)[1:]:
            settings = module.get_config_dict() if hasattr(module, "get_config_dict") else {}
            facts.append([type(module).__name__, {name: value for name, value in settings.items() if value}])
        if "text" in self.takes:
            for probe in _PROBES:
                inputs = [self._input(Content(probe), ("text",))]
                tokens = self.model.preprocess(inputs, prompt=instruction or None, task="document")
                facts.append(np.asarray(tokens["input_ids"]).tolist())
        if self._pixels is not None:
            facts.append(self._pixels.facts())
        return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:6]


class Pixels:
    """Prepares images for a model: as squares of one size, as patches in their own shape, or unchanged.

    Args:
        model: a model of sentence-transformers that takes images.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        processor = model.processor
        self._processor: Any = getattr(processor, "image_processor", processor)
        self._factor = _patch_factor(self._processor)
        self._squares = self._factor is None and self._makes_squares()
        self.call: dict[str, Any] = {}
        """Options of the library's processor for prepared images."""
        if self._squares:
            self.call = {"image": {"do_resize": False, "do_center_crop": False}}
        elif self._factor is not None:
            self.call = {"image": {"do_resize": False}}

    def prepare(self, image: Image.Image) -> NDArray[np.uint8]:
        """(H, W, 3) of an RGB image."""
        if self._squares:
            return self._square(image)
        if self._factor is None:
            return np.asarray(bounded(image))
        least_side = math.ceil(max(image.size) / MAX_ASPECT)
        width, height = max(image.width, least_side), max(image.height, least_side)
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

        size = dict(self._processor.size)
        most = min(int(size["longest_edge"]), MAX_PIXELS)
        least = min(int(size["shortest_edge"]), most)
        height, width = smart_resize(height, width, self._factor, least, most)
        return np.asarray(image.resize((width, height), self._processor.resample))

    def facts(self) -> list[Any]:
        """Facts that differ between processors: shapes, and the mean of a plain image's values."""
        facts: list[Any] = []
        for size in ((1700, 1300), (40, 60)):
            prepared = self.prepare(Image.new("RGB", size, (200, 90, 30)))
            image = {"image": Image.fromarray(prepared)}
            values = self._model.preprocess([image], processing_kwargs=self.call)["pixel_values"].float()
            facts.append([list(prepared.shape), list(values.shape), round(float(values.mean()), 2)])
        of_clip = type(self._processor).__name__.startswith("CLIPImage")
        if of_clip and self._processor.resample != Image.Resampling.BICUBIC:  # that of all published ones
            facts.append(f"resample {int(self._processor.resample)}")
        return facts

    def _square(self, image: Image.Image) -> NDArray[np.uint8]:
        if getattr(self._processor, "do_center_crop", False):
            image = _middle(image)
        values = self._processor(images=image, do_rescale=False, do_normalize=False, return_tensors="np")
        return np.ascontiguousarray(np.asarray(values["pixel_values"])[0].transpose(1, 2, 0))

    def _makes_squares(self) -> bool:
        """Whether every image becomes bytes of one shape."""
        shapes = set()
        for size in ((64, 48), (30, 90)):
            values = self._processor(
                images=Image.new("RGB", size), do_rescale=False, do_normalize=False, return_tensors="np"
            )
            pixels = np.asarray(values["pixel_values"])
            if pixels.ndim != 4 or pixels.dtype != np.uint8:
                return False
            shapes.add(pixels.shape)
        return len(shapes) == 1


def bounded(image: Image.Image) -> Image.Image:
    """Return the image, shrunk to `MAX_PIXELS` if it is larger."""
    if (pixels := image.width * image.height) <= MAX_PIXELS:
        return image
    scale = math.sqrt(MAX_PIXELS / pixels)
    size = max(1, int(image.width * scale)), max(1, int(image.height * scale))
    return image.resize(size, Image.Resampling.BICUBIC)


def _patch_factor(processor: Any) -> int | None:
    """The number to whose multiples sides are rounded; None for processors other than those of Qwen's models."""
    patch, merge = getattr(processor, "patch_size", None), getattr(processor, "merge_size", None)
    size = getattr(processor, "size", None)
    if not isinstance(patch, int) or not isinstance(merge, int) or size is None:
        return None
    return patch * merge if {"shortest_edge", "longest_edge"} <= set(dict(size)) else None


def _cut_to_positions(model: Any) -> None:
    """Cut texts of CLIP to its table of positions, where the tokenizer's files do not say how long a text may be."""
    config: Any = getattr(getattr(model[0], "model", None), "config", None)
    if getattr(config, "model_type", "") == "clip" and model.tokenizer is not None:
        length = int(config.text_config.max_position_embeddings)
        model.tokenizer.model_max_length = min(model.tokenizer.model_max_length, length)


def _pad_as_trained(model: Any) -> None:
    """Pad texts of SigLIP to its training length, unmasked, because it takes the vector at the last position.

    sentence-transformers pads to the longest text of a batch, which makes a vector depend on the other texts.
    """
    first = model[0]
    config: Any = getattr(getattr(first, "model", None), "config", None)
    if getattr(config, "model_type", "") not in ("siglip", "siglip2"):
        return
    length = int(config.text_config.max_position_embeddings)
    own = first.processing_kwargs.get("text", {})
    first.processing_kwargs = {
        **first.processing_kwargs,
        "text": {"padding": "max_length", "max_length": length, "return_attention_mask": False, **own},
    }


def _towers(model: Any) -> dict[str, Callable[..., Any]]:
    """The two towers of a CLIP or SigLIP as functions of tensors, which the model calls from now on; else {}."""
    inner: Any = getattr(model[0], "model", None)
    if getattr(getattr(inner, "config", None), "model_type", "") not in ("clip", "siglip"):
        return {}
    own_text, own_image = inner.get_text_features, inner.get_image_features
    parts: dict[str, Callable[..., Any]] = {
        "text": lambda input_ids, attention_mask=None: (
            own_text(input_ids=input_ids, attention_mask=attention_mask).pooler_output
        ),
        "image": lambda pixel_values: own_image(pixel_values=pixel_values).pooler_output,
    }

    def text(input_ids: Any, attention_mask: Any = None) -> dict[str, Any]:
        given = (input_ids,) if attention_mask is None else (input_ids, attention_mask)
        return {"pooler_output": parts["text"](*given)}

    # the names that sentence-transformers calls
    inner.get_text_features = text
    inner.get_image_features = lambda pixel_values: {"pooler_output": parts["image"](pixel_values)}
    return parts


def _middle(image: Image.Image) -> Image.Image:
    """The middle of a very long image, which contains the model's square; resizing the whole would fill memory."""
    short = min(image.size)
    if (long := min(max(image.size), LONGEST * short)) == max(image.size):
        return image
    start = (max(image.size) - long) // 2
    box = (start, 0, start + long, short) if image.width > image.height else (0, start, short, start + long)
    return image.crop(box)


def _kind(content: Content) -> tuple[str, ...]:
    if content.image is None:
        return ("text",)
    return ("image", "text") if content.text.strip() else ("image",)


def _size(content: Content) -> int:
    pixels = 0 if content.image is None else content.image.shape[0] * content.image.shape[1]
    return pixels + _CHARACTER * len(content.text)


def _unit(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    unit: NDArray[np.float32] = vectors / np.maximum(lengths, np.finfo(np.float32).tiny)
    return unit
