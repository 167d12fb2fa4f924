"""One image from an untrusted URL: checked addresses, pinned connections, hard limits.

The only file of the package that opens a connection for an image. Every address that a name resolves to is checked, and
the connection goes to a checked address, with no second look-up in between. No proxy, cookie, credential or environment
variable takes part. Knows nothing of images beyond the media type.
"""

from __future__ import annotations

import ipaddress
import socket
import ssl
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias
from urllib.parse import SplitResult, quote, urljoin, urlsplit

import httpcore

from mm_retriever.errors import ImageLoadError, reason_of
from mm_retriever.threads import within

Resolve: TypeAlias = Callable[[str, int], Sequence[str]]
"""A host name and port to all its addresses."""

Address: TypeAlias = ipaddress.IPv4Address | ipaddress.IPv6Address

# What some versions of Python call global although no image lives there. Source: IANA special-purpose registries.
# Among them IPv6 that carries an IPv4 address (compatible, mapped, NAT64, Teredo, 6to4) past a check of IPv4, and the
# metadata service that one cloud (Azure) keeps at a public address.
# fmt: off
_REFUSED = [ipaddress.ip_network(network) for network in (
    "192.0.0.0/24", "192.88.99.0/24", "168.63.129.16/32", "::/96", "::ffff:0:0/96", "64:ff9b::/96", "64:ff9b:1::/48",
    "100::/64", "2001::/23", "2002::/16", "3fff::/20", "5f00::/16", "fec0::/10",
)]
# fmt: on
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_HEADERS: Mapping[bytes | str, bytes | str] = {
    "Accept": "image/*",
    "Accept-Encoding": "identity",
    "User-Agent": "mm-retriever",
    "Connection": "close",
}
_LONGEST_URL = 8192
_FAILURES = (OSError, ValueError, httpcore.NetworkError, httpcore.ProtocolError)


def fetch_image(
    url: str,
    *,
    max_bytes: int,
    timeout: float,
    max_redirects: int = 3,
    allow_private_addresses: bool = False,
    resolve: Resolve | None = None,
    backend: httpcore.NetworkBackend | None = None,
    tls: ssl.SSLContext | None = None,
) -> bytes:
    """Return the body of an image's URL.

    Args:
        url: http or https.
        max_bytes: limit of the body.
        timeout: seconds for everything together: names, redirects, handshakes, body.
        max_redirects: each target is checked like the first; https never redirects to http.
        allow_private_addresses: skip the check of addresses.
        resolve: replaces the system's name resolution; called once for each hop.
        backend: replaces the system's connections; asked for checked addresses only.
        tls: replaces the default context (system certificates, host name checked).

    Raises:
        ImageLoadError: the reason, without the URL.
    """
    network = _CheckedNetwork(
        time.monotonic() + timeout,
        resolve or _system_resolve,
        backend or httpcore.SyncBackend(),
        allow_private_addresses,
    )
    try:
        for _ in range(max_redirects + 1):
            target = _checked_url(url)
            body, location = _get(target, network, tls, max_bytes)
            if location is None:
                return body
            url = urljoin(url, location)
            if target.scheme == "https" and urlsplit(url).scheme == "http":
                raise ImageLoadError("redirected from https to http")
    except (TimeoutError, httpcore.TimeoutException) as error:
        raise ImageLoadError(f"no complete answer within {timeout:g} s (ImagePolicy.url_timeout)") from error
    except ImageLoadError:
        raise
    except _FAILURES as error:
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


def _get(
    target: SplitResult, network: httpcore.NetworkBackend, tls: ssl.SSLContext | None, max_bytes: int
) -> tuple[bytes, str | None]:
    """The body, or where the server redirects to."""
    host = target.hostname or ""
    host = host if host.isascii() else host.encode("idna").decode("ascii")
    path = quote(target.path or "/", safe="/%:@!$&'()*+,;=~")
    query = "?" + quote(target.query, safe="/%:@!$&'()*+,;=~?[]") if target.query else ""
    url = httpcore.URL(scheme=target.scheme, host=host, port=target.port, target=path + query)
    context = tls or ssl.create_default_context() if target.scheme == "https" else None
    with (
        httpcore.ConnectionPool(ssl_context=context, network_backend=network) as pool,
        pool.stream("GET", url, headers=list(_HEADERS.items())) as response,
    ):
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in response.headers}
        if response.status in _REDIRECTS:
            if not headers.get("location"):
                raise ImageLoadError(f"status {response.status} without a target")
            return b"", headers["location"]
        _check_response(response, headers, max_bytes)
        body = bytearray()
        for chunk in response.iter_stream():
            body += chunk
            if len(body) > max_bytes:
                raise ImageLoadError(f"larger than the limit of {max_bytes} bytes (ImagePolicy.max_bytes)")
        return bytes(body), None


def _check_response(response: httpcore.Response, headers: dict[str, str], max_bytes: int) -> None:
    if response.status != 200:
        phrase = bytes(response.extensions.get("reason_phrase", b""))[:60].decode("latin-1")
        raise ImageLoadError(f"the server answers {response.status} ({phrase!r})")
    media_type = headers.get("content-type", "").split(";")[0].strip().lower()
    if media_type not in ("", "application/octet-stream", "binary/octet-stream") and media_type[:6] != "image/":
        raise ImageLoadError(f"the server sends {media_type[:60]!r}, not an image")
    if headers.get("content-encoding", "identity").strip().lower() != "identity":
        raise ImageLoadError("the server compresses although it was asked not to")
    length = headers.get("content-length", "0")
    if int(length) > max_bytes:
        raise ImageLoadError(f"{length} bytes, more than the limit of {max_bytes} (ImagePolicy.max_bytes)")


class _CheckedNetwork(httpcore.NetworkBackend):
    """Connections to checked addresses only, which all end at one moment."""

    def __init__(
        self, deadline: float, resolve: Resolve, backend: httpcore.NetworkBackend, allow_private_addresses: bool
    ) -> None:
        self._deadline, self._resolve, self._backend = deadline, resolve, backend
        self._allow_private_addresses = allow_private_addresses

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.NetworkStream:
        """A connection to the first address of the host that answers; TLS proves the name."""
        *others, last = self._addresses(host, port)
        for address in others:
            try:
                return self._connected(address, port, _left(self._deadline) / 2)
            except (httpcore.ConnectError, httpcore.ConnectTimeout):
                continue
        return self._connected(last, port, _left(self._deadline))

    def _connected(self, address: Address, port: int, timeout: float) -> httpcore.NetworkStream:
        return _DeadlineStream(self._backend.connect_tcp(str(address), port, timeout), self._deadline)

    def _addresses(self, host: str, port: int) -> list[Address]:
        """All addresses of a host, once each. In a thread: a system look-up knows no timeout of its own."""
        left = _left(self._deadline)
        try:
            answer = within(lambda: self._resolve(host, port), left)
        except TimeoutError:
            raise
        except Exception as error:
            raise ImageLoadError(f"the name {host!r} does not resolve ({error})") from error
        if not answer:
            raise ImageLoadError(f"the name {host!r} has no address")
        addresses = [ipaddress.ip_address(text) for text in dict.fromkeys(answer)]
        for address in addresses:
            if not (self._allow_private_addresses or _is_public(address)):
                raise ImageLoadError(
                    f"{host!r} leads to {address}, which is no public address (ImagePolicy.allow_private_addresses)"
                )
        return addresses


class _DeadlineStream(httpcore.NetworkStream):
    """A stream that ends at a moment, however slowly bytes drip in: a socket's timeout starts anew at every byte."""

    def __init__(self, stream: httpcore.NetworkStream, deadline: float) -> None:
        self._stream, self._deadline = stream, deadline
        self.close, self.get_extra_info = stream.close, stream.get_extra_info  # type: ignore[method-assign]

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self._stream.read(max_bytes, _left(self._deadline))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._stream.write(buffer, _left(self._deadline))

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.NetworkStream:
        secured = self._stream.start_tls(ssl_context, server_hostname, _left(self._deadline))
        return _DeadlineStream(secured, self._deadline)


def _is_public(address: Address) -> bool:
    return address.is_global and not (
        address.is_multicast
        or address.is_reserved
        or any(address in network for network in _REFUSED)
        or getattr(address, "scope_id", None)
    )


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


def _system_resolve(host: str, port: int) -> list[str]:
    return [str(info[4][0]) for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
