"""What a process keeps working after a fork: locks, and torch.

A fork copies every lock as it is, a held one too, but none of the threads that would release it; and torch's threads
are gone while its pool still waits for them. So in a forked child locks are new, and torch computes on one thread.
"""

from __future__ import annotations

import os
import sys
import threading
import weakref
from collections.abc import Callable
from types import TracebackType
from typing import Any

from mm_retriever.errors import CheckpointError


class ForkLock:
    """A lock that is free in a forked child, whoever held it in the parent.

    Args:
        make: `threading.Lock`, or `threading.RLock` for one that its holder may take again.
    """

    def __init__(self, make: Callable[[], Any] = threading.Lock) -> None:
        self._make = make
        self._lock = make()
        _LOCKS.add(self)

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.release()

    def renew(self) -> None:
        """Be a new lock that nobody holds."""
        self._lock = self._make()


def check_forked(loaded_in: int, device: str) -> None:
    """Refuse to compute on a GPU in a child of the process that loaded the model.

    Args:
        loaded_in: id of the process that loaded the model.
        device: the kind of device that the model is on.

    Raises:
        CheckpointError: says how workers can be started.
    """
    if loaded_in != os.getpid() and device != "cpu":
        raise CheckpointError(
            f"the model was loaded on {device!r} before this process was forked, where a GPU cannot be used; "
            "load it in each worker, or start workers by 'spawn'"
        )


def _in_child() -> None:
    for lock in list(_LOCKS):
        lock.renew()
    torch = sys.modules.get("torch")
    if torch is not None and hasattr(torch, "set_num_threads"):
        torch.set_num_threads(1)


_LOCKS: weakref.WeakSet[ForkLock] = weakref.WeakSet()
if hasattr(os, "register_at_fork"):  # Windows does not fork
    os.register_at_fork(after_in_child=_in_child)
