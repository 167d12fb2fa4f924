"""When to ask a server again."""

from __future__ import annotations

from collections.abc import Callable

from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_attempt, wait_exponential, wait_random

from mm_retriever.servers.failures import LONGEST_WAIT, is_transient, retry_after


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
