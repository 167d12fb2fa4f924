"""Any embedding of LlamaIndex as an `Embedder`: `ComposedEmbedding(LlamaIndexEmbedder(VoyageEmbedding(...)))`.

An image with a text is the sum of both vectors: LlamaIndex's interface has no call for the two together.
"""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.embeddings import MultiModalEmbedding
from numpy.typing import NDArray
from PIL import Image

from mm_retriever.embedders.embedder import Content, Pixels
from mm_retriever.errors import ModelServerError, QueryError

LARGEST_SIDE = 1_024  # pixels; the services that these packages ask scale images down themselves


class LlamaIndexEmbedder:
    """A `MultiModalEmbedding`, or a `BaseEmbedding` for texts alone.

    Args:
        model: made by its own package, with its own options.
        dimension: of its vectors; default: that of a word, which is embedded now.
    """

    note = "as its package computes it"

    def __init__(self, model: BaseEmbedding, *, dimension: int | None = None) -> None:
        self._model = model
        self.name = model.model_name
        self.dimension = dimension or len(model.get_text_embedding("image"))
        self.space = f"{type(model).__name__}/{model.model_name}/{self.dimension}"

    def prepare(self, image: Image.Image) -> Pixels:
        """See `Embedder`."""
        small = image.convert("RGB")
        small.thumbnail((LARGEST_SIDE, LARGEST_SIDE))
        return np.asarray(small)

    def encode(self, contents: Sequence[Content], *, query: bool = False) -> NDArray[np.float32]:
        """See `Embedder`."""
        texts = [content.text for content in contents if content.text or content.image is None]
        images = [_png(content.image) for content in contents if content.image is not None]
        if images and not isinstance(self._model, MultiModalEmbedding):
            raise QueryError(f"{self.name!r} embeds texts and no images: give a MultiModalEmbedding of LlamaIndex")
        embed = self._model.get_text_embedding_batch
        words = [self._model.get_query_embedding(text) for text in texts] if query else embed(texts)
        pixels = self._model.get_image_embedding_batch(images) if images else []  # type: ignore[attr-defined]
        if (len(words), len(pixels)) != (len(texts), len(images)):
            counts = f"{len(words)} of {len(texts)} texts and {len(pixels)} of {len(images)} images"
            raise ModelServerError(f"{self.name!r} gave other numbers of vectors than it was given contents: {counts}")
        of_texts, of_images = iter(words), iter(pixels)
        rows = np.zeros((len(contents), self.dimension), dtype=np.float32)
        for row, content in zip(rows, contents, strict=True):
            parts = [next(of_texts)] if content.text or content.image is None else []
            parts += [next(of_images)] if content.image is not None else []
            for part in parts:
                row += self._unit(part)
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        return rows

    def _unit(self, vector: Sequence[float]) -> NDArray[np.float32]:
        """(D,) of length 1.

        Raises:
            ModelServerError: the package gave something else than a vector of this model.
        """
        numbers = np.asarray(vector, dtype=np.float64)
        length = float(np.linalg.norm(numbers))
        if numbers.shape != (self.dimension,) or not 0 < length < np.inf:
            raise ModelServerError(
                f"{self.name!r} gave a vector of {numbers.size} numbers and length {length:g}; expected "
                f"{self.dimension} numbers with a direction"
            )
        return (numbers / length).astype(np.float32)


def _png(pixels: Pixels) -> io.BytesIO:
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "PNG")
    data.seek(0)
    return data
