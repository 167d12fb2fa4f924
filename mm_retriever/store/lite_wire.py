"""How the processes of one user that share a Milvus Lite file find each other and communicate.

A record in the file names the process that has it open, and its socket. Owns the record and who may have written it,
the place of the socket, the proof of both sides that they know the same secret, and the format of requests and answers.
Knows nothing of Milvus.
"""

from __future__ import annotations

import hmac
import json
import logging
import os
import secrets
import socket
import stat
import struct
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

from mm_retriever.files import is_own_socket, read_own, write_atomically

logger = logging.getLogger(__name__)

Address: TypeAlias = str | tuple[str, int]
"""The path of a Unix socket, or a loopback address and a port."""

RECORD = "served-by.json"
"""Name of the record in the folder of a Milvus Lite file."""

OPENING, SERVING, CLOSING = "opening", "serving", "closing"

FOLDER_PREFIX = "mm_retriever-"
"""Prefix of the names of temporary folders for sockets and copies."""

_LONGEST_SOCKET_PATH = 100  # bytes; kernels take 103 or 107
_MOST_RECORD = 4096


@dataclass(frozen=True)
class Record:
    """Which process has a Milvus Lite file open, and how the others reach it.

    Attributes:
        state: OPENING, SERVING or CLOSING.
        device: with `inode`, the identity of the open folder; a copy of the folder holds a record of the original.
        address: where the process serves; "" while it does not.
        secret: the shared secret, in hexadecimal digits.
    """

    state: str
    pid: int
    host: str
    device: int
    inode: int
    address: Address = ""
    secret: str = ""

    @classmethod
    def of_this_process(cls, state: str, folder: tuple[int, int], address: Address = "", secret: bytes = b"") -> Record:
        """Return the record of a folder (device and inode) that this process has open."""
        return cls(state, os.getpid(), socket.gethostname(), *folder, address, secret.hex())

    def write(self, path: Path) -> None:
        """Replace the record; only the user may read it."""
        write_atomically(path / RECORD, json.dumps(asdict(self)).encode(), mode=0o600)

    @property
    def is_reachable(self) -> bool:
        """Whether it serves at a place where only this user can listen."""
        if self.state != SERVING or self.host != socket.gethostname():
            return False
        if not isinstance(self.address, str):
            return self.address[0] == "127.0.0.1"
        return is_own_socket(Path(self.address))


def read_record(path: Path) -> Record | None:
    """Return the record that this user wrote for this very folder; None if there is no such record."""
    data = read_own(path / RECORD, _MOST_RECORD + 1, others_may=0o055)
    if data is None:
        return None
    try:
        fields = json.loads(data)
        address = fields["address"]
        if not isinstance(address, str):
            host, port = address
            address = (str(host), int(port))
        numbers = (int(fields[name]) for name in ("pid", "device", "inode"))
        pid, device, inode = numbers
        secret = bytes.fromhex(fields["secret"]).hex()
        record = Record(str(fields["state"]), pid, str(fields["host"]), device, inode, address, secret)
        return record if (device, inode) == folder_identity(path) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def remove_record(path: Path) -> None:
    """Remove the record of a file that this process has open."""
    try:
        (path / RECORD).unlink(missing_ok=True)
    except OSError as error:
        logger.debug("%s: the record stays: %s", path, error)


def folder_identity(path: Path) -> tuple[int, int]:
    """Return device and inode of a folder, which renaming keeps and replacing changes."""
    status = path.stat()
    return status.st_dev, status.st_ino


# ------------------------------------------------------------------------------------------ the socket


def listen() -> tuple[socket.socket, Address]:
    """Return a listening Unix socket in a new folder of this user, or else one on a loopback port."""
    for place in dict.fromkeys((os.environ.get("XDG_RUNTIME_DIR"), tempfile.gettempdir(), "/tmp")):  # noqa: S108
        if not place or not Path(place).is_absolute():
            continue
        try:
            folder = Path(tempfile.mkdtemp(prefix=FOLDER_PREFIX, dir=place))  # 0700, under an unpredictable name
        except OSError as error:
            logger.debug("no folder for a socket in %s: %s", place, error)
            continue
        address = str(folder / "socket")
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            if len(os.fsencode(address)) > _LONGEST_SOCKET_PATH:
                raise OSError(f"{address} is too long for a socket")
            listener.bind(address)
            Path(address).chmod(0o600)
            return _listening(listener), address
        except OSError as error:
            logger.debug("no socket at %s: %s", address, error)
            listener.close()
            remove_socket(address)
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.bind(("127.0.0.1", 0))
    host, port = listener.getsockname()
    return _listening(listener), (host, port)


def _listening(listener: socket.socket) -> socket.socket:
    listener.listen(128)
    listener.setblocking(False)
    return listener


def remove_socket(address: Address) -> None:
    """Remove a socket and the folder that was made for it; anything else is left alone."""
    if not isinstance(address, str) or not Path(address).parent.name.startswith(FOLDER_PREFIX):
        return
    try:
        if stat.S_ISSOCK(os.lstat(address).st_mode):
            Path(address).unlink()
    except OSError as error:
        logger.debug("%s: %s", address, error)
    try:
        Path(address).parent.rmdir()
    except OSError as error:
        logger.debug("%s: %s", address, error)


# ------------------------------------------------------------------------------------------ frames

_SIZES = struct.Struct("!IQ")  # of the header, of the body
_MOST_HEADER = 1 << 20
_MOST_BODY = 1 << 30
_AT_ONCE = 1 << 16  # bytes of a body that are sent together with the header
_MOST_GREETING = 1024
_NONCE_BYTES = 32


class WireError(OSError):
    """The other side is gone, or does not speak this protocol."""


class Wire:
    """One connected socket; after a timeout or an error it is of no further use.

    `dial` and `admit` are the two sides of one handshake. Both raise WireError where the other side does not know the
    secret, and TimeoutError where it does not answer in time.
    """

    def __init__(self, connected: socket.socket) -> None:
        self._socket = connected

    @classmethod
    def dial(cls, address: Address, secret: bytes, seconds: float) -> Wire:
        """Return a connection on which both sides have proved that they know the secret."""
        end = time.monotonic() + seconds
        family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET
        wire = cls(socket.socket(family, socket.SOCK_STREAM))
        try:
            wire._socket.settimeout(max(seconds, 0.001))
            wire._socket.connect(address)
            theirs = _nonce(wire.receive(end - time.monotonic(), most=0)[0])
            ours = secrets.token_hex(_NONCE_BYTES)
            wire.send({"nonce": ours, "proof": _proof(secret, "client", theirs, ours)}, seconds=seconds)
            _check(wire.receive(end - time.monotonic(), most=0)[0], _proof(secret, "server", theirs, ours))
        except BaseException:
            wire.close()
            raise
        return wire

    def admit(self, secret: bytes, seconds: float) -> None:
        """Check the other side's proof that it knows the secret, then send the proof of this side."""
        ours = secrets.token_hex(_NONCE_BYTES)
        self.send({"nonce": ours}, seconds=seconds)
        header, _ = self.receive(seconds, most=0)
        theirs = _nonce(header)
        _check(header, _proof(secret, "client", ours, theirs))
        self.send({"proof": _proof(secret, "server", ours, theirs)}, seconds=seconds)

    def send(self, header: dict[str, Any], body: bytes = b"", *, seconds: float | None) -> None:
        """Write one frame."""
        head = json.dumps(header).encode()
        self._socket.settimeout(None if seconds is None else max(seconds, 0.001))
        frame = _SIZES.pack(len(head), len(body)) + head
        if len(body) <= _AT_ONCE:  # sent together, so that the other side wakes up once
            self._socket.sendall(frame + body)
        else:
            self._socket.sendall(frame)
            self._socket.sendall(body)

    def receive(self, seconds: float | None, *, most: int = _MOST_BODY) -> tuple[dict[str, Any], bytes]:
        """Read one frame; a body of more than `most` bytes is refused before it is read."""
        end = None if seconds is None else time.monotonic() + seconds
        head, size = _SIZES.unpack(self._read(_SIZES.size, end))
        if head > (_MOST_HEADER if most else _MOST_GREETING) or size > most:
            raise WireError(f"a frame of {head} + {size} bytes")
        try:
            header = json.loads(self._read(head, end))
        except ValueError as error:
            raise WireError("a header that is not JSON") from error
        if not isinstance(header, dict):
            raise WireError("a header that is no object")
        return header, self._read(size, end)

    def _read(self, size: int, end: float | None) -> bytes:
        data = bytearray(size)
        view, filled = memoryview(data), 0
        while filled < size:
            self._socket.settimeout(None if end is None else max(end - time.monotonic(), 0.001))
            count = self._socket.recv_into(view[filled:])
            if not count:
                raise WireError("the connection was closed")
            filled += count
        return bytes(data)

    def hang_up(self) -> None:
        """End the connection for both sides, also while another thread reads from it."""
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:  # the other side was first
            return

    def close(self) -> None:
        """Free the descriptor; copies of it in other processes stay connected."""
        self._socket.close()


def _proof(secret: bytes, side: str, server_nonce: str, client_nonce: str) -> str:
    return hmac.new(secret, f"{side} {server_nonce} {client_nonce}".encode(), "sha256").hexdigest()


def _nonce(header: dict[str, Any]) -> str:
    nonce = header.get("nonce")
    if not isinstance(nonce, str) or len(nonce) != 2 * _NONCE_BYTES:
        raise WireError("no nonce")
    return nonce


def _check(header: dict[str, Any], expected: str) -> None:
    if not hmac.compare_digest(str(header.get("proof")).encode(), expected.encode()):
        raise WireError("the other side does not know the secret of the file")
