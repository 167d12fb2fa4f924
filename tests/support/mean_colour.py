"""A whole model family in one module: a vector is a mean colour. One word in the registry makes it a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageColor

from mm_retriever.checkpoint import ModelEntry, ModelFiles
from mm_retriever.embedders.embedder import Content

MODELS = {"mean-colour": ModelEntry(note="for tests")}


def recognises(files: ModelFiles) -> bool:
    return files.name in MODELS


def load(files: ModelFiles, *, device: Any = None, dtype: Any = None, **options: Any) -> MeanColour:
    return MeanColour(**options)


class MeanColour:
    """Red, green and blue of an image or of the first word that names a colour; a pair is their mean."""

    name, space, note, dimension = "mean-colour", "mean-colour@1", "float32", 3

    def __init__(self, query_gain: float = 1.0) -> None:
        self.query_gain = query_gain
        self.queries: list[Content] = []

    def prepare(self, image: Image.Image) -> np.ndarray:
        return np.asarray(image.convert("RGB").resize((8, 8)))

    def encode(self, contents: Sequence[Content], *, query: bool = False) -> np.ndarray:
        if query:
            self.queries += contents
        return np.float32([self._vector(content) for content in contents])

    def _vector(self, content: Content) -> np.ndarray:
        parts = [] if content.image is None else [content.image.reshape(-1, 3).mean(0)]
        words = content.text.lower().split()
        parts += [np.array(ImageColor.getrgb(word), dtype=float) for word in words if word in ImageColor.colormap]
        mean = np.mean(parts or [[1, 1, 1]], axis=0) + 1
        return mean / np.linalg.norm(mean)
