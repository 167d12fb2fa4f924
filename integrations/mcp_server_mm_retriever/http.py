"""The MCP server over HTTP: who may connect, and how much one client can take from the others.

Owns tokens, hosts, connections, deadlines, sizes of bodies and the log. Knows nothing of tools.
"""

from __future__ import annotations

import asyncio
import hmac
import itertools
import json
import logging
import sys
from collections.abc import Sequence
from typing import cast
from urllib.parse import urlsplit

import h11
import uvicorn
from mcp.server.transport_security import TransportSecuritySettings
from mcp_types.version import HANDSHAKE_PROTOCOL_VERSIONS
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from mcp_server_mm_retriever.server import MAX_SESSIONS, Conversations, ImageSearchServer
from mm_retriever.errors import MMRetrieverError, QueryError, one_line
from mm_retriever.images.memory import give_back
from mm_retriever.search_tools import ImageSearch

SHORTEST_TOKEN = 16
FEWEST_CHARACTERS = 5  # different ones in a token: sixteen times the same letter can be guessed
LOOPBACK = ("127.0.0.1", "localhost", "::1")
_LOOPBACK_HOSTS = ("127.0.0.1", "localhost", "[::1]")
_LOOPBACK_ORIGINS = tuple(f"http://{name}:*" for name in _LOOPBACK_HOSTS)
MAX_CONNECTIONS = 512
MAX_BODY_BYTES = 28 * 2**20  # a data URI of the largest image that a client may send, and the call around it
MAX_BODIES_BYTES = 8 * MAX_BODY_BYTES  # of all requests together
LARGE_BODY_BYTES = 2**20  # after which memory goes back to the system
HEADER_SECONDS = 10.0
BODY_SECONDS = 60.0
BACKLOG = 32  # as many are accepted in one go, before the limit of connections is looked at

_TOO_LARGE = (
    f"the request is larger than {MAX_BODY_BYTES // 2**20} MiB; "
    "send a smaller image, or name one that is indexed by its id"
)
_SMALL_MESSAGE = b'{"jsonrpc": "2.0", "method": "notifications/roots/list_changed"}'
_ENOUGH_DESCRIPTORS = 8 * MAX_CONNECTIONS  # under a flood several are accepted before one is let go


def serve_http(
    search: ImageSearch,
    *,
    host: str = "127.0.0.1",
    port: int = 8765,
    token: str | None = None,
    origins: Sequence[str] = (),
    structured: bool | None = None,
) -> None:
    """Serve clients on http://HOST:PORT/mcp until interrupted.

    At most `MAX_CONNECTIONS` are open at a time. A request must arrive within its deadlines; the oldest connection that
    has not sent a whole request yet gives way to a new one.

    Args:
        search: what is asked.
        host: a loopback address, or with a token any.
        port: 1 to 65535.
        token: what clients must send as "Authorization: Bearer TOKEN"; at least 16 characters.
        origins: web pages ("https://inspector.example") that a browser lets read the answers (CORS); default: none.
        structured: as of `ImageSearchServer`.

    Raises:
        QueryError: a token is missing, empty, too short, or too easy to guess.
    """
    app = http_app(search, host=host, token=token, origins=origins, structured=structured)
    name = f"[{host}]" if ":" in host else host
    log_plainly()
    limit_connections()
    print(f"serving MCP on http://{name}:{port}/mcp", file=sys.stderr)  # noqa: T201 - stdout is not for words
    uvicorn.run(
        app, host=host, port=port, http=BoundedProtocol, log_config=None, access_log=False, ws="none", backlog=BACKLOG
    )


def http_app(
    search: ImageSearch,
    *,
    host: str = "127.0.0.1",
    token: str | None = None,
    origins: Sequence[str] = (),
    structured: bool | None = None,
) -> ASGIApp:
    """Return the ASGI app that `serve_http` runs, for a server of your own; its path is /mcp.

    Without a token it answers only requests that name a loopback address as their host, so that no web page can reach
    it under a name of its own. With one, a proxy may pass requests on under any host name.

    Raises:
        QueryError: a token is missing, empty, too short, or too easy to guess.
    """
    check_access(host, token, origins)
    server = ImageSearchServer(search, one_client=False, structured=structured)
    security = None
    if token:  # a browser cannot be made to send it: with one, the host that a request names says nothing
        security = TransportSecuritySettings(enable_dns_rebinding_protection=False)
    elif origins:
        security = TransportSecuritySettings(
            allowed_hosts=[f"{name}:*" for name in _LOOPBACK_HOSTS], allowed_origins=[*origins, *_LOOPBACK_ORIGINS]
        )
    app = server.streamable_http_app(
        host=host,
        max_request_body_size=MAX_BODY_BYTES,
        max_sessions=MAX_SESSIONS,
        transport_security=security,
    )
    admitted = Admission(app, server.conversations, token)
    if not origins:
        return admitted
    return CORSMiddleware(
        admitted,
        allow_origins=list(origins),
        allow_methods=["GET", "POST", "DELETE"],
        allow_headers=["*"],
        expose_headers=["mcp-session-id"],
    )


def check_access(host: str, token: str | None, origins: Sequence[str] = ()) -> None:
    """Refuse to serve other machines without a token that cannot be guessed, and anyone with an empty one.

    Raises:
        QueryError: says how to make one; or names an origin that no web page has.
    """
    how = 'python -c "import secrets; print(secrets.token_urlsafe())" makes one'
    if token is not None and not token.strip():
        raise QueryError(f"the token is empty, which would let everyone in; leave it out, or give one: {how}")
    if token and (len(token) < SHORTEST_TOKEN or not token.isascii() or not token.isprintable() or " " in token):
        raise QueryError(f"the token needs at least {SHORTEST_TOKEN} printable ASCII characters; {how}")
    if token and len(set(token)) < FEWEST_CHARACTERS:
        raise QueryError(f"the token repeats the same {len(set(token))} characters and can be guessed; {how}")
    if not token and host not in LOOPBACK:
        raise QueryError(f"host {host!r} can be reached by other machines, and needs a token; {how}")
    for origin in origins:
        parts = urlsplit(origin)
        if parts.scheme not in ("http", "https") or not parts.netloc or origin != f"{parts.scheme}://{parts.netloc}":
            raise QueryError(f"the origin {origin!r} is no web page's: give scheme and host, as in https://example.com")


class Admission:
    """An ASGI app before another: who may ask, how large requests may be, and which conversations have ended.

    Whoever does not send the token gets 401. The bodies of requests are bounded, one and all together, and the limit is
    said in words, as a JSON-RPC error that a client shows.
    """

    def __init__(self, app: ASGIApp, conversations: Conversations, token: str | None) -> None:
        self._app = app
        self._conversations = conversations
        self._expected = None if token is None else f"Bearer {token}".encode()
        self._under_way = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or refuse it."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        given = _headers(scope, b"authorization")
        if self._expected and not (len(given) == 1 and hmac.compare_digest(given[0], self._expected)):
            await _respond(send, 401, b"", (b"www-authenticate", b"Bearer"), (b"content-type", b"text/plain"))
        elif (size := _body_size(scope)) > MAX_BODY_BYTES:
            await _refuse(send, 413, _TOO_LARGE)
        elif self._under_way + size > MAX_BODIES_BYTES:
            await _refuse(send, 503, "too many large requests at once; send this one again in a few seconds")
        elif _opens_session(scope):
            await self._open(_without_resumption(scope), receive, send)
        else:
            await self._pass_on(_without_resumption(scope), receive, send, size)

    async def _open(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on a request that opens a session, if it is small: the session keeps it as long as it lives."""
        body = bytearray()
        more = True
        while more and len(body) <= LARGE_BODY_BYTES:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            more = message.get("more_body", False)
        if len(body) > LARGE_BODY_BYTES:
            await _refuse(send, 413, f"a request that opens a session is at most {LARGE_BODY_BYTES // 2**20} MiB large")
            return
        whole = [{"type": "http.request", "body": bytes(body), "more_body": False}]

        async def receive_again() -> Message:
            return whole.pop() if whole else await receive()

        await self._pass_on(scope, receive_again, send, len(body))

    async def _pass_on(self, scope: Scope, receive: Receive, send: Send, size: int) -> None:
        refused = False

        async def send_with_words(message: Message) -> None:
            nonlocal refused
            if message["type"] == "http.response.start" and message["status"] == 413:
                refused = True
                await _refuse(send, 413, _TOO_LARGE)
            elif not refused:
                await send(message)

        self._under_way += size
        try:
            await self._app(scope, receive, send_with_words)
        finally:
            self._under_way -= size
            if size >= LARGE_BODY_BYTES:
                await self._let_go(scope)
        if scope["type"] == "http" and scope["method"] == "DELETE":
            for session in _headers(scope, b"mcp-session-id"):
                self._conversations.forget(session.decode("latin-1"))

    async def _let_go(self, scope: Scope) -> None:
        """Give back the memory of a large request.

        A session of the SDK holds its last message, body and all, until the next one comes: here is a small one.
        """
        if _headers(scope, b"mcp-session-id"):
            headers = [header for header in scope["headers"] if header[0].lower() != b"content-length"]
            length = (b"content-length", str(len(_SMALL_MESSAGE)).encode())

            async def receive() -> Message:
                return {"type": "http.request", "body": _SMALL_MESSAGE}

            async def send(_: Message) -> None:
                """Nobody waits for the answer."""

            await self._app({**scope, "method": "POST", "headers": [*headers, length]}, receive, send)
        loop = asyncio.get_running_loop()
        loop.call_later(1.0, loop.run_in_executor, None, give_back)  # when nothing holds its texts any more


def _without_resumption(scope: Scope) -> Scope:
    """The request without Last-Event-ID: nothing is kept to be sent again, and the SDK then answers it with nothing."""
    if scope["type"] != "http":
        return scope
    return {**scope, "headers": [header for header in scope["headers"] if header[0].lower() != b"last-event-id"]}


class BoundedProtocol(H11Protocol):
    """uvicorn's protocol with a limit of connections, and deadlines for a request's header and body."""

    limit = MAX_CONNECTIONS
    _admitted = itertools.count()
    _number = 0
    _deadline: asyncio.TimerHandle | None = None
    _reads_body = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Admit a connection; the oldest without a whole request makes room."""
        super().connection_made(transport)
        self._number = next(self._admitted)
        connections = cast("set[BoundedProtocol]", self.connections)
        if len(connections) > self.limit:
            waiting = (other for other in connections if other.is_waiting)
            oldest = min(waiting, key=lambda other: (other.rests, other._number))
            oldest.transport.abort()
            connections.discard(oldest)
        if not transport.is_closing():
            self._expect(HEADER_SECONDS)

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget a connection."""
        self._expect(None)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Take bytes of a request, and set the deadline for those that are missing."""
        super().data_received(data)
        if not self.is_waiting:
            self._expect(None)
        elif self.conn.their_state is h11.SEND_BODY:
            if not self._reads_body:
                self._expect(BODY_SECONDS)
                self._reads_body = True
        elif self._deadline is None:
            self._expect(HEADER_SECONDS)

    @property
    def is_waiting(self) -> bool:
        """Whether the client has still to send something before it can be answered."""
        return self.conn.their_state in (h11.IDLE, h11.SEND_BODY)

    @property
    def rests(self) -> bool:
        """Whether the connection is between two requests of a client that was answered."""
        return self.conn.their_state is h11.IDLE and self.cycle is not None and self.cycle.response_complete

    def _expect(self, seconds: float | None) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
        self._deadline = None if seconds is None else self.loop.call_later(seconds, self._give_up)
        self._reads_body = False

    def _give_up(self) -> None:
        self._deadline = None
        if self.is_waiting and not self.transport.is_closing():
            self.transport.abort()


def limit_connections() -> None:
    """Let `BoundedProtocol` hold no more connections than the process has descriptors for."""
    BoundedProtocol.limit = min(MAX_CONNECTIONS, _raise_descriptor_limit() // 4)


class PlainLines(logging.Formatter):
    """One line for each record, without control characters; a traceback only where debugging is on."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        line = f"{record.levelname.lower()}: {record.name}: {record.getMessage()}"
        if record.exc_info and (error := record.exc_info[1]) is not None:
            line += f": {type(error).__name__}"
            line += f": {error}" if isinstance(error, MMRetrieverError | OSError) else ""
        return one_line(line, 1000)


def log_plainly() -> None:
    """Log to stderr in plain lines, unless the program has set up logging itself."""
    root = logging.getLogger()
    if not root.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(PlainLines())
        root.addHandler(handler)
        root.setLevel(logging.WARNING)


def _headers(scope: Scope, name: bytes) -> list[bytes]:
    return [value for given, value in scope.get("headers", ()) if given.lower() == name]


def _opens_session(scope: Scope) -> bool:
    """Whether the SDK makes a session of the request: one of a version with sessions, which names none."""
    if scope["type"] != "http" or scope["method"] != "POST" or _headers(scope, b"mcp-session-id"):
        return False
    versions = _headers(scope, b"mcp-protocol-version")
    return all(version.decode("latin-1") in HANDSHAKE_PROTOCOL_VERSIONS for version in versions)


def _body_size(scope: Scope) -> int:
    """Bytes that a request announces; as many as it may have where it announces none."""
    for value in _headers(scope, b"content-length"):
        if value.isdigit():
            return int(value[:20])
    return MAX_BODY_BYTES if _headers(scope, b"transfer-encoding") else 0


async def _refuse(send: Send, status: int, reason: str) -> None:
    error = {"jsonrpc": "2.0", "id": None, "error": {"code": -32600, "message": reason}}
    await _respond(send, status, json.dumps(error).encode(), (b"content-type", b"application/json"))


async def _respond(send: Send, status: int, body: bytes, *headers: tuple[bytes, bytes]) -> None:
    length = (b"content-length", str(len(body)).encode())
    await send({"type": "http.response.start", "status": status, "headers": [*headers, length]})
    await send({"type": "http.response.body", "body": body})


def _raise_descriptor_limit() -> int:
    """Let the process open as many files as the connections need, where the system lets it; return how many."""
    try:
        import resource
    except ImportError:  # Windows, which has no such limit
        return _ENOUGH_DESCRIPTORS
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= _ENOUGH_DESCRIPTORS:
        return _ENOUGH_DESCRIPTORS
    wanted = _ENOUGH_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, _ENOUGH_DESCRIPTORS)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    except (OSError, ValueError):
        return soft
    return wanted
