"""A scorer as anybody may write one: candidates whose mean colour is near the query image's score high."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from mm_retriever.rerank.reranker import Reranker, ScorerRerank
from mm_retriever.rerank.scorer import Candidate, Meter, Query

MODELS = {"mean-colour": "from 0 to 1", "colour-distance": "distances below 0"}


def recognises(name: str, config: Mapping[str, Any], base_url: str | None) -> bool:
    return name in MODELS


def load(name: str, *, device: str | None = None, **options: Any) -> Reranker:
    return ScorerRerank(MeanColour(name, calibrated=name == "mean-colour"), **options)


class MeanColour:
    def __init__(self, name: str, *, calibrated: bool) -> None:
        self.name, self.calibrated = name, calibrated

    def score(self, query: Query, candidates: Sequence[Candidate], meter: Meter) -> list[float | None]:
        meter.passes += 1
        if query.image is None:
            return [None] * len(candidates)
        wanted = _mean(query.image)
        return [None if each.image is None else self._near(wanted, _mean(each.image)) for each in candidates]

    def _near(self, wanted: np.ndarray, colour: np.ndarray) -> float:
        distance = float(np.abs(wanted - colour).mean())
        return 1 - distance / 255 if self.calibrated else -distance


def _mean(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB"), dtype=np.float64).mean((0, 1))
