"""Visualized BGE as an `Embedder`, from files: what `processor.py` makes of images and texts, on to vectors.

The model runs one pass of bounded size at a time, whichever thread asks: its products use every core anyway, and memory
stays flat.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from mm_retriever.checkpoint import ModelFiles, fingerprint, load_strict, locate, read_state_dict, skeleton
from mm_retriever.devices import as_device, as_dtype, in_passes, passes
from mm_retriever.embedders.embedder import Content
from mm_retriever.embedders.folder import (
    copy_tokenizer,
    find_tokenizer,
    original_fingerprint,
    warn_if_not_published,
    write_folder,
)
from mm_retriever.embedders.visualized_bge import DEFAULT_MODEL, MODELS
from mm_retriever.embedders.visualized_bge.network import (
    Encodes,
    Shape,
    VisualizedBGENetwork,
    config_from_tensors,
    read_config,
)
from mm_retriever.embedders.visualized_bge.processor import VisualizedBGEProcessor, crop_square, tokenizer_repo
from mm_retriever.packed_linear import pack_linears
from mm_retriever.threads import ForkLock, check_forked

if TYPE_CHECKING:
    from mm_retriever.embedders.visualized_bge.model import VisualizedBGE


__all__ = ["VisualizedBGEEncoder", "VisualizedBGEProcessor", "crop_square"]


class VisualizedBGEEncoder:
    """A Visualized BGE model and its processor as an `Embedder`.

    Args:
        model: from `load_visualized_bge`, or in plain torch.
        processor: of it.
        name: for people.
    """

    def __init__(self, model: Encodes, processor: VisualizedBGEProcessor, *, name: str = "") -> None:
        self.torch_model = model  # whose weights the parts compute with
        self.processor = processor
        self.name = name
        self.note = str(model.dtype).removeprefix("torch.")
        self.space = f"visualized-bge@{model.fingerprint}.{processor.fingerprint()}"
        self.parts = _parts(model)
        self._lock = ForkLock()
        self._loaded_in = os.getpid()

    @property
    def cache_identity(self) -> str:
        """The identity that vector caches have always used for this model."""
        return f"{self.torch_model.fingerprint}/{self.note}"

    @property
    def model(self) -> VisualizedBGE:
        """The model under transformers' class, with the same modules; from now on the parts compute with it."""
        from mm_retriever.embedders.visualized_bge.model import VisualizedBGE, with_parts_of

        with self._lock:
            plain = self.torch_model
            if isinstance(plain, VisualizedBGE):
                return plain
            model = with_parts_of(plain)
            before, after = _parts(plain), _parts(model)
            self.parts.update({name: after[name] for name, part in before.items() if self.parts[name] == part})
            self.torch_model = model
            return model

    @property
    def dimension(self) -> int:
        """Length of every vector."""
        return int(self.torch_model.config.dimension)

    @property
    def device(self) -> str:
        """The device of the model."""
        return str(self.torch_model.input_device)

    def prepare(self, image: Image.Image) -> NDArray[np.uint8]:
        """(H, W, 3): the square that the model sees."""
        return self.processor.square(image)

    def encode(self, contents: Sequence[Content], *, query: bool = False) -> NDArray[np.float32]:
        """(B, D), L2-normalised, row by row; short texts go through the model with short ones.

        Args:
            contents: what to embed.
            query: makes no difference to this family.
        """
        check_forked(self._loaded_in, self.torch_model.device.type)
        vectors = np.empty((len(contents), self.torch_model.config.dimension), dtype=np.float32)
        for beside_image in (False, True):
            rows = [row for row, content in enumerate(contents) if (content.image is not None) == beside_image]
            ids = self.processor.token_ids([contents[row].text for row in rows], beside_image=beside_image)
            order = sorted(range(len(rows)), key=lambda place: len(ids[place]))
            given = [(rows[place], ids[place]) for place in order]  # short texts first
            parts = self._passes([len(row_ids) for _, row_ids in given], beside_image=beside_image)
            in_passes(parts, partial(self._encode_part, contents, given, beside_image, vectors))
        return vectors

    def _encode_part(
        self,
        contents: Sequence[Content],
        given: Sequence[tuple[int, Sequence[int]]],
        beside_image: bool,
        vectors: NDArray[np.float32],
        part: range,
    ) -> None:
        """One pass: rows of contents with the ids of their texts, into the same rows of `vectors`."""
        rows = [given[place][0] for place in part]
        tokens = self.processor.pad([given[place][1] for place in part])
        squares = [contents[row].image for row in rows] if beside_image else []
        with self._lock, torch.inference_mode():
            vectors[rows] = self._encode(tokens, squares).cpu().numpy()

    def _encode(self, tokens: dict[str, Tensor], squares: Sequence[Any]) -> Tensor:
        device = self.torch_model.input_device
        tokens = {name: tensor.to(device) for name, tensor in tokens.items()}
        if not squares:
            return self.parts["text"](tokens["input_ids"], tokens["attention_mask"])
        first: dict[bytes, int] = {}  # an image beside several texts goes through the tower once
        places = [first.setdefault(square.tobytes(), len(first)) for square in squares]
        pixel_values = self.processor.pixel_values([squares[places.index(place)] for place in range(len(first))])
        image_tokens = self.parts["image"](pixel_values.to(device))
        if len(first) < len(squares):
            image_tokens = image_tokens[places]
        return self.parts["beside"](image_tokens, tokens["input_ids"], tokens["attention_mask"])

    @property
    def network(self) -> nn.Module:
        """See `Trainable`, as of the three below."""
        return self.model

    @property
    def sides(self) -> Mapping[str, Sequence[nn.Module]]:
        """The text side reads image tokens too; the projection belongs to the image side."""
        text = [self.torch_model.bge_embeddings, self.torch_model.bge_encoder]
        return {"text": text, "image": [self.torch_model.model_visual, self.torch_model.visual_proj]}

    def vectors(self, contents: Sequence[Content], *, query: bool = False) -> Tensor:
        """(B, D) with gradients, in one pass."""
        parts: list[Tensor] = []
        order: list[int] = []
        for beside_image in (False, True):
            rows = [row for row, content in enumerate(contents) if (content.image is not None) == beside_image]
            if rows:
                tokens = self.processor.tokens([contents[row].text for row in rows], beside_image=beside_image)
                parts.append(self._encode(tokens, [contents[row].image for row in rows] if beside_image else []))
                order += rows
        return torch.cat(parts)[torch.tensor(order).argsort()]

    def save(self, folder: Path) -> None:
        """Write ``config.json``, ``model.safetensors`` and ``tokenizer.json``."""
        model = self.model
        model.config.architectures, model.config.dtype = [type(model).__name__], model.dtype
        state = model.state_dict()
        write_folder(folder, state, json.loads(model.config.to_json_string()), original=fingerprint(state))
        self.processor.save_pretrained(folder)

    def _passes(self, lengths: Sequence[int], *, beside_image: bool) -> Iterator[range]:
        """Ranges of rows, which come sorted by length, that go through the model together."""
        vision, text = self.torch_model.config.vision_shape, self.torch_model.config.text_shape
        patches = vision.patches if beside_image else 0
        widest = max(text.intermediate_size, int(vision.width * vision.mlp_ratio) if beside_image else 0)
        return passes([patches + length for length in lengths], widest, self.torch_model.input_device.type)


def _parts(model: Encodes) -> dict[str, Callable[..., Tensor]]:
    return {"text": model.encode_text, "image": model.image_tokens, "beside": model.encode_beside}


# in the official files, never used by the branch that runs
DEAD_KEYS = re.compile(
    r"bge_pooler\..*|bge_embeddings\.position_ids|model_visual\.logit_scale|model_visual\.visual\.(norm|head)\..*"
    r"|model_visual\.visual\.blocks\.\d+\.attn\.rope\..*"
)


def load_visualized_bge(
    name: str | os.PathLike[str] = DEFAULT_MODEL,
    *,
    tokenizer: str | os.PathLike[str] | None = None,
    revision: str | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
) -> tuple[VisualizedBGE, VisualizedBGEProcessor]:
    """A model ready for inference, under transformers' class, and the processor that feeds it.

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
    from mm_retriever.embedders.visualized_bge.model import with_parts_of

    device = as_device(device)  # before anything is downloaded
    files = locate(name, MODELS, revision=revision)
    network, processor = load_files(files, device=device, dtype=dtype, tokenizer=tokenizer)
    return with_parts_of(network), processor


def load_files(
    files: ModelFiles,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
) -> tuple[VisualizedBGENetwork, VisualizedBGEProcessor]:
    """As :func:`load_visualized_bge`, from files that were found already, and in plain torch."""
    config, state = read_checkpoint(files)
    model = fill_model(config, state, files, device=as_device(device), dtype=as_dtype(dtype))
    return model, VisualizedBGEProcessor(config, find_tokenizer(files, tokenizer, tokenizer_repo(config)))


def read_checkpoint(files: ModelFiles) -> tuple[Shape, dict[str, Tensor]]:
    """Return the config and the tensors, without those that no code reads."""
    warn_if_not_published(files.weights, MODELS)
    state = {key: tensor for key, tensor in read_state_dict(files.weights).items() if not DEAD_KEYS.fullmatch(key)}
    if files.config is None:
        return config_from_tensors(state, files.weights), state
    return read_config(files.config), state


def fill_model(
    config: Shape,
    state: Mapping[str, Tensor],
    files: ModelFiles,
    *,
    device: torch.device,
    dtype: torch.dtype,
) -> VisualizedBGENetwork:
    """Return the model with these tensors in it, ready for inference."""
    model = skeleton(lambda: VisualizedBGENetwork(config), files.weights)
    load_strict(model, state, source=files.weights, device=device, dtype=dtype)
    model.fingerprint = original_fingerprint(state, {"rounded": config.rounded})
    model.train(False)
    return pack_linears(model)


def convert_files(
    files: ModelFiles,
    out: str | os.PathLike[str],
    *,
    tokenizer: str | os.PathLike[str] | None = None,
    dtype: torch.dtype | str | None = None,
) -> Path:
    """Write the files of a model as a folder and return it; without ``dtype`` the floats keep their format."""
    from mm_retriever.embedders.visualized_bge.model import VisualizedBGE, VisualizedBGEConfig

    shape, state = read_checkpoint(files)
    stored = state["visual_proj.weight"].dtype if "visual_proj.weight" in state else torch.float32
    model = fill_model(shape, state, files, device=torch.device("cpu"), dtype=as_dtype(dtype, default=stored))
    config = VisualizedBGEConfig.of(shape)
    config.architectures = [VisualizedBGE.__name__]
    config.dtype = model.dtype
    content = json.loads(config.to_json_string())
    folder = write_folder(out, model.state_dict(), content, original=model.fingerprint)
    copy_tokenizer(folder, files, tokenizer, tokenizer_repo(shape))
    return folder
