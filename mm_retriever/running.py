"""How a command finds a server of the same Milvus Lite file: a note in its folder, and a socket that is the user's own.

Owns what the note says and who may have written it, and the request. Loads nothing: a command that asks a server need
not wait for LlamaIndex or a model.
"""

from __future__ import annotations

import http.client
import json
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from mm_retriever.errors import QueryError, one_line
from mm_retriever.files import is_own_socket, read_own, write_atomically

logger = logging.getLogger(__name__)

NOTE = "answered-by.json"
"""Name of the note in the folder of a Milvus Lite file."""

_MOST_NOTE = 4096
_MOST_ANSWER = 256 * 2**20
CONNECT_SECONDS = 2.0
ANSWER_SECONDS = 120.0


class NoServerError(Exception):
    """No server answers: whoever asked does the work itself."""


@dataclass(frozen=True)
class Note:
    """Which server answers searches of a Milvus Lite file.

    Attributes:
        address: of its socket, in a folder of this user.
        secret: what a request must carry.
        collection: the one that it searches.
        model: the name of its model.
        pid: of its process, for people.
        host: of the machine.
        device: with `inode`, the folder that is served: the note in a copy of the folder says nothing of the copy.
    """

    address: str
    secret: str
    collection: str
    model: str
    pid: int
    host: str
    device: int
    inode: int

    @property
    def is_reachable(self) -> bool:
        """Whether its socket is at a place where only this user can listen."""
        return self.host == socket.gethostname() and is_own_socket(Path(self.address))


@contextmanager
def noted(db: Path, *, address: str, secret: str, collection: str, model: str) -> Iterator[None]:
    """Let commands find a server while it runs; only this user can read the note.

    Args:
        db: the Milvus Lite file that it serves.
        address: of its socket.
        secret: what requests must carry.
        collection: the one that it searches.
        model: the name of its model.
    """
    status = db.stat()
    note = Note(address, secret, collection, model, os.getpid(), socket.gethostname(), status.st_dev, status.st_ino)
    write_atomically(db / NOTE, json.dumps(asdict(note)).encode(), mode=0o600)
    try:
        yield
    finally:
        if read_note(db) == note:  # a later server has its own
            (db / NOTE).unlink(missing_ok=True)


def read_note(db: Path) -> Note | None:
    """The note of a Milvus Lite file; None if there is none that this user wrote for this very folder."""
    data = read_own(db / NOTE, _MOST_NOTE + 1)
    if data is None:
        return None
    try:
        note = Note(**json.loads(data))
        texts = (note.address, note.secret, note.collection, note.model, note.host)
        served = db.stat()
        belongs = (note.device, note.inode) == (served.st_dev, served.st_ino)
        return note if belongs and all(isinstance(text, str) for text in texts) else None
    except (OSError, ValueError, TypeError):
        return None


def ask_note(note: Note, path: str, body: dict[str, Any]) -> dict[str, Any]:
    """The answer of the server that wrote a note.

    Raises:
        NoServerError: it does not answer.
        QueryError: it refuses the request; in its words.
    """
    if not note.is_reachable:
        raise NoServerError("the server that was noted is gone")
    return _ask(_SocketConnection(note.address), path, body, note.secret)


def ask_url(url: str, path: str, body: dict[str, Any], token: str | None = None) -> dict[str, Any]:
    """The answer of a server at a URL.

    Args:
        url: http:// or https://, and where the server is mounted.
        path: of the API.
        body: of the request.
        token: of the server.

    Raises:
        NoServerError: it does not answer.
        QueryError: no such URL, or the server refuses the request.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise QueryError(f"--via {url!r}: give the URL of a server, like http://127.0.0.1:8765")
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    connection = kind(parts.hostname, parts.port, timeout=CONNECT_SECONDS)
    return _ask(connection, parts.path.rstrip("/") + path, body, token)


class _SocketConnection(http.client.HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, address: str) -> None:
        super().__init__("localhost", timeout=CONNECT_SECONDS)
        self._address = address

    def connect(self) -> None:
        """Connect to the socket."""
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(CONNECT_SECONDS)
        self.sock.connect(self._address)


def _ask(connection: http.client.HTTPConnection, path: str, body: dict[str, Any], token: str | None) -> dict[str, Any]:
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {token}"} if token else {})
    try:
        connection.connect()
        connection.sock.settimeout(ANSWER_SECONDS)
        connection.request("POST", path, json.dumps(body), headers)
        response = connection.getresponse()
        data = response.read(_MOST_ANSWER)
        answer = json.loads(data)
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise NoServerError(f"the server does not answer: {one_line(error, 200) or type(error).__name__}") from error
    finally:
        connection.close()
    if not isinstance(answer, dict):
        raise NoServerError("the server answers something else")
    if response.status != 200:
        raise QueryError(one_line(answer.get("error") or f"the server refuses with status {response.status}"))
    return answer
