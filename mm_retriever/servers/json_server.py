"""A server of models that takes and gives JSON over HTTP: one POST, repeated where that helps.

An answer is untrusted: its size, depth and duration are bounded, and nothing of it but a line of text reaches an error.
The API key is in no message, representation or pickle.
"""

from __future__ import annotations

import json
import os
import weakref
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import urlsplit

from mm_retriever.errors import CopyError, ModelServerError, QueryError, one_line, shown
from mm_retriever.servers.failures import (
    ANSWER_BYTES,
    MAX_ANSWER_BYTES,
    ServerError,
    advice,
    bounded_client,
    explained,
    is_passing,
    is_transient,
    not_json,
    refuse_error_body,
    refuse_redirect,
    retrying,
)
from mm_retriever.threads import ForkLock, within

_LONGEST_REQUEST_S = 3600.0


class JSONServer:
    """The server at an address; may be used by many threads, and after a fork.

    Args:
        base_url: of the server, usually ending in "/v1".
        model: the name it serves the model under, for messages.
        api_key: if the server needs one.

    Raises:
        QueryError: the address is none.
    """

    def __init__(self, base_url: str, model: str, *, api_key: str | None = None) -> None:
        self.base_url = checked_address(base_url)
        self.model = model
        self._api_key = api_key or None
        self._lock = ForkLock()
        self._connected: tuple[int, Any] | None = None

    @property
    def has_key(self) -> bool:
        """Whether it was made with an API key."""
        return self._api_key is not None

    def __repr__(self) -> str:
        return f"JSONServer({self.base_url!r}, {self.model!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        self.portable()
        return type(self), (self.base_url, self.model)

    def portable(self) -> None:
        """Refuse to be taken to another process with a key.

        Raises:
            CopyError: it was made with an API key.
        """
        if self._api_key is not None:
            raise CopyError(
                f"the server of {self.model!r} has an api_key, and a pickle or dict is no place for one: make the "
                "model anew in the other process"
            )

    def post(
        self,
        path: str,
        body: Mapping[str, Any],
        *,
        timeout_s: float,
        attempts: int,
        retry_wait_s: float,
        left: Callable[[], float | None] = lambda: None,
        asked: Callable[[], None] = lambda: None,
    ) -> Any:
        """The answer's JSON, whose numbers may still be NaN.

        Args:
            path: below the address.
            body: of the request.
            timeout_s: for one request, from sending to the last byte.
            attempts: most requests.
            retry_wait_s: before the second; see `retrying`.
            left: seconds that are left for all of them; None: as many as it takes.
            asked: called before each request.

        Raises:
            ModelServerError: no answer, an error, or no JSON.
        """
        content = json.dumps(body, allow_nan=False).encode()
        requests = 0

        def once() -> Any:
            nonlocal requests
            requests += 1
            asked()
            seconds = left()
            limit = timeout_s if seconds is None else min(timeout_s, seconds)
            return within(lambda: self._answer(path, content, limit), limit)

        try:
            return retrying(attempts, retry_wait_s, left)(once)
        except Exception as error:  # of the client, or ServerError
            count = "1 request" if requests == 1 else f"{requests} requests"
            text = f"{self.model!r} gave no answer in {count} (last: {explained(error)}); {advice(error)}"
            failure = ModelServerError(text if self._api_key is None else text.replace(self._api_key, "***"))
            failure.passing = is_transient(error)
            # the server may have repeated the key: its own error, which may too, goes
            raise failure from (error if self._api_key is None else None)

    def _answer(self, path: str, content: bytes, seconds: float) -> Any:
        headers = {"content-type": "application/json"}
        if self._api_key is not None:
            headers["authorization"] = f"Bearer {self._api_key}"
        # a reranking server repeats the documents, images and all
        extensions = {ANSWER_BYTES: MAX_ANSWER_BYTES + 2 * len(content)}
        response = self._client().post(
            f"{self.base_url}/{path}", content=content, headers=headers, timeout=seconds, extensions=extensions
        )
        return _checked(response)

    def _client(self) -> Any:
        """Connections of this process."""
        with self._lock:
            if self._connected is None or self._connected[0] != os.getpid():
                client = bounded_client(_LONGEST_REQUEST_S)
                weakref.finalize(self, client.close)
                self._connected = os.getpid(), client
            return self._connected[1]


def checked_address(base_url: str) -> str:
    """Return the address of a server without the slash at its end.

    Raises:
        QueryError: it is none, or holds a password.
    """
    try:
        parts = urlsplit(base_url)
        _ = parts.port
    except ValueError:
        parts = urlsplit("")
    if parts.username is not None or parts.password is not None:  # not repeated in a message
        raise QueryError("the address of the server has a user name or password in it: give a key as api_key")
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise QueryError(f"{shown(base_url)} is no address of a server: give one like 'http://localhost:8000/v1'")
    return base_url.rstrip("/")


def _checked(response: Any) -> Any:
    """The JSON of an answer that is none of an error."""
    refuse_redirect(response)
    status = int(response.status_code)
    try:
        body = json.loads(response.content)
    except (ValueError, RecursionError) as error:
        if status < 300:
            raise not_json(error, response) from None
        body = None
    if status < 300:
        refuse_error_body(body)
        return body
    text = _words(body) or one_line(response.content[:1000].decode("utf-8", "replace"), 300)
    raise ServerError(text, status=status, transient=is_passing(status), response=response)


def _words(body: Any) -> str:
    """What an error says, wherever the server puts it."""
    if not isinstance(body, dict):
        return ""
    error = body.get("error")
    words = error.get("message") if isinstance(error, dict) else error
    return one_line(words or body.get("message") or body.get("detail") or "", 300)
