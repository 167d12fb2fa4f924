"""The app on its sockets: one for browsers and clients, one for commands of the same user."""

from __future__ import annotations

import errno
import logging
import socket
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import uvicorn
from mcp_server_mm_retriever.http import BACKLOG, BoundedProtocol, limit_connections, log_plainly

from mm_retriever.errors import QueryError
from mm_retriever.running import noted
from mm_retriever.store.lite_wire import listen, remove_socket
from web_mm_retriever.app import WebApp

logger = logging.getLogger(__name__)


def serve_web(
    app: WebApp,
    *,
    host: str,
    port: int,
    db: Path | None = None,
    collection: str = "",
    model: str = "",
    listener: socket.socket | None = None,
) -> None:
    """Serve on http://HOST:PORT/ until interrupted, with the limits of the MCP server.

    Args:
        app: from `web_app`, made for this host.
        host: a name or address.
        port: 1 to 65535; 0: any that is free.
        db: the Milvus Lite file, whose folder gets a note by which `mm-retriever search` finds the server.
        collection: for the note.
        model: for the note.
        listener: of `listen_on`; default: made for the host and port.

    Raises:
        QueryError: the port cannot be had.
    """
    log_plainly()
    limit_connections()
    listener = listener or listen_on(host, port)
    listener.listen(BACKLOG)  # who reads the next line and comes before the server has started waits for it
    shown = f"[{host}]" if ":" in host else host
    address = f"http://{shown}:{listener.getsockname()[1]}/"
    print(f"serving on {address}  (MCP: {address}mcp, API: {address}openapi.json)", file=sys.stderr)  # noqa: T201
    if app.access.token is not None:
        print(f"open once to sign a browser in: {address}{app.access.link()}", file=sys.stderr)  # noqa: T201
    config = uvicorn.Config(
        app, http=BoundedProtocol, log_config=None, access_log=False, ws="none", backlog=BACKLOG, lifespan="on"
    )
    with closing(app), listener, _for_commands(app, db, collection, model) as sockets:
        uvicorn.Server(config).run(sockets=[listener, *sockets])


@contextmanager
def _for_commands(app: WebApp, db: Path | None, collection: str, model: str) -> Iterator[list[socket.socket]]:
    """A socket in a folder of this user, and a note of it; none where that cannot be, which costs only time."""
    if db is None:
        yield []
        return
    listener, address = listen()
    try:
        if not isinstance(address, str):
            logger.warning("no private folder for a socket: `mm-retriever search` will not find this server")
            yield []
            return
        with noted(db, address=address, secret=app.access.secret, collection=collection, model=model):
            yield [listener]
    finally:
        listener.close()
        remove_socket(address)


def listen_on(host: str, port: int) -> socket.socket:
    """A socket that is bound to an address, and does not listen yet.

    Raises:
        QueryError: the port cannot be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio sends at once only on sockets that name their protocol; else each answer would wait 40 ms for the last
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        way = "--port" if error.errno in (errno.EADDRINUSE, errno.EACCES) else "--host"
        raise QueryError(f"--host {host} --port {port}: {error.strerror}; give another {way}") from error
    return listener
