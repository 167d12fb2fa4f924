"""Vectors of images and texts: one bad image does not cost its batch, a broken model ends the run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from mm_retriever.embedding import ComposedEmbedding
from mm_retriever.errors import reason_of

_HOPELESS = 3
"""Failures of the model without one success, after which it is the model that is broken and not the pictures."""

_BROKEN = 32
"""Failures in a row that say the same of a model that has worked before: a device that is lost."""

T = TypeVar("T")
Vector = npt.NDArray[np.float32]


class Vectors:
    """What a model makes of prepared pictures and of texts: a vector for each, or the reason why there is none."""

    def __init__(self, embed_model: ComposedEmbedding) -> None:
        self._embed_model = embed_model
        self._embedded = 0
        self._failures = 0

    def of_pictures(self, prepared: Sequence[Any]) -> list[Vector | str]:
        """Return a vector or a reason for each prepared picture."""
        return self._vectors(prepared, self._embed_model.embed_images)

    def of_texts(self, texts: Sequence[str]) -> list[Vector | str]:
        """Return a vector or a reason for each text."""
        return self._vectors(texts, self._text_vectors)

    def _text_vectors(self, texts: Sequence[str]) -> Vector:
        return np.asarray(self._embed_model.get_text_embedding_batch(list(texts)), dtype=np.float32)

    def _vectors(self, inputs: Sequence[T], embed: Callable[[Sequence[T]], Vector]) -> list[Vector | str]:
        if not inputs:
            return []
        try:
            vectors = embed(inputs)
        except Exception as error:  # whatever a model raises
            if len(inputs) > 1:
                return [self._vectors([one], embed)[0] for one in inputs]
            self._failures += 1
            if self._failures >= (_BROKEN if self._embedded else _HOPELESS):
                raise
            return [f"the model failed: {reason_of(error)}"]
        self._embedded += len(inputs)
        self._failures = 0
        return [row if np.isfinite(row).all() else "the model gave NaN or infinity for it" for row in vectors]
