"""Work in threads: asynchronous twins of methods, images decoded together, calls in bounded time, fair turns, forks.

A fork copies every lock as it is, a held one too, but none of the threads that would release it; and torch's threads
are gone while its pool still waits for them. So in a forked child locks are new, and torch computes on one thread.
"""

from __future__ import annotations

import asyncio
import contextvars
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable, Coroutine, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import wraps
from types import TracebackType
from typing import Any, Concatenate, ParamSpec, TypeVar

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


S = TypeVar("S")
P = ParamSpec("P")
R = TypeVar("R")


def in_thread(method: Callable[Concatenate[S, P], R]) -> Callable[Concatenate[S, P], Coroutine[Any, Any, R]]:
    """Return the twin of a method; where a subclass has another method of that name, the twin calls that."""
    name = method.__name__

    @wraps(method)
    async def twin(self: S, /, *args: P.args, **kwargs: P.kwargs) -> R:
        result: R = await asyncio.to_thread(getattr(self, name), *args, **kwargs)
        return result

    return twin


def in_threads(read: Callable[..., R], *items: Iterable[Any]) -> list[R]:
    """As `map`, for what decodes images: the decoders release the GIL."""
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1), thread_name_prefix="read-image") as readers:
        return list(readers.map(read, *items))


class InThreads:
    """An object whose methods are awaited: each runs in a thread."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        member = getattr(self._inner, name)
        if not callable(member):
            return member

        @wraps(member)
        async def twin(*args: Any, **kwargs: Any) -> Any:
            return await asyncio.to_thread(member, *args, **kwargs)

        return twin


def within(work: Callable[[], R], seconds: float) -> R:
    """Return what `work` returns, or raise a TimeoutError; its thread then ends with the process at the latest.

    Args:
        work: called in a thread of its own, in the caller's context.
        seconds: at most.
    """
    future: Future[R] = Future()
    context = contextvars.copy_context()

    def run() -> None:
        try:
            future.set_result(context.run(work))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="mm_retriever-within", daemon=True).start()
    wait([future], seconds)
    if not future.done():
        raise TimeoutError(f"no answer within {seconds:.3g} s")
    return future.result()


class FairLock:
    """A lock that no thread can keep from the others by taking it again at once; a thread must not take it twice."""

    def __init__(self) -> None:
        self._next, self._held = threading.Lock(), threading.Lock()

    def __enter__(self) -> None:
        self.acquire(-1)

    def acquire(self, seconds: float) -> bool:
        """Take it; returns whether that was possible in so many seconds, which -1 does not limit."""
        until = time.monotonic() + seconds
        # a thread that has just let go waits here, after the one that is already waiting
        if not self._next.acquire(timeout=seconds):
            return False
        try:
            return self._held.acquire(timeout=seconds if seconds < 0 else max(0.0, until - time.monotonic()))
        finally:
            self._next.release()

    def __exit__(self, *_: object) -> None:
        self._held.release()
