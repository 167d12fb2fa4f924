"""An HTTP client for servers of models that bounds what one answer can cost: bytes, seconds, memory.

Knows nothing of any protocol.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import httpx

MAX_ANSWER_BYTES = 8 * 2**20  # a ranking with reasons has a few kilobytes, 32 vectors of 4,096 numbers three megabytes
ANSWER_BYTES = "answer_bytes"
"""An extension of a request: how large its answer may be; default: `MAX_ANSWER_BYTES`."""


class AnswerTooLargeError(httpx.RequestError, ValueError):
    """The server sent more than any answer needs, or sent it compressed though that was not accepted."""


def bounded_client(timeout_s: float) -> httpx.Client:
    """Return a client whose answers end within `timeout_s` and `MAX_ANSWER_BYTES`, however slowly they drip.

    It asks no proxy that the environment names, and follows no redirect.
    """
    return httpx.Client(
        timeout=timeout_s, transport=_BoundedTransport(timeout_s), headers={"accept-encoding": "identity"}
    )


class _BoundedTransport(httpx.HTTPTransport):
    def __init__(self, timeout_s: float) -> None:
        super().__init__()
        self._timeout_s = timeout_s

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        """Send a request, and return an answer whose body is read under both bounds."""
        request.headers["accept-encoding"] = "identity"  # whatever the caller's client added
        seconds = request.extensions.get("timeout", {}).get("read")
        end = time.monotonic() + min(self._timeout_s, self._timeout_s if seconds is None else seconds)
        response = super().handle_request(request)
        if response.headers.get("content-encoding", "identity").lower() != "identity":
            response.close()
            raise AnswerTooLargeError("the server sent a compressed answer, which was not accepted", request=request)
        assert isinstance(response.stream, httpx.SyncByteStream)
        response.stream = _BoundedStream(response.stream, request, end)
        return response


class _BoundedStream(httpx.SyncByteStream):
    def __init__(self, stream: httpx.SyncByteStream, request: httpx.Request, end: float) -> None:
        self._stream, self._request, self._end = stream, request, end
        self._most = int(request.extensions.get(ANSWER_BYTES, MAX_ANSWER_BYTES))

    def __iter__(self) -> Iterator[bytes]:
        left = self._most
        for chunk in self._stream:
            left -= len(chunk)
            if left < 0:
                raise AnswerTooLargeError(f"the answer is larger than {self._most} bytes", request=self._request)
            if time.monotonic() > self._end:
                raise httpx.ReadTimeout("the answer did not end in time", request=self._request)
            yield chunk

    def close(self) -> None:
        self._stream.close()
