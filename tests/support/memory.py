"""How much more memory this process holds at its height while some code runs.

`ru_maxrss` does not tell: it is the highest ever, so that an earlier test hides what a later one takes, and a child
process starts with its parent's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

_STATUS = Path("/proc/self/status")


def peak_mib() -> int:
    """The highest resident memory since the last reset, or since the process began its program."""
    lines = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines() if ":" in line)
    return int(lines["VmHWM"].split()[0]) // 1024


@contextmanager
def peak_growth() -> Iterator[Callable[[], int]]:
    """Give a function that returns the MiB by which memory was higher than at the beginning of the block."""
    if not _STATUS.exists():
        pytest.skip("only Linux tells the height of a process's memory")
    Path("/proc/self/clear_refs").write_text("5")  # the height is what is held now
    before = peak_mib()
    yield lambda: peak_mib() - before
