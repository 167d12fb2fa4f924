"""How much memory all threads together may decode images in. Knows nothing of images but their size.

A file of a few kilobytes can hold a hundred megapixels. Each thread that decodes takes its share of one budget, first
come, first served, and waits where there is too little left; memory that was used goes back to the system.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

BUDGET = 900 * 2**20  # bytes, of all decoding in this process
_WORTH_GIVING_BACK = 64 * 2**20


class MemoryBudget:
    """Bytes that threads share. A thread that holds some takes what it decodes meanwhile from the same share."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._renew()
        if hasattr(os, "register_at_fork"):  # a child starts with no thread of the parent's, and none of their shares
            os.register_at_fork(after_in_child=self._renew)

    def _renew(self) -> None:
        self._free = self.size
        self._queue = threading.Lock()  # a large request is not overtaken for ever by small ones
        self._changed = threading.Condition()
        self._mine = threading.local()

    @contextmanager
    def hold(self, wanted: int) -> Iterator[None]:
        """Wait for so many bytes, or for all there are; they are free again afterwards."""
        if getattr(self._mine, "share", 0):
            yield
            return
        share = min(wanted, self.size)
        with self._queue, self._changed:
            self._changed.wait_for(lambda: self._free >= share)
            self._free -= share
        self._mine.share = share
        try:
            yield
        finally:
            self._mine.share = 0
            if share >= _WORTH_GIVING_BACK:
                give_back()
            with self._changed:
                self._free += share
                self._changed.notify_all()


DECODING = MemoryBudget(BUDGET)


def give_back() -> None:
    """Return freed memory to the system, which glibc otherwise keeps for later."""
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@cache
def _malloc_trim() -> ctypes._FuncPointer | None:
    if not sys.platform.startswith("linux"):
        return None
    return getattr(ctypes.CDLL(None), "malloc_trim", None)
