"""An attempt in bounded time, and when to make the next one."""

from __future__ import annotations

import contextvars
import queue
import threading
from collections.abc import Callable
from typing import Any, TypeVar

from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_attempt, wait_exponential, wait_random

from mm_retriever.servers.failures import LONGEST_WAIT, is_transient, retry_after

T = TypeVar("T")


def retrying(attempts: int, retry_wait_s: float, left: Callable[[], float | None]) -> Retrying:
    """Return what repeats a call that fails with an error that may pass, and raises the last one.

    Args:
        attempts: most calls.
        retry_wait_s: before the second; doubles with each, up to a minute. A server's Retry-After is obeyed up to a
            minute; one that asks for more is not asked again.
        left: seconds that are left for all of them; None: as many as it takes.
    """
    backoff = wait_exponential(multiplier=retry_wait_s, max=60) + wait_random(0, retry_wait_s / 2)

    def again(error: BaseException) -> bool:
        wait, seconds = retry_after(error), left()
        return is_transient(error) and wait <= LONGEST_WAIT and (seconds is None or wait < seconds)

    def pause(state: RetryCallState) -> float:
        error = state.outcome.exception() if state.outcome else None
        return max(float(backoff(state)), 0.0 if error is None else retry_after(error))

    return Retrying(stop=stop_after_attempt(attempts), wait=pause, retry=retry_if_exception(again), reraise=True)


def within(work: Callable[[], T], seconds: float) -> T:
    """Return what `work` returns, or raise a TimeoutError; its thread then ends with the process at the latest.

    Args:
        work: called in a thread of its own, in the caller's context.
        seconds: at most.
    """
    results: queue.SimpleQueue[tuple[bool, Any]] = queue.SimpleQueue()
    context = contextvars.copy_context()

    def run() -> None:
        try:
            results.put((True, context.run(work)))
        except BaseException as error:
            results.put((False, error))

    threading.Thread(target=run, name="ask-server", daemon=True).start()
    try:
        done, result = results.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(f"no answer within {seconds:.3g} s") from None
    if not done:
        raise result
    return result  # type: ignore[no-any-return]
