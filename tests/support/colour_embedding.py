"""A tiny real embedding for tests at the public seam: a picture is the histogram of its colours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from llama_index.core.embeddings import MultiModalEmbedding
from llama_index.core.schema import QueryBundle
from PIL import Image

from mm_retriever.images import load_image

COLOURS = {
    "red": (220, 20, 20), "green": (20, 200, 20), "blue": (20, 20, 220), "yellow": (230, 220, 30),
    "white": (250, 250, 250), "black": (5, 5, 5), "grey": (128, 128, 128), "purple": (140, 30, 160),
}  # fmt: skip


class ColourEmbedding(MultiModalEmbedding):
    """Unit vectors of 27 numbers: how many pixels fall into each third of red, green and blue.

    A text is the mean of the colours that it names (grey if it names none), so "red" finds red pictures.
    """

    model_name: str = "colours"
    embedded: int = 0

    @property
    def dimension(self) -> int:
        return 27

    @property
    def model_id(self) -> str:
        return self.model_name

    def prepare_image(self, image: Image.Image) -> Image.Image:
        return image.convert("RGB").resize((16, 16))

    def embed_images(self, images: Sequence[Image.Image]) -> np.ndarray:
        self.embedded += len(images)
        return np.stack([self._histogram(image) for image in images])

    def _histogram(self, image: Image.Image) -> np.ndarray:
        pixels = np.asarray(self.prepare_image(image), dtype=np.int64).reshape(-1, 3) * 3 // 256
        counts = np.bincount(pixels @ (9, 3, 1), minlength=27).astype(np.float32)
        return counts / np.linalg.norm(counts)

    def _get_text_embedding(self, text: str) -> list[float]:
        named = [colour for colour in COLOURS if colour in text.lower()] or ["grey"]
        vector = sum(self._histogram(Image.new("RGB", (8, 8), COLOURS[colour])) for colour in named)
        return (vector / np.linalg.norm(vector)).tolist()

    def _get_query_embedding(self, query: str) -> list[float]:
        return self._get_text_embedding(query)

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return self._get_text_embedding(query)

    def _get_image_embedding(self, img_file_path: Any) -> list[float]:
        return self.embed_images([load_image(img_file_path)])[0].tolist()

    async def _aget_image_embedding(self, img_file_path: Any) -> list[float]:
        return self._get_image_embedding(img_file_path)

    def get_composed_embedding(self, text: str, image: Any) -> list[float]:
        vector = np.asarray(self.get_text_embedding(text)) + np.asarray(self.get_image_embedding(image))
        return (vector / np.linalg.norm(vector)).tolist()

    def get_query_bundle(self, text: str | None = None, image: Any = None) -> QueryBundle:
        if text and image is not None:
            vector = self.get_composed_embedding(text, image)
        else:
            vector = self.get_query_embedding(text) if text else self.get_image_embedding(image)
        return QueryBundle(query_str=text or "", image_path=str(image) if image is not None else None, embedding=vector)


def paint(path: Any, colour: str, size: tuple[int, int] = (24, 18)) -> Any:
    """Write a picture of one colour and return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, COLOURS[colour]).save(path)
    return path
