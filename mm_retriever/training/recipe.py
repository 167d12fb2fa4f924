"""How a model is trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mm_retriever.errors import QueryError, shown

TEMPERATURE = 0.02
LORA_RANK = 32
EVALUATIONS = 10  # in the course of a training
PATIENCE = 3  # evaluations without a better one, after which it ends
SHARES = (1.0, 0.75, 0.5, 0.25)  # of the way from the weights before to the best ones, of which the best is kept


@dataclass(frozen=True)
class Recipe:
    """How a model is trained; the defaults are the published ones of VISTA, for a small set.

    Args:
        epochs: how often every query is seen, at most: training ends earlier when held-out queries get no better.
        batch_size: queries a step and process; the right images of the others are wrong ones of each.
        learning_rate: at its height; None: 2e-5, with LoRA 2e-4.
        negatives: wrong images of each query, beside those of the batch; the query image is always one of them.
        lora: train adapters of rank 32 on all linear layers, which are merged into the weights at the end.
        freeze: the side of the model that stays as it is.
        bf16: compute in bfloat16; the weights stay in float32.
        gradient_checkpointing: compute layers twice, for less memory.
        pass_size: contents that go through the model together; has no bearing on the result but for rounding.
        held_out: share of the queries that is evaluated on, and not trained on.
        seed: of the split and of the order.

    Raises:
        QueryError: a number that is out of range.
    """

    epochs: int = 3
    batch_size: int = 64
    learning_rate: float | None = None
    negatives: int = 4
    lora: bool = False
    freeze: Literal["text", "image"] | None = None
    bf16: bool = False
    gradient_checkpointing: bool = False
    pass_size: int = 32
    held_out: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least, most in (
            ("epochs", 1, 10_000),
            ("batch_size", 2, 2**20),
            ("negatives", 1, 64),
            ("pass_size", 1, 2**20),
            ("seed", 0, 2**31),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
                raise QueryError(f"{name} is {shown(value)}; give a whole number from {least} to {most}")
        if not 0 < self.rate <= 1:
            raise QueryError(f"learning_rate is {shown(self.learning_rate)}; give a number above 0, at most 1")
        if not 0 < self.held_out < 1:
            raise QueryError(f"held_out is {shown(self.held_out)}; give a share between 0 and 1")
        if self.freeze not in (None, "text", "image"):
            raise QueryError(f"freeze is {shown(self.freeze)}; give text or image, or leave it out")

    @property
    def rate(self) -> float:
        """The learning rate at its height."""
        if self.learning_rate is not None:
            return self.learning_rate
        return 2e-4 if self.lora else 2e-5
