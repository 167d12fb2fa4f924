"""`VisualizedBGEEncoder`: the model as an `Embedder`, in passes of bounded size.

The model runs one pass at a time, whichever thread asks: its products use every core anyway, and memory stays flat.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from mm_retriever.embedders.embedder import Content
from mm_retriever.embedders.visualized_bge.model import VisualizedBGE
from mm_retriever.embedders.visualized_bge.processor import VisualizedBGEProcessor
from mm_retriever.forks import ForkLock, check_forked

PASS_VALUES = {"cpu": 2_500_000, "other": 160_000_000}
"""Values of the widest layer that one pass may make. On a CPU 10 MB: more would be fetched from memory, and fresh pages
from the system, layer after layer (a batch of 32 images in one pass took a tenth longer than in passes of four)."""


class VisualizedBGEEncoder:
    """A Visualized BGE model and its processor as an `Embedder`.

    Args:
        model: from `load_visualized_bge`.
        processor: the same.
        name: for people.
    """

    def __init__(self, model: VisualizedBGE, processor: VisualizedBGEProcessor, *, name: str = "") -> None:
        self.model = model
        self.processor = processor
        self.name = name
        self.note = str(model.dtype).removeprefix("torch.")
        self.space = f"visualized-bge@{model.fingerprint}.{processor.fingerprint()}"
        self.cache_identity = f"{model.fingerprint}/{self.note}"
        self._turn = ForkLock()
        self._loaded_in = os.getpid()

    @property
    def dimension(self) -> int:
        """Length of every vector."""
        return int(self.model.config.dimension)

    @property
    def device(self) -> str:
        """Where the model is."""
        return str(self.model.input_device)

    def prepare(self, image: Image.Image) -> NDArray[np.uint8]:
        """(H, W, 3): the square that the model sees."""
        return self.processor.square(image)

    def encode(self, contents: Sequence[Content], *, query: bool = False) -> NDArray[np.float32]:
        """(B, D), L2-normalised, row by row; short texts go through the model with short ones.

        Args:
            contents: what to embed.
            query: makes no difference to this family.
        """
        check_forked(self._loaded_in, self.model.device.type)
        vectors = np.empty((len(contents), self.model.config.dimension), dtype=np.float32)
        for beside_image in (False, True):
            rows = [row for row, content in enumerate(contents) if (content.image is not None) == beside_image]
            ids = self.processor.token_ids([contents[row].text for row in rows], beside_image=beside_image)
            order = sorted(range(len(rows)), key=lambda place: len(ids[place]))
            for part in self._passes([len(ids[place]) for place in order], beside_image=beside_image):
                places = [order[place] for place in part]
                tokens = self.processor.pad([ids[place] for place in places])
                squares = [contents[rows[place]].image for place in places] if beside_image else []
                with self._turn, torch.inference_mode():
                    encoded = self._encode(tokens, squares).cpu().numpy()
                vectors[[rows[place] for place in places]] = encoded
        return vectors

    def _encode(self, tokens: dict[str, Tensor], squares: Sequence[Any]) -> Tensor:
        device = self.model.input_device
        tokens = {name: tensor.to(device) for name, tensor in tokens.items()}
        if not squares:
            return self.model.encode_text(**tokens)
        first: dict[bytes, int] = {}  # an image beside several texts goes through the tower once
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
