"""How many inputs go through a torch model together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

PASS_VALUES = {"cpu": 2_500_000, "other": 160_000_000}
"""Values of the widest layer that one pass may make. On a CPU 10 MB: more would be fetched from memory, and fresh pages
from the system, layer after layer (a batch of 32 images in one pass took a tenth longer than in passes of four)."""


def passes(lengths: Sequence[int], widest: int, device: str) -> Iterator[range]:
    """Ranges of rows that go through the model together.

    Args:
        lengths: tokens of every row, ascending.
        widest: values that the widest layer makes of one token.
        device: the kind of device that the model is on.
    """
    most = PASS_VALUES["cpu" if device == "cpu" else "other"] // widest  # tokens
    start = 0
    for row, length in enumerate(lengths):
        if row > start and (row + 1 - start) * length > most:
            yield range(start, row)
            start = row
    if start < len(lengths):
        yield range(start, len(lengths))
