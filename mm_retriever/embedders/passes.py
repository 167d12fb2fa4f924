"""How many inputs go through a torch model together."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch

logger = logging.getLogger(__name__)

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


def in_passes(parts: Iterable[range], run: Callable[[range], None]) -> None:
    """Run passes in their order; one that the device has no memory for is run in halves.

    Raises:
        torch.OutOfMemoryError: there is none for a single row.
    """
    waiting = list(parts)[::-1]
    while waiting:
        part = waiting.pop()
        try:
            run(part)
            continue
        except torch.OutOfMemoryError:
            if len(part) == 1:
                raise
        logger.warning("the device has no memory for %d inputs at once: they are computed in halves", len(part))
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        middle = part.start + len(part) // 2
        waiting += [range(middle, part.stop), range(part.start, middle)]
