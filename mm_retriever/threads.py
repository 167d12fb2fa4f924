"""Work in threads: asynchronous twins of methods, images that are decoded together, a call in bounded time."""

from __future__ import annotations

import asyncio
import contextvars
import os
import threading
from collections.abc import Callable, Coroutine, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

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
