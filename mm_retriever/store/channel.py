"""A gRPC channel to a Milvus server on which every request ends by its deadline, even if the server disappears.

A request to a server that is unreachable or not ready is repeated until the deadline. pymilvus itself waits for a lost
connection under one lock of the whole process: one thread after the other, each for its whole timeout. So it gets this
channel, which hides lost connections from it. Knows nothing of collections.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import grpc
from pymilvus.client.connection_manager import ConnectionConfig

_OPTIONS = {
    "grpc.max_send_message_length": -1,
    "grpc.max_receive_message_length": -1,
    "grpc.keepalive_time_ms": 10_000,
    "grpc.keepalive_timeout_ms": 5_000,
    "grpc.keepalive_permit_without_calls": 1,
    # gRPC would wait up to two minutes before it connects again to a server that was down
    "grpc.initial_reconnect_backoff_ms": 100,
    "grpc.max_reconnect_backoff_ms": 1_000,
}
_OLD_PARTS = "node not match"
"""What a restarted server answers for half a minute, while parts of its killed predecessor are still registered."""


class Deadline:
    """The time by which a request must have ended.

    Attributes:
        reason: why the request was last repeated, "" if it was not.
    """

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds
        self.reason = ""

    @property
    def left(self) -> float:
        """Seconds until the deadline; 0 or less after it."""
        return self._end - time.monotonic()


_DEADLINE: ContextVar[Deadline | None] = ContextVar("deadline", default=None)


@contextmanager
def deadline(seconds: float) -> Iterator[Deadline]:
    """Set a deadline for every request inside; of nested deadlines the earlier one counts."""
    outer = _DEADLINE.get()
    current = Deadline(seconds) if outer is None or outer.left > seconds else outer
    token = _DEADLINE.set(current)
    try:
        yield current
    finally:
        _DEADLINE.reset(token)


def open_channel(uri: str, timeout: float) -> grpc.Channel | None:
    """Return a connected channel; None for a global cluster, whose servers pymilvus looks up itself.

    The timeout is for connecting, and for requests without a `deadline`.

    Raises:
        grpc.FutureTimeoutError: no answer within the timeout.
    """
    config = ConnectionConfig.from_uri(uri)
    if config.is_global:
        return None
    options = list(_OPTIONS.items())
    if config.get_handler_kwargs().get("secure"):
        channel = grpc.secure_channel(config.address, grpc.ssl_channel_credentials(), options)
    else:
        channel = grpc.insecure_channel(config.address, options)
    try:
        grpc.channel_ready_future(channel).result(timeout)
    except BaseException:
        channel.close()
        raise
    return grpc.intercept_channel(channel, _Retry(timeout))


class _Retry(grpc.UnaryUnaryClientInterceptor):  # type: ignore[misc]
    def __init__(self, timeout: float) -> None:
        self._timeout = timeout

    def intercept_unary_unary(self, continuation: Callable[..., Any], details: Any, request: Any) -> Any:
        """Repeat one request of pymilvus until it is answered; sending it twice is safe."""
        with deadline(details.timeout or self._timeout) as until:
            pause = 0.05
            while True:
                left = until.left
                if left <= 0:  # fails with an error that does not make pymilvus reconnect
                    return continuation(details._replace(timeout=0, wait_for_ready=True), request)
                call = continuation(details._replace(timeout=left), request)
                reason = _reason_to_retry(call)
                if not reason:
                    return call
                until.reason = reason
                time.sleep(min(pause, max(until.left, 0)))
                pause = min(2 * pause, 1.0)


def _reason_to_retry(call: Any) -> str:
    """Why the request is worth repeating; "" if it is not."""
    code = call.code()
    if code is grpc.StatusCode.UNAVAILABLE:
        return str(call.details())
    if code is not grpc.StatusCode.OK:
        return ""
    answer = call.result()
    status = getattr(answer, "status", answer)
    if getattr(status, "retriable", False) or _OLD_PARTS in getattr(status, "reason", ""):
        return str(status.reason)
    return ""
