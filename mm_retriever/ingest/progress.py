"""How far a run of ingestion is, and whether it goes on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

from tqdm import tqdm

Progress: TypeAlias = Callable[[int, int | None], bool]
"""Asked with how many are done, and of how many; it may wait. False ends the run."""

STOPPED = "stopped before its end: the same call goes on from there"


class Meter:
    """Counts what is done, for a progress bar and for a caller who may stop the run.

    Args:
        bar: shows it.
        ask: None: nobody stops it.
        total: how many there are; None: nobody knows.
    """

    def __init__(self, bar: tqdm[Any], ask: Progress | None, total: int | None) -> None:
        self._bar, self._ask, self._total = bar, ask, total
        self._done = 0
        self.is_stopped = False

    @property
    def notes(self) -> tuple[str, ...]:
        """What a report says of it."""
        return (STOPPED,) if self.is_stopped else ()

    def update(self, count: int = 1) -> None:
        """Count so many more."""
        self._done += count
        self._bar.update(count)

    def goes_on(self) -> bool:
        """Whether the run goes on; once stopped, it does not."""
        if not self.is_stopped and self._ask is not None:
            self.is_stopped = not self._ask(self._done, self._total)
        return not self.is_stopped
