"""Fetch one picture from a URL that nobody vouches for: checked addresses, pinned connections, hard limits.

The only file of the package that opens a connection for a picture. Every address that a name resolves to is judged, and
the connection goes to an address that was judged, with no second look-up in between. No proxy, cookie, credential or
environment variable takes part. Knows nothing of pictures beyond the media type.
"""

from __future__ import annotations

import contextlib
import http.client
import io
import ipaddress
import queue
import socket
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias
from urllib.parse import SplitResult, quote, urljoin, urlsplit

from mm_retriever.errors import ImageLoadError, reason_of

Resolve: TypeAlias = Callable[[str, int], Sequence[str]]
"""A host name and port to all its addresses."""

Connect: TypeAlias = Callable[[str, int, float], socket.socket]
"""An address, a port and a timeout in seconds to a connection."""

_Address: TypeAlias = ipaddress.IPv4Address | ipaddress.IPv6Address

# What some versions of Python call global although no picture lives there. Source: IANA special-purpose registries.
# Among them IPv6 that carries an IPv4 address inside (compatible, mapped, NAT64, Teredo, 6to4), which would lead round
# a check of IPv4, and the metadata service that one cloud (Azure) keeps at a public address.
_REFUSED = tuple(
    ipaddress.ip_network(network)
    for network in (
        *("192.0.0.0/24", "192.88.99.0/24", "168.63.129.16/32"),
        *(
            "::/96",
            "::ffff:0:0/96",
            "64:ff9b::/96",
            "64:ff9b:1::/48",
            "100::/64",
            "2001::/23",
            "2002::/16",
            "3fff::/20",
        ),
        *("5f00::/16", "fec0::/10"),
    )
)

_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_READ_BYTES = 1 << 16
_LONGEST_URL = 8192


def fetch_image(
    url: str,
    *,
    max_bytes: int,
    timeout: float,
    max_redirects: int = 3,
    allow_private_addresses: bool = False,
    resolve: Resolve | None = None,
    connect: Connect | None = None,
    tls: ssl.SSLContext | None = None,
) -> bytes:
    """Return the body of a picture's URL.

    Args:
        url: http or https.
        max_bytes: limit of the body.
        timeout: seconds for everything together: names, redirects, handshakes, body.
        max_redirects: each target is checked like the first; from https never back to http.
        allow_private_addresses: skip the check of addresses.
        resolve: replaces the system's name resolution. Called once for each hop.
        connect: replaces the system's connections. Called with nothing but addresses that were judged.
        tls: replaces the default context (system certificates, host name checked).

    Raises:
        ImageLoadError: the reason, without the URL.
    """
    deadline = time.monotonic() + timeout
    try:
        for _ in range(max_redirects + 1):
            target = _checked_url(url)
            host, port = _host_and_port(target)
            addresses = _addresses(host, port, resolve or _system_resolve, deadline)
            if not allow_private_addresses:
                for address in addresses:
                    _refuse_private(host, address)
            context = (tls or ssl.create_default_context()) if target.scheme == "https" else None
            sock = _connect(addresses, host, port, deadline, connect or _system_connect, context)
            with contextlib.closing(sock):
                body, location = _get(target, _DeadlineSocket(sock, deadline), max_bytes)
            if location is None:
                return body
            url = urljoin(url, location)
            if target.scheme == "https" and urlsplit(url).scheme == "http":
                raise ImageLoadError("redirected from https to http")
    except TimeoutError as error:
        raise ImageLoadError(f"no complete answer within {timeout:g} s (ImagePolicy.url_timeout)") from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        if isinstance(error, ImageLoadError):
            raise
        raise ImageLoadError(f"download failed ({reason_of(error, 200)})") from error
    raise ImageLoadError(f"more than {max_redirects} redirects (ImagePolicy.max_redirects)")


def _checked_url(url: str) -> SplitResult:
    if len(url) > _LONGEST_URL:
        raise ImageLoadError(f"a URL of {len(url)} characters; the limit is {_LONGEST_URL}")
    if any(character <= " " or character in "\\\x7f" for character in url):
        raise ImageLoadError("a URL holds no space, backslash or control character")
    target = urlsplit(url)
    if target.scheme not in ("http", "https"):
        raise ImageLoadError(f"{target.scheme or 'no'} scheme; only http and https are fetched")
    if "@" in target.netloc:
        raise ImageLoadError("a URL with user name or password is not fetched")
    if not target.hostname:
        raise ImageLoadError("the URL names no host")
    return target


def _host_and_port(target: SplitResult) -> tuple[str, int]:
    host = target.hostname or ""
    if not host.isascii():
        host = host.encode("idna").decode("ascii")
    return host, target.port or (443 if target.scheme == "https" else 80)


def _system_resolve(host: str, port: int) -> list[str]:
    return [str(info[4][0]) for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]


def _system_connect(address: str, port: int, timeout: float) -> socket.socket:
    return socket.create_connection((address, port), timeout=timeout)


def _addresses(host: str, port: int, resolve: Resolve, deadline: float) -> list[_Address]:
    """All addresses of a host, once each. In a thread: a system look-up knows no timeout of its own."""
    answers: queue.SimpleQueue[Sequence[str] | Exception] = queue.SimpleQueue()

    def look_up() -> None:
        try:
            answers.put(resolve(host, port))
        except Exception as error:
            answers.put(error)

    threading.Thread(target=look_up, name="mm_retriever-resolve", daemon=True).start()
    try:
        answer = answers.get(timeout=_left(deadline))
    except queue.Empty as error:
        raise TimeoutError from error
    if isinstance(answer, Exception):
        raise ImageLoadError(f"the name {host!r} does not resolve ({answer})") from answer
    if not answer:
        raise ImageLoadError(f"the name {host!r} has no address")
    return [ipaddress.ip_address(text) for text in dict.fromkeys(answer)]


def _refuse_private(host: str, address: _Address) -> None:
    public = address.is_global and not (
        address.is_multicast
        or address.is_reserved
        or any(address in network for network in _REFUSED)
        or getattr(address, "scope_id", None)
    )
    if not public:
        raise ImageLoadError(
            f"{host!r} leads to {address}, which is no public address (ImagePolicy.allow_private_addresses)"
        )


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


class _DeadlineReader(io.RawIOBase):
    """Reads until a moment, however slowly bytes drip in: a socket's own timeout starts anew at every byte."""

    def __init__(self, sock: socket.socket, deadline: float) -> None:
        self._socket, self._deadline = sock, deadline

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._socket.settimeout(_left(self._deadline))
        return self._socket.recv_into(buffer)


class _DeadlineSocket:
    """The three things that http.client asks of a socket."""

    def __init__(self, sock: socket.socket, deadline: float) -> None:
        self._socket, self._deadline = sock, deadline

    def sendall(self, data: bytes) -> None:
        self._socket.settimeout(_left(self._deadline))
        self._socket.sendall(data)

    def makefile(self, mode: str) -> io.BufferedReader:
        return io.BufferedReader(_DeadlineReader(self._socket, self._deadline))

    def close(self) -> None:
        """Nothing: http.client closes its side as soon as the head has come; `fetch_image` closes when the body has."""


def _connect(
    addresses: Sequence[_Address],
    host: str,
    port: int,
    deadline: float,
    connect: Connect,
    tls: ssl.SSLContext | None,
) -> socket.socket:
    """A connection to the first of the judged addresses that answers; TLS proves that it is the host by name."""
    for position, address in enumerate(addresses, start=1):
        last = position == len(addresses)
        try:
            sock = connect(str(address), port, _left(deadline) if last else _left(deadline) / 2)
        except OSError:
            if last:
                raise
            continue
        if tls is None:
            return sock
        try:
            sock.settimeout(_left(deadline))
            return tls.wrap_socket(sock, server_hostname=host)
        except BaseException:
            sock.close()
            raise
    raise ImageLoadError("no address to connect to")


def _get(target: SplitResult, sock: _DeadlineSocket, max_bytes: int) -> tuple[bytes, str | None]:
    """One request on an open connection: the body, or where it redirects to."""
    host, port = _host_and_port(target)
    connection = http.client.HTTPConnection(host, port)
    connection.default_port = 443 if target.scheme == "https" else 80  # which the Host header leaves out
    connection.sock = sock
    path = quote(target.path or "/", safe="/%:@!$&'()*+,;=~")
    query = "?" + quote(target.query, safe="/%:@!$&'()*+,;=~?[]") if target.query else ""
    headers = {"Accept": "image/*", "Accept-Encoding": "identity", "User-Agent": "mm-retriever", "Connection": "close"}
    connection.request("GET", path + query, headers=headers)
    with connection.getresponse() as response:
        if response.status in _REDIRECTS:
            location = response.getheader("Location")
            if not location:
                raise ImageLoadError(f"status {response.status} without a target")
            return b"", location
        _check_response(response, max_bytes)
        return _read_body(response, max_bytes), None


def _check_response(response: http.client.HTTPResponse, max_bytes: int) -> None:
    if response.status != 200:
        raise ImageLoadError(f"the server answers {response.status} ({response.reason[:60]!r})")
    media_type = (response.getheader("Content-Type") or "").split(";")[0].strip().lower()
    if not media_type.startswith("image/") and media_type not in (
        "",
        "application/octet-stream",
        "binary/octet-stream",
    ):
        raise ImageLoadError(f"the server sends {media_type[:60]!r}, not a picture")
    if (response.getheader("Content-Encoding") or "identity").strip().lower() != "identity":
        raise ImageLoadError("the server compresses although it was asked not to")
    if response.length is not None and response.length > max_bytes:
        raise ImageLoadError(f"{response.length} bytes, more than the limit of {max_bytes} (ImagePolicy.max_bytes)")


def _read_body(response: http.client.HTTPResponse, max_bytes: int) -> bytes:
    expected, body = response.length, bytearray()
    while chunk := response.read1(_READ_BYTES):
        body += chunk
        if len(body) > max_bytes:
            raise ImageLoadError(f"larger than the limit of {max_bytes} bytes (ImagePolicy.max_bytes)")
    if expected is not None and len(body) < expected:
        raise ImageLoadError(f"the download ended after {len(body)} of {expected} bytes")
    return bytes(body)
