"""A tiny real embedder for tests at the public seam: an image is the histogram of its colours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from mm_retriever.embedders.embedder import Content
from mm_retriever.embedding import ComposedEmbedding

COLOURS = {
    "red": (220, 20, 20), "green": (20, 200, 20), "blue": (20, 20, 220), "yellow": (230, 220, 30),
    "white": (250, 250, 250), "black": (5, 5, 5), "grey": (128, 128, 128), "purple": (140, 30, 160),
}  # fmt: skip


class ColourEmbedder:
    """Unit vectors of 27 numbers: how many pixels fall into each third of red, green and blue.

    A text is the mean of the colours that it names (grey if it names none), so "red" finds red images.
    """

    note = "float32"
    dimension = 27

    def __init__(self, name: str = "colours") -> None:
        self.name = self.space = name

    def prepare(self, image: Image.Image) -> np.ndarray:
        return np.asarray(image.convert("RGB").resize((16, 16)))

    def encode(self, contents: Sequence[Content], *, query: bool = False) -> np.ndarray:
        return np.stack([self._vector(content) for content in contents])

    def _vector(self, content: Content) -> np.ndarray:
        if content.image is None:
            return self._text(content.text)
        if not content.text:
            return self._histogram(content.image)
        return unit(self._text(content.text) + self._histogram(content.image))

    def _text(self, text: str) -> np.ndarray:
        named = [colour for colour in COLOURS if colour in text.lower()] or ["grey"]
        return unit(sum(self._histogram(np.uint8([[COLOURS[colour]]])) for colour in named))

    def _histogram(self, pixels: np.ndarray) -> np.ndarray:
        thirds = pixels.reshape(-1, 3).astype(np.int64) * 3 // 256
        return unit(np.bincount(thirds @ (9, 3, 1), minlength=27).astype(np.float32))


def unit(vector: np.ndarray) -> np.ndarray:
    return vector / np.linalg.norm(vector)


class ColourEmbedding(ComposedEmbedding):
    """`ColourEmbedder` in LlamaIndex; subclasses may have fields of their own, with defaults."""

    model_name: str = "colours"
    embedded: int = 0

    def __init__(self, model_name: str | ColourEmbedder | None = None, **fields: Any) -> None:
        name = model_name or type(self).model_fields["model_name"].default
        super().__init__(self.embedder_of(name) if isinstance(name, str) else name)
        for field, value in fields.items():
            setattr(self, field, value)

    def embedder_of(self, name: str) -> ColourEmbedder:
        return ColourEmbedder(name)

    def embed_images(self, images: Sequence[Any]) -> np.ndarray:
        self.embedded += len(images)
        return super().embed_images(images)


def paint(path: Any, colour: str, size: tuple[int, int] = (24, 18)) -> Any:
    """Write an image of one colour and return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, COLOURS[colour]).save(path)
    return path
