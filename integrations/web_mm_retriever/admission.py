"""Who may ask, from which pages, and how large requests may be; and the headers that every answer carries.

A request with the token of the server, or with the cookie of a page that signed in with it, may search. One with the
secret of the server's note, which only its user can read, may also see where files lie. Without a token only requests
that name a loopback address as their host are answered, so that no web page can reach the server under a name of its
own; and what another page sends is refused either way. Knows nothing of searches.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
from http.cookies import CookieError, SimpleCookie
from urllib.parse import urlsplit

from cachetools import TTLCache
from mcp_server_mm_retriever.http import LOOPBACK, MAX_BODIES_BYTES, MAX_BODY_BYTES, check_access
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mm_retriever.errors import QueryError

COOKIE = "mm_retriever_session"
SESSION_SECONDS = 12 * 3600
OWNER = "mm_retriever.owner"
"""Key of the scope of a request of the server's own user."""

_LARGEST_JSON = 30 * 2**20
PAGES = ("/", "/indexing", "/review")  # which ask for the token themselves
_OPEN = ("/static/", "/enter")  # what needs no token: the look of the page that asks for it
_HEADERS = (
    (
        b"content-security-policy",
        b"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
        b"base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    ),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"permissions-policy", b"camera=(self), microphone=(), geolocation=()"),
)


class Access:
    """The token of a server, the secret of its own user, and the pages that signed in.

    Args:
        host: what the server listens on.
        token: what others must send; None: only loopback hosts are answered.

    Raises:
        QueryError: a token is missing, empty, too short, or too easy to guess.
    """

    def __init__(self, host: str, token: str | None) -> None:
        check_access(host, token)
        self.token = token
        self.secret = secrets.token_urlsafe(32)
        self._links: TTLCache[str, bool] = TTLCache(64, SESSION_SECONDS)
        self._sessions: TTLCache[str, bool] = TTLCache(4096, SESSION_SECONDS)

    @property
    def is_local(self) -> bool:
        """Whether only people and programs of this machine are answered."""
        return self.token is None

    def link(self) -> str:
        """A path that signs a browser in, once."""
        key = secrets.token_urlsafe(24)
        self._links[_digest(key)] = True
        return f"enter?key={key}"

    def sign_in(self, *, key: str = "", token: str = "") -> str | None:
        """The value of a cookie for a link that was not used yet or for the token; None for any other."""
        known = bool(key) and self._links.pop(_digest(key), False)
        if not known and not (self.token and token and _equal(token, self.token)):
            return None
        session = secrets.token_urlsafe(32)
        self._sessions[_digest(session)] = True
        return session

    def is_owner(self, scope: Scope) -> bool:
        """Whether the request has the secret of the server's note."""
        return _equal(_bearer(scope), self.secret)

    def admits(self, scope: Scope) -> bool:
        """Whether the request may ask at all."""
        if self.token is None or self.is_owner(scope) or _equal(_bearer(scope), self.token):
            return True
        try:
            cookie = SimpleCookie(_header(scope, b"cookie")).get(COOKIE)
        except CookieError:
            return False
        return cookie is not None and _digest(cookie.value) in self._sessions


class Admission:
    """An ASGI app before another.

    Args:
        app: what answers admitted requests; told by `OWNER` in the scope whether they are of the server's own user.
        mcp: what answers /mcp, which admits by itself.
        access: who may ask.
    """

    def __init__(self, app: ASGIApp, mcp: ASGIApp, access: Access) -> None:
        self._app, self._mcp, self._access = app, mcp, access
        self._under_way = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or refuse it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = route_path(scope)
        if path == "/mcp":
            await self._mcp(scope, receive, send)
            return
        respond = _with_headers(send)
        size = _announced(scope)
        if reason := self._misdirected(scope):
            await refuse(respond, 421, reason)
        elif reason := _foreign(scope, path):
            await refuse(respond, 403, reason)
        elif not path.startswith(_OPEN) and not self._access.admits(scope) and path not in PAGES:
            await refuse(respond, 401, "send the token of this server as 'Authorization: Bearer TOKEN'")
        elif size > MAX_BODY_BYTES:
            await refuse(
                respond, 413, f"the request is larger than {MAX_BODY_BYTES // 2**20} MiB: send a smaller image"
            )
        elif self._under_way + size > MAX_BODIES_BYTES:
            await refuse(respond, 503, "too many large requests at once; send this one again in a few seconds")
        else:
            self._under_way += size
            try:
                scope = {**scope, OWNER: self._access.is_owner(scope)}
                await self._app(scope, _bounded(receive), respond)
            finally:
                self._under_way -= size

    def _misdirected(self, scope: Scope) -> str:
        """Why the host that a request names is not answered; "" if it is."""
        if self._access.token is not None:  # a proxy may pass requests on under any name
            return ""
        host = _place(f"//{_header(scope, b'host')}")[1]
        return "" if host in LOOPBACK else "this server answers on loopback addresses only; give it a token for others"


class BodyTooLargeError(QueryError):
    """A request that announced no length and went on for too long."""


def route_path(scope: Scope) -> str:
    """The path of a request below the path that the app is mounted at."""
    path, root = str(scope["path"]), str(scope.get("root_path", ""))
    return path[len(root) :] if root and path.startswith(root) else path


async def refuse(send: Send, status: int, reason: str) -> None:
    """Send an error as JSON."""
    body = json.dumps({"error": reason}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _foreign(scope: Scope, path: str) -> str:
    """Why a request that a page of another site made is refused; "" for any other request."""
    origin = _header(scope, b"origin")
    if origin and _place(origin)[0] != _header(scope, b"host"):
        return "requests of other web pages are refused"
    site, mode = _header(scope, b"sec-fetch-site"), _header(scope, b"sec-fetch-mode")
    visits = scope["method"] == "GET" and mode == "navigate" and path in (*PAGES, "/enter")
    if site in ("cross-site", "same-site") and not visits:
        return "requests of other web pages are refused"
    return ""


def _bounded(receive: Receive) -> Receive:
    """What a request sends, up to the limit."""
    taken = 0

    async def bounded() -> Message:
        nonlocal taken
        message = await receive()
        taken += len(message.get("body", b""))
        if taken > _LARGEST_JSON:
            raise BodyTooLargeError(f"the request is larger than {_LARGEST_JSON // 2**20} MiB")
        return message

    return bounded


def _with_headers(send: Send) -> Send:
    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            given = {name.lower() for name, _ in message.get("headers", ())}
            more = [pair for pair in _HEADERS if pair[0] not in given]
            message = {**message, "headers": [*message.get("headers", ()), *more]}
        await send(message)

    return sending


def _announced(scope: Scope) -> int:
    """Bytes that a request announces; as many as it may have where it announces none."""
    length = _header(scope, b"content-length")
    if length.isdecimal():
        return int(length[:20])
    return MAX_BODY_BYTES if _header(scope, b"transfer-encoding") else 0


def _header(scope: Scope, name: bytes) -> str:
    """A header that was given once; "" otherwise."""
    values = [value for given, value in scope.get("headers", ()) if given.lower() == name]
    return values[0].decode("latin-1") if len(values) == 1 else ""


def _place(url: str) -> tuple[str, str]:
    """The host of a URL with its port, and without; "" where there is none, or what cannot be one."""
    try:
        parts = urlsplit(url)
        return parts.netloc, parts.hostname or ""
    except ValueError:
        return "", ""


def _bearer(scope: Scope) -> str:
    scheme, _, token = _header(scope, b"authorization").partition(" ")
    return token if scheme == "Bearer" else ""


def _equal(given: str, expected: str) -> bool:
    return hmac.compare_digest(given.encode(), expected.encode())


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()
