"""Texts, pictures and pairs of any number to vectors, in passes of a bounded size. Knows nothing of LlamaIndex.

The model runs one pass at a time, whichever thread asks: its products use every core anyway, and memory stays flat.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mm_retriever.embedders.visualized_bge.model import VisualizedBGE
from mm_retriever.embedders.visualized_bge.processor import VisualizedBGEProcessor
from mm_retriever.forks import ForkLock, check_forked

PASS_VALUES = {"cpu": 2_500_000, "other": 160_000_000}
"""Values of the widest layer that one pass may make. On a CPU 10 MB: more would be fetched from memory, and fresh pages
from the system, layer after layer (a batch of 32 pictures in one pass took a tenth longer than in passes of four)."""


@dataclass(frozen=True)
class Content:
    """All that the model sees of a text, a picture, or both. ``square``: (H, W, 3) uint8, as the processor made it."""

    text: str = ""
    square: NDArray[np.uint8] | None = None

    def key(self, model: str) -> bytes:
        """The same for the same content and model, and for nothing else."""
        kind = "text" if self.square is None else f"picture {self.square.shape} {self.square.dtype}"
        digest = hashlib.sha256(f"{model}\0{kind}\0".encode())
        if self.square is not None:
            digest.update(self.square.tobytes())
        digest.update(self.text.encode("utf-8", "surrogatepass"))
        return digest.digest()


class VisualizedBGEEncoder:
    """A model and its processor behind one call; any number of threads may share it."""

    def __init__(self, model: VisualizedBGE, processor: VisualizedBGEProcessor) -> None:
        self.model = model
        self.processor = processor
        self._turn = ForkLock()
        self._loaded_in = os.getpid()

    def encode(self, contents: Sequence[Content]) -> NDArray[np.float32]:
        """(B, D), L2-normalised, row by row; short texts go through the model with short ones."""
        check_forked(self._loaded_in, self.model.device.type)
        vectors = np.empty((len(contents), self.model.config.dimension), dtype=np.float32)
        for beside_image in (False, True):
            rows = [row for row, content in enumerate(contents) if (content.square is not None) == beside_image]
            ids = self.processor.token_ids([contents[row].text for row in rows], beside_image=beside_image)
            order = sorted(range(len(rows)), key=lambda place: len(ids[place]))
            for part in self._passes([len(ids[place]) for place in order], beside_image=beside_image):
                places = [order[place] for place in part]
                tokens = self.processor.pad([ids[place] for place in places])
                squares = [contents[rows[place]].square for place in places] if beside_image else []
                with self._turn, torch.inference_mode():
                    encoded = self._encode(tokens, squares).cpu().numpy()
                vectors[[rows[place] for place in places]] = encoded
        return vectors

    def _encode(self, tokens: dict[str, Tensor], squares: Sequence[Any]) -> Tensor:
        device = self.model.input_device
        tokens = {name: tensor.to(device) for name, tensor in tokens.items()}
        if not squares:
            return self.model.encode_text(**tokens)
        first: dict[bytes, int] = {}  # a picture beside several texts is looked at once
        places = [first.setdefault(square.tobytes(), len(first)) for square in squares]
        pixel_values = self.processor.pixel_values([squares[places.index(place)] for place in range(len(first))])
        image_tokens = self.model.image_tokens(pixel_values.to(device))
        if len(first) < len(squares):
            image_tokens = image_tokens[places]
        return self.model.encode_beside(image_tokens, **tokens)

    def _passes(self, lengths: Sequence[int], *, beside_image: bool) -> Iterator[range]:
        """Ranges of rows, which come sorted by length, that go through the model together."""
        vision, text = self.model.config.vision_shape, self.model.config.text_shape
        patches = vision.patches if beside_image else 0
        widest = max(text.intermediate_size, int(vision.width * vision.mlp_ratio) if beside_image else 0)
        most = PASS_VALUES["cpu" if self.model.input_device.type == "cpu" else "other"] // widest  # tokens
        start = 0
        for row, length in enumerate(lengths):
            if row > start and (row + 1 - start) * (patches + length) > most:
                yield range(start, row)
                start = row
        if start < len(lengths):
            yield range(start, len(lengths))
