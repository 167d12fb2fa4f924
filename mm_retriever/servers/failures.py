"""What went wrong between here and a server of models: which errors pass when it is asked again, and what else to do.

Reads the errors of any client: OpenAI's, httpx', requests', botocore's. The client of our own bounds what one answer
can cost: bytes, seconds, memory.
"""

from __future__ import annotations

import asyncio
import json
import math
import re
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from email.utils import parsedate_to_datetime
from typing import Any

import httpx
from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_attempt, wait_exponential, wait_random

from mm_retriever.errors import one_line, shown

MAX_ANSWER_BYTES = 8 * 2**20  # a ranking with reasons has a few kilobytes, 32 vectors of 4,096 numbers three megabytes
ANSWER_BYTES = "answer_bytes"
"""An extension of a request: how large its answer may be; default: `MAX_ANSWER_BYTES`."""


class AnswerTooLargeError(httpx.RequestError, ValueError):
    """The server sent more than any answer needs, or sent it compressed though that was not accepted."""


def bounded_client(timeout_s: float) -> httpx.Client:
    """Return a client whose answers end within `timeout_s` and `MAX_ANSWER_BYTES`, however slowly they drip.

    It asks no proxy that the environment names, and follows no redirect.
    """
    return bounded_clients(timeout_s)[0]


def bounded_clients(timeout_s: float) -> tuple[httpx.Client, httpx.AsyncClient]:
    """Return `bounded_client`, and the same for asynchronous callers, whose connections are closed with the first.

    Their requests run in threads, so that the connections belong to no event loop.
    """
    transport = _BoundedTransport(timeout_s)
    options: dict[str, Any] = {"timeout": timeout_s, "headers": {"accept-encoding": "identity"}}
    threaded = httpx.AsyncClient(transport=_ThreadedTransport(transport), **options)
    return httpx.Client(transport=transport, **options), threaded


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


class _ThreadedTransport(httpx.AsyncBaseTransport):
    def __init__(self, transport: _BoundedTransport) -> None:
        self._transport = transport

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send a request from a thread."""
        response = await asyncio.to_thread(self._transport.handle_request, request)
        assert isinstance(response.stream, httpx.SyncByteStream)
        return httpx.Response(
            response.status_code,
            headers=response.headers,
            stream=_ThreadedStream(response.stream),
            extensions=response.extensions,
        )


class _ThreadedStream(httpx.AsyncByteStream):
    def __init__(self, stream: httpx.SyncByteStream) -> None:
        self._stream = stream

    async def __aiter__(self) -> AsyncIterator[bytes]:
        chunks = iter(self._stream)
        while (chunk := await asyncio.to_thread(next, chunks, None)) is not None:
            yield chunk

    async def aclose(self) -> None:
        await asyncio.to_thread(self._stream.close)


LONGEST_WAIT = 60.0  # seconds that a server may ask for
_TRANSIENT_WORDS = re.compile(
    r"overload|busy|try again|time.?out|rate.?limit|too many|unavailable|capacity|internal|temporar", re.IGNORECASE
)
_DATA = frozenset({"choices", "data", "results", "tokens"})  # of an answer that is no error
_TRANSIENT_STATUS = frozenset({408, 409, 425, 429})
_MISTAKES = (TypeError, ValueError, LookupError, AttributeError, NotImplementedError, ImportError, RecursionError)


class ServerError(Exception):
    """A server's answer that is none: an error, whatever its status, or not what was asked for.

    Args:
        text: what it says.
        status: of HTTP, or named in the answer.
        transient: whether asking again may help.
        response: with its headers.
    """

    def __init__(self, text: str, *, status: int | None, transient: bool, response: Any = None) -> None:
        super().__init__(text)
        self.status_code = status
        self.transient = transient
        self.response = response


def refuse_errors(response: Any) -> None:
    """Raise for an answer that the client fails on without a word: a redirect, or no message with a status of 200."""
    refuse_redirect(response)
    if response.status_code >= 300 or "event-stream" in response.headers.get("content-type", ""):
        return
    response.read()
    try:
        body = response.json()
    except (ValueError, RecursionError) as error:
        raise not_json(error, response) from None
    refuse_error_body(body)
    choices = body.get("choices") if isinstance(body, dict) else None
    if not choices:
        raise ServerError("the server answered without any choices", status=None, transient=True)
    choice = choices[0] if isinstance(choices, list) else None
    message = choice.get("message") if isinstance(choice, dict) else None
    content = message.get("content") if isinstance(message, dict) else message
    if not isinstance(message, dict) or not isinstance(content, str | None):
        raise ServerError(f"the server answered with {shown(content)} in place of a text", status=None, transient=True)


async def refuse_errors_later(response: Any) -> None:
    """As `refuse_errors`, for an asynchronous client."""
    if "event-stream" not in response.headers.get("content-type", ""):
        await response.aread()
    refuse_errors(response)


def refuse_redirect(response: Any) -> None:
    """Raise for an answer that names another address."""
    if 300 <= response.status_code < 400:
        place = one_line(response.headers.get("location", ""), 200)
        text = f"it redirects to {place!r}, which is not followed: give the address itself"
        raise ServerError(text, status=response.status_code, transient=False, response=response)


def not_json(error: Exception, response: Any) -> ServerError:
    """Return the error for an answer that is no JSON: no text, a number of 5,000 digits, a million brackets."""
    text = f"the server answered with what is no JSON ({type(error).__name__})"
    return ServerError(text, status=None, transient=True, response=response)


def refuse_error_body(body: Any) -> None:
    """Raise for a body that is an error, whatever its status says."""
    error = _error_in(body)
    if not error:
        return
    facts = error if isinstance(error, dict) else {"message": error}
    text = one_line(facts.get("message") or error, 300)
    code = facts.get("code") or facts.get("status")
    if isinstance(code, str) and code.isdecimal() and len(code) < 9:
        code = int(code)
    status = code if isinstance(code, int) else None
    words = f"{text} {facts.get('type')} {code}"
    passing = _TRANSIENT_WORDS.search(words) is not None if status is None else is_passing(status)
    raise ServerError(f"the server answered with an error: {text}", status=status, transient=passing)


def _error_in(body: Any) -> Any:
    """What stands for the error in a body: OpenAI's field, vLLM's earlier object, or words in place of any data."""
    if not isinstance(body, dict):
        return None
    if error := body.get("error"):
        return error
    if body.get("object") == "error":
        return body
    words = next((body[name] for name in ("message", "detail", "errors") if body.get(name)), None)
    return words if isinstance(words, str | list) and not body.keys() & _DATA else None


def status_of(error: BaseException) -> int | None:
    """HTTP status in an error of any client: OpenAI's, httpx', requests', botocore's."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        response = response.get("ResponseMetadata", {})
        status = response.get("HTTPStatusCode") if isinstance(response, dict) else None
    else:
        status = getattr(error, "status_code", None) or getattr(response, "status_code", None)
    return status if isinstance(status, int) else None


def cause_of(error: Exception) -> Exception:
    """What a server answered, under the error that the client made of it."""
    return next((cause for cause in _chain(error) if isinstance(cause, ServerError)), error)


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error and its causes, the nearest first; not for ever, as an error may be its own cause."""
    cause: BaseException | None = error
    for _ in range(9):
        if cause is not None:
            yield cause
            cause = cause.__cause__ or cause.__context__


def is_passing(status: int) -> bool:
    """Whether an error of this HTTP status may be gone the next time."""
    return status in _TRANSIENT_STATUS or status >= 500


def is_transient(error: BaseException) -> bool:
    """Whether asking again may help."""
    if isinstance(error, ServerError):
        return error.transient
    if _refused_answer(error) is not None:
        return False
    status = status_of(error)
    if status is not None:
        return is_passing(status)
    return not isinstance(error, _MISTAKES) or isinstance(error, json.JSONDecodeError | UnicodeError)


def is_schema_refusal(error: BaseException) -> bool:
    """Whether it may be the schema that was refused: a client error that is no other, a client that cannot."""
    status = status_of(error)
    if isinstance(error, ServerError) and status is None:
        return re.search(r"schema|response_format|guided|unsupported", str(error), re.IGNORECASE) is not None
    return status in (400, 405, 415, 422, 501) if status is not None else isinstance(error, _MISTAKES)


def retry_after(error: BaseException) -> float:
    """Seconds for which a server asks in its Retry-After header; 0 if it does not."""
    headers = getattr(getattr(error, "response", None), "headers", None)
    value = headers.get("retry-after") if isinstance(headers, Mapping) else None
    if not value:
        return 0.0
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(value).timestamp() - time.time()
        except ValueError:
            return 0.0
    return max(0.0, seconds) if math.isfinite(seconds) else 0.0


def explained(error: BaseException) -> str:
    """What happened, in plain words before those of the client."""
    status = status_of(error)
    meaning = {
        400: "it refused the request",
        401: "it refused the API key",
        403: "it refused the API key or the model to it",
        404: "it has no such model or no such address",
        413: "the request is too large for it",
        429: "it limits requests",
    }.get(status or 0, "the server failed" if status is not None and status >= 500 else "")
    return f"{meaning}, status {status}: {short(error)}" if meaning else short(error)


def advice(error: BaseException, rest: str = "") -> str:
    """What to do about it; `rest` is what else can be done."""
    status = status_of(error)
    if (wait := retry_after(error)) > LONGEST_WAIT:
        return ", ".join(filter(None, (f"it asks for {wait:.0f} s of patience; ask again then", rest)))
    if status in (401, 403):
        return "; ".join(filter(None, ("give the api_key that the server expects", rest)))
    if status == 404:
        check = "check the name of the model, and that base_url ends as the server wants it, usually in /v1"
        return "; ".join(filter(None, (check, rest)))
    return f"is the server up, and does the model take images? {rest}".rstrip()


def _refused_answer(error: BaseException) -> BaseException | None:
    """The reason why an answer was not read to its end, wherever the client's own error carries it."""
    # by its name: its module needs httpx
    return next((cause for cause in _chain(error) if type(cause).__name__ == "AnswerTooLargeError"), None)


def short(error: BaseException) -> str:
    """The kind of an error and its words, on one line."""
    error = _refused_answer(error) or error
    text = one_line(error, 300)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


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
