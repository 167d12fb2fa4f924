"""Vectors of images and texts, and what happens when the model fails.

One image that the model cannot take does not cost its batch; a model that is broken ends the run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from mm_retriever.embedding import ComposedEmbedding
from mm_retriever.errors import ModelServerError, reason_of

_NEVER_WORKED = 3
"""Failures without one success, after which the model is broken and not the images."""

_BROKEN = 32
"""Failures in a row that say the same of a model that has worked before: a device that is lost."""

T = TypeVar("T")
Vector = npt.NDArray[np.float32]


class Vectors:
    """A vector for each input, or the reason why there is none."""

    def __init__(self, embed_model: ComposedEmbedding) -> None:
        self._embed_model = embed_model
        self._embedded = 0
        self._failures = 0

    def of_images(self, prepared: Sequence[Any]) -> list[Vector | str]:
        """Embed what `prepare_image` returned."""
        return self._embed(prepared, self._embed_model.embed_images)

    def of_texts(self, texts: Sequence[str]) -> list[Vector | str]:
        """Embed texts."""
        return self._embed(
            texts, lambda texts: np.asarray(self._embed_model.get_text_embedding_batch(list(texts)), dtype=np.float32)
        )

    def _embed(self, inputs: Sequence[T], embed: Callable[[Sequence[T]], Vector]) -> list[Vector | str]:
        if not inputs:
            return []
        try:
            vectors = embed(inputs)
        except Exception as error:  # whatever a model raises
            if isinstance(error, ModelServerError) and error.passing:
                raise  # asked again often enough: it is not the images
            if len(inputs) > 1:
                return [self._embed([item], embed)[0] for item in inputs]
            self._failures += 1
            if self._failures >= (_BROKEN if self._embedded else _NEVER_WORKED):
                raise
            return [f"the model failed: {reason_of(error)}"]
        self._embedded += len(inputs)
        self._failures = 0
        return [row if np.isfinite(row).all() else "the model gave NaN or infinity for it" for row in vectors]
