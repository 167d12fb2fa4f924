"""The seam between reranking and the models that score: `Scorer`, and what it is given.

A new model is one class with three members; `mm_retriever.rerank.registry` gives it a name, and
`mm_retriever.rerank.reranker.ScorerRerank` makes it a node postprocessor of LlamaIndex.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from PIL import Image

from mm_retriever.rerank.candidates import Candidate


@dataclass(frozen=True)
class Query:
    """What is asked: a text, an image, or both."""

    text: str
    image: Image.Image | None


@dataclass(frozen=True)
class Usage:
    """What a reranking cost.

    Attributes:
        prefilled: tokens of prompts that were computed.
        generated: tokens that the model chose.
        passes: runs of the model or calls of the server.
        images: images that went through the vision tower.
        images_kept: images whose features were still in memory.
    """

    prefilled: int = 0
    generated: int = 0
    passes: int = 0
    images: int = 0
    images_kept: int = 0
    seconds: float = 0.0


class Meter:
    """Counts what one reranking costs, and knows when its time is up."""

    def __init__(self, budget_s: float | None) -> None:
        self.prefilled = self.generated = self.passes = self.images = self.images_kept = 0
        self._started = time.monotonic()
        self._budget = budget_s

    def out_of_time(self) -> bool:
        """Whether the budget is spent."""
        return self.left() == 0

    def left(self) -> float | None:
        """Seconds that are left of the budget; None: as many as it takes."""
        return None if self._budget is None else max(0.0, self._budget - (time.monotonic() - self._started))

    def usage(self) -> Usage:
        """The figures so far."""
        seconds = time.monotonic() - self._started
        return Usage(self.prefilled, self.generated, self.passes, self.images, self.images_kept, seconds)


class Scorer(Protocol):
    """A model that says how well each candidate fits a query."""

    @property
    def name(self) -> str:
        """For people: in messages, events and reports."""
        ...

    @property
    def calibrated(self) -> bool:
        """Whether a score means the same in every list, from 0 (does not fit) to 1 (fits).

        Calibrated scores become the nodes' scores as they are; others only order a list, and become softmax shares.
        """
        ...

    def score(self, query: Query, candidates: Sequence[Candidate], meter: Meter) -> list[float | None]:
        """A score for each candidate, higher is better; None for one that was not judged.

        Args:
            query: has a text, an image, or both.
            candidates: at least one, in the order of retrieval; each has an image, or else a text.
            meter: counts tokens and passes; stop early, with None for the rest, when it is `out_of_time`.
        """
        ...
