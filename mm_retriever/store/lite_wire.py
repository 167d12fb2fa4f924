"""Frames on a socket between the process that serves a Milvus Lite file and the processes that use it.

Owns how two processes of one user prove to each other that they know the same secret, and how a request and its answer
are written. Knows nothing of Milvus.
"""

from __future__ import annotations

import hmac
import json
import secrets
import socket
import struct
import time
from typing import Any, TypeAlias

Address: TypeAlias = str | tuple[str, int]
"""The path of a Unix socket, or a loopback address and a port."""

_SIZES = struct.Struct("!IQ")  # of the header, of the body
_MOST_HEADER = 1 << 20
_MOST_BODY = 1 << 30
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
        """Let the other side prove that it knows the secret, then prove the same to it."""
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
        self._socket.sendall(_SIZES.pack(len(head), len(body)) + head)
        if body:
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
