"""URLs that nobody vouches for, against real servers on loopback: nothing inside is reached, and everything ends."""

from __future__ import annotations

import ast
import contextlib
import random
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpcore
import pytest
from PIL import Image

from mm_retriever.errors import ImageLoadError
from mm_retriever.images import ImagePolicy, load_image
from mm_retriever.images.url import fetch_image
from tests.support.effort import EFFORT
from tests.support.image_files import encoded

PNG = encoded(Image.new("RGB", (6, 4), "teal"))
Answer = Callable[[BaseHTTPRequestHandler], None]


def send(handler: BaseHTTPRequestHandler, body: bytes, status: int = 200, **headers: str) -> None:
    handler.send_response(status)
    given = {name.replace("_", "-"): value for name, value in headers.items()}
    for name, value in ({"Content-Type": "image/png", "Content-Length": str(len(body))} | given).items():
        if value:
            handler.send_header(name, value)
    handler.end_headers()
    handler.wfile.write(body)


class Server:
    """A web server that answers each path with a function, and keeps the requests it saw."""

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        self.answers: dict[str, Answer] = {"/a.png": lambda handler: send(handler, PNG)}
        self.requests: list[tuple[str, dict[str, str]]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.requests.append((self.path, dict(self.headers)))
                answer = outer.answers.get(self.path.split("?")[0])
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the client has seen enough
                    answer(self) if answer else send(self, b"", 404)

            def log_message(self, *_: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.http.handle_error = lambda *_: None  # type: ignore[method-assign]
        if tls:
            self.http.socket = tls.wrap_socket(self.http.socket, server_side=True)
        self.port = self.http.server_port
        self.url = f"http{'s' if tls else ''}://127.0.0.1:{self.port}"
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()


@pytest.fixture
def server() -> Iterator[Server]:
    running = Server()
    yield running
    running.close()


def fetch(url: str, **options: object) -> bytes:
    """`fetch_image` with limits that suit a test, on loopback."""
    limits: dict[str, object] = {"max_bytes": 100_000, "timeout": 5.0, "allow_private_addresses": True}
    return fetch_image(url, **(limits | options))  # type: ignore[arg-type]


class Internet(httpcore.SyncBackend):
    """Names as given, and every address answered by one server on loopback; keeps the addresses it was asked for."""

    def __init__(self, port: int, names: dict[str, list[str]]) -> None:
        self.connected: list[str] = []
        self.names, self.port = names, port
        self.options = {"resolve": self.resolve, "backend": self, "allow_private_addresses": False}

    def resolve(self, host: str, port: int) -> list[str]:
        return self.names.get(host, [host])

    def connect_tcp(self, host: str, port: int, timeout: float | None = None, **_: object) -> httpcore.NetworkStream:
        self.connected.append(host)
        return super().connect_tcp("127.0.0.1", self.port, timeout)


def refusal(url: str, **options: object) -> str:
    with pytest.raises(ImageLoadError) as caught:
        fetch(url, **options)
    return str(caught.value)


# ---------------------------------------------------------------------------------------------- what works


def test_an_image_is_fetched_when_the_policy_allows_it(server: Server) -> None:
    """Truth: the image served; both switches are needed to reach loopback."""
    url = server.url + "/a.png"
    assert load_image(url, policy=ImagePolicy(allow_urls=True, allow_private_addresses=True)).size == (6, 4)
    for policy in (ImagePolicy(), ImagePolicy(allow_private_addresses=True), ImagePolicy(allow_urls=True)):
        with pytest.raises(ImageLoadError):
            load_image(url, policy=policy)
    assert len(server.requests) == 1


def test_the_request_says_little_and_the_host_by_name(server: Server) -> None:
    """Truth: RFC 9110; no cookie, referrer or credential, whatever the environment holds."""
    fetch(f"http://images.example:{server.port}/a.png?q=%20ü&x=[1]#part", resolve=lambda host, port: ["127.0.0.1"])
    path, headers = server.requests[0]
    assert path == "/a.png?q=%20%C3%BC&x=[1]"
    assert headers == {
        "Host": f"images.example:{server.port}",
        "Accept": "image/*",
        "Accept-Encoding": "identity",
        "User-Agent": "mm-retriever",
        "Connection": "close",
    }


def test_no_proxy_of_the_environment_is_used(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Truth: a proxy would resolve the name again, behind our back."""
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY", "https_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert fetch(server.url + "/a.png") == PNG


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_are_followed_up_to_the_limit(server: Server, status: int) -> None:
    """Truth: three hops, absolute and relative."""
    server.answers["/1"] = lambda handler: send(handler, b"", status, Location=server.url + "/2")
    server.answers["/2"] = lambda handler: send(handler, b"", status, Location="3?x")
    server.answers["/3"] = lambda handler: send(handler, b"", status, Location="/a.png")
    assert fetch(server.url + "/1", max_redirects=3) == PNG
    assert "more than 2 redirects" in refusal(server.url + "/1", max_redirects=2)


def test_a_chunked_body_without_length_is_read(server: Server) -> None:
    """Truth: RFC 9112, chunked transfer coding; and a body that ends with the connection."""

    def chunked(handler: BaseHTTPRequestHandler) -> None:
        handler.protocol_version = "HTTP/1.1"
        send(handler, b"", Content_Length="", Transfer_Encoding="chunked")
        for at in range(0, len(PNG), 10):
            part = PNG[at : at + 10]
            handler.wfile.write(b"%x\r\n%b\r\n" % (len(part), part))
        handler.wfile.write(b"0\r\n\r\n")

    server.answers["/chunked"] = chunked
    server.answers["/until-close"] = lambda handler: send(handler, PNG, Content_Length="")
    assert fetch(server.url + "/chunked") == PNG
    assert fetch(server.url + "/until-close") == PNG


def test_the_next_address_is_tried_when_one_is_dead(server: Server) -> None:
    """Truth: nobody listens on 127.0.0.2 at this port."""
    assert fetch(f"http://two.example:{server.port}/a.png", resolve=lambda *_: ["127.0.0.2", "127.0.0.1"]) == PNG


# ---------------------------------------------------------------------------------------------- addresses

# fmt: off
PRIVATE = [
    "127.0.0.1", "127.255.0.3", "0.0.0.0", "10.0.0.1", "172.16.5.5", "192.168.1.1", "100.64.0.1", "100.100.100.200",
    "169.254.169.254", "168.63.129.16", "192.0.0.192", "192.88.99.1", "198.18.0.1", "192.0.2.1", "224.0.0.1",
    "239.1.2.3", "240.0.0.1", "255.255.255.255", "::", "::1", "::127.0.0.1", "::ffff:127.0.0.1", "::ffff:8.8.8.8",
    "::ffff:a9fe:a9fe", "64:ff9b::7f00:1", "64:ff9b::808:808", "64:ff9b:1::1", "2001:0:4136:e378:8000:63bf:3fff:fdd2",
    "2002:7f00:1::1", "2002:808:808::1", "2001:db8::1", "fc00::1", "fd00:ec2::254", "fe80::1", "fe80::1%lo", "fec0::1",
    "ff02::1", "100::1", "::ffff:0:127.0.0.1", "5f00::1", "4000::1", "2606:4700::1111%eth0",
]
# fmt: on


@pytest.mark.parametrize("address", PRIVATE)
def test_no_connection_is_made_to_an_address_that_is_not_public(address: str, tried: Counter[str]) -> None:
    """Truth: the IANA special-purpose registries, and the metadata services of the clouds."""
    tried["hostile URLs"] += 1
    internet = Internet(9, {"innocent.example": [address]})
    message = refusal("http://innocent.example/a.png", **internet.options)
    assert not internet.connected
    assert "no public address" in message
    assert "'innocent.example'" in message


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "127.1", "2130706433", "0x7f000001", "0177.0.0.1", "localhost", "[::1]", "0", "0x7f.1", "127.0.0.1.",
     "[::ffff:127.0.0.1]", "[::127.0.0.1]", "[fe80::1%25lo]", "\u2460\u2461\u2466.\u24ea.\u24ea.\u2460",
     "127\u30020\u30020\u30021", "LOCALHOST", "%31%32%37.0.0.1", "a.localhost"],
)  # fmt: skip
def test_loopback_is_refused_however_it_is_written(server: Server, tried: Counter[str], host: str) -> None:
    """Truth: what the system's resolver makes of each; the server must not see a request."""
    tried["hostile URLs"] += 1
    message = refusal(f"http://{host}:{server.port}/a.png", allow_private_addresses=False)
    assert "no public address" in message or "does not resolve" in message
    assert not server.requests


def test_one_private_address_among_public_ones_is_enough_to_refuse() -> None:
    """Truth: a name under an attacker's hand may give both and hope for the second."""
    addresses = ["8.8.8.8", "2606:4700::1111", "10.0.0.1"]
    assert "10.0.0.1" in refusal("http://x.example/", resolve=lambda *_: addresses, allow_private_addresses=False)


def test_a_name_is_resolved_once_and_the_connection_pinned(server: Server) -> None:
    """Truth: DNS rebinding: the second answer would be another host; there must be no second question."""
    asked: list[tuple[str, int]] = []

    def rebinding(host: str, port: int) -> list[str]:
        asked.append((host, port))
        return ["8.8.8.8"] if len(asked) == 1 else ["127.0.0.1"]

    internet = Internet(server.port, {})
    assert fetch("http://rebind.example:81/a.png", **internet.options | {"resolve": rebinding}) == PNG
    assert asked == [("rebind.example", 81)]
    assert internet.connected == ["8.8.8.8"]
    assert server.requests[0][1]["Host"] == "rebind.example:81"


def test_a_redirect_to_a_private_address_is_refused(server: Server) -> None:
    """Truth: the first hop is public (as far as the client can tell), the target of its redirect is not."""
    server.answers["/go"] = lambda handler: send(handler, b"", 302, Location="http://169.254.169.254/latest/meta-data")
    server.answers["/name"] = lambda handler: send(handler, b"", 302, Location="http://inside.example/")
    internet = Internet(server.port, {"public.example": ["8.8.8.8"], "inside.example": ["10.1.2.3"]})
    for path, address in (("/go", "169.254.169.254"), ("/name", "10.1.2.3")):
        message = refusal("http://public.example" + path, **internet.options)
        assert f"leads to {address}, which is no public address" in message
    assert internet.connected == ["8.8.8.8", "8.8.8.8"]


def test_public_addresses_are_reached_without_any_switch(server: Server) -> None:
    """Truth: the same checks let the open internet through, on both versions of IP."""
    for address in ("8.8.8.8", "1.1.1.1", "2606:4700:4700::1111", "2a00:1450:4001:82a::200e"):
        internet = Internet(server.port, {"public.example": [address]})
        assert fetch("http://public.example/a.png", **internet.options) == PNG
        assert internet.connected == [address]


@pytest.mark.parametrize(
    "target",
    ["file:///etc/passwd", "ftp://127.0.0.1/a", "gopher://127.0.0.1/", "data:image/png;base64,AAAA", "//user:pw@host/"],
)
def test_a_redirect_to_another_scheme_or_with_credentials_is_refused(
    server: Server, tried: Counter[str], target: str
) -> None:
    """Truth: http and https only, at every hop."""
    tried["hostile URLs"] += 1
    server.answers["/go"] = lambda handler: send(handler, b"", 302, Location=target)
    message = refusal(server.url + "/go")
    assert "only http and https" in message or "user name or password" in message


def test_a_redirect_without_target_is_refused(server: Server) -> None:
    """Truth: RFC 9110: nowhere to go."""
    server.answers["/go"] = lambda handler: send(handler, b"", 302)
    assert "without a target" in refusal(server.url + "/go")


def test_a_ring_of_redirects_ends(server: Server) -> None:
    """Truth: the limit."""
    server.answers["/ring"] = lambda handler: send(handler, b"", 302, Location="/ring")
    assert "redirects" in refusal(server.url + "/ring")
    assert len(server.requests) == 4


# ---------------------------------------------------------------------------------------------- URLs


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("http://user:pass@127.0.0.1/a.png", "user name or password"),
        ("http://user@127.0.0.1/a.png", "user name or password"),
        ("http://127.0.0.1@evil.example/", "user name or password"),
        ("http:///a.png", "no host"),
        ("http://", "no host"),
        ("ftp://127.0.0.1/a.png", "only http and https"),
        ("/a.png", "only http and https"),
        ("http://127.0.0.1:99999/a.png", "ValueError"),
        ("http://127.0.0.1:x/a.png", "ValueError"),
        ("http://[::1/a.png", "ValueError"),
        ("http://127.0.0.1/a b.png", "control character"),
        ("http://127.0.0.1/\r\nHost: evil", "control character"),
        ("http://127.0.0.1\\@evil.example/", "backslash"),
        ("http://127.0.0.1/\0", "control character"),
        ("http://" + "a" * 9_000, "characters"),
        ("http://" + "ä" * 100 + ".example/", "UnicodeError"),
        ("http://does-not-exist.invalid/a.png", "does not resolve"),
        ("http://a\uff0fb/", "NFKC"),
        ("http://a\uff20b/", "NFKC"),
        ("http://a\u2028b/", "UnicodeError"),
        ("http://\ud800/", "UnicodeError"),
        ("http://a\t.example/", "control character"),
        ("http://[a]b/", "ValueError"),
        ("http:\\\\127.0.0.1\\", "backslash"),
        ("javascript://127.0.0.1/", "only http and https"),
    ],
)
def test_urls_that_are_no_plain_web_address_are_refused(tried: Counter[str], url: str, reason: str) -> None:
    """Truth: RFC 3986 and what confuses parsers (CVEs of this kind abound)."""
    tried["hostile URLs"] += 1
    assert reason in refusal(url)


def test_what_connects_was_judged_whatever_the_url_looks_like(server: Server, tried: Counter[str]) -> None:
    """Truth: RFC 3986 says what each piece of a URL is; two thousand URLs of pieces that parsers disagree on.

    Names resolve to a private address unless they are the one name that is public. Nothing else is ever connected to.
    """
    chance = random.Random(5)
    pieces = [
        *("http", "https", ":", "/", "//", "@", "\\", "#", "?", "%", "%2f", "%40", "%00", "[", "]", "[::1]"),
        *("public.example", "127.0.0.1", "0", "evil.example", ":80", ":", ".", "..", "\t", "\r\n", " ", "user:pw@"),
        *("\uff0f", "\u3002", "x", "ftp:"),
    ]
    internet = Internet(server.port, {})
    for _ in range(2_000 * EFFORT):
        url = "http://" * (chance.random() < 0.8) + "".join(chance.choices(pieces, k=chance.randint(1, 7)))
        asked: list[str] = []

        def resolve(host: str, port: int, asked: list[str] = asked) -> list[str]:
            asked.append(host)
            return ["8.8.8.8"] if host.rstrip(".") == "public.example" else ["10.0.0.1"]

        before = len(internet.connected)
        with contextlib.suppress(ImageLoadError):
            fetch(url, **internet.options | {"resolve": resolve})
        tried["hostile URLs"] += 1
        assert len(internet.connected) == before or [host.rstrip(".") for host in asked] == ["public.example"], url
        assert "@" not in url.split("#")[0].split("?")[0].removeprefix("http://").split("/")[0] or not asked, url
    assert set(internet.connected) == {"8.8.8.8"}
    assert all(
        set(headers) <= {"Host", "Accept", "Accept-Encoding", "User-Agent", "Connection"}
        for _, headers in server.requests
    )


def test_an_international_name_is_resolved_in_ascii() -> None:
    """Truth: RFC 3490: bücher.example is xn--bcher-kva.example."""
    asked: list[str] = []
    refusal("http://bücher.example/", resolve=lambda host, port: asked.append(host) or [])
    assert asked == ["xn--bcher-kva.example"]


# ---------------------------------------------------------------------------------------------- answers


@pytest.mark.parametrize("media_type", ["text/html", "text/html; charset=utf-8", "application/json", "video/mp4", "x"])
def test_an_answer_of_another_type_is_refused(server: Server, media_type: str) -> None:
    """Truth: the declared type; the body is not even read."""
    server.answers["/t"] = lambda handler: send(handler, PNG, Content_Type=media_type)
    assert "not an image" in refusal(server.url + "/t")


@pytest.mark.parametrize("media_type", ["", "image/jpeg", "IMAGE/PNG;x=y", "application/octet-stream"])
def test_an_image_declared_loosely_is_taken(server: Server, media_type: str) -> None:
    """Truth: many file servers know no better; the bytes decide in the end."""
    server.answers["/t"] = lambda handler: send(handler, PNG, Content_Type=media_type)
    assert fetch(server.url + "/t") == PNG


@pytest.mark.parametrize("status", [204, 206, 304, 400, 401, 403, 404, 500, 503])
def test_an_answer_that_is_no_success_is_refused(server: Server, status: int) -> None:
    """Truth: the status, named in the message."""
    server.answers["/s"] = lambda handler: send(handler, b"" if status in (204, 304) else PNG, status)
    assert f"answers {status}" in refusal(server.url + "/s")


def test_a_declared_length_above_the_limit_is_refused_before_the_body(server: Server) -> None:
    """Truth: max_bytes."""
    server.answers["/big"] = lambda handler: send(handler, PNG, Content_Length="100001")
    assert "100001 bytes, more than the limit of 100000" in refusal(server.url + "/big")


def test_a_body_without_end_is_cut_at_the_limit(server: Server) -> None:
    """Truth: bytes that the server got rid of: the limit plus what the system buffers."""
    sent = [0]

    def endless(handler: BaseHTTPRequestHandler) -> None:
        send(handler, b"", Content_Length="")
        while True:
            handler.wfile.write(bytes(10_000))
            sent[0] += 10_000

    server.answers["/endless"] = endless
    assert "larger than the limit" in refusal(server.url + "/endless")
    assert sent[0] < 20_000_000


def test_a_body_shorter_than_declared_is_refused(server: Server) -> None:
    """Truth: Content-Length says more."""
    server.answers["/short"] = lambda handler: send(handler, PNG, Content_Length=str(len(PNG) + 5))
    assert f"received {len(PNG)} bytes, expected {len(PNG) + 5}" in refusal(server.url + "/short")


def test_a_compressed_answer_is_refused(server: Server) -> None:
    """Truth: a few bytes of gzip can unfold into gigabytes; we asked for none."""
    server.answers["/gzip"] = lambda handler: send(handler, PNG, Content_Encoding="gzip")
    assert "compresses" in refusal(server.url + "/gzip")


def drip(pause: float, head: bytes = b"", body: bytes = b"x") -> Answer:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.wfile.write(head)
        for _ in range(200):
            handler.wfile.write(body)
            handler.wfile.flush()
            time.sleep(pause)

    return answer


@pytest.mark.parametrize(
    "answer",
    [
        drip(0.05, b"HTTP/1.0 200 OK\r\nContent-Type: image/png\r\n\r\n"),
        drip(0.05, b"HTTP/1.0 200 OK\r\nX-Long: "),
        drip(0.05, b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
        drip(10.0, b""),
        drip(0.05, b"HTTP/1.1 200 OK\r\nContent-Type: image/png\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n"),
    ],
    ids=["body", "headers", "interim answers", "silence", "chunks"],
)
def test_the_time_limit_holds_however_the_bytes_drip(server: Server, answer: Answer) -> None:
    """Truth: a limit of 0.6 s, and ten seconds of dripping; a socket's own timeout would start anew with every byte."""
    server.answers["/slow"] = answer
    started = time.monotonic()
    assert "no complete answer within 0.6 s" in refusal(server.url + "/slow", timeout=0.6)
    assert time.monotonic() - started < 8


def test_the_time_limit_covers_all_redirects_together(server: Server) -> None:
    """Truth: each hop takes 0.25 s, the limit is 0.6 s; without it the tenth redirect would be the reason."""

    def hop(handler: BaseHTTPRequestHandler) -> None:
        time.sleep(0.25)
        send(handler, b"", 302, Location="/hop")

    server.answers["/hop"] = hop
    assert "no complete answer" in refusal(server.url + "/hop", timeout=0.6, max_redirects=10)


def test_a_name_server_that_hangs_is_given_up() -> None:
    """Truth: the limit of 0.3 s; the system's look-up knows none."""
    release = threading.Event()

    def hanging(host: str, port: int) -> list[str]:
        release.wait(60)
        return []

    started = time.monotonic()
    assert "no complete answer" in refusal("http://slow.example/", resolve=hanging, timeout=0.3)
    release.set()
    assert time.monotonic() - started < 30


def test_a_server_that_never_accepts_is_given_up() -> None:
    """Truth: the limit; the listener's queue is full and nobody takes from it."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        port = listener.getsockname()[1]
        waiting = [socket.socket() for _ in range(4)]
        for client in waiting:
            client.setblocking(False)
            client.connect_ex(("127.0.0.1", port))
        started = time.monotonic()
        assert "cannot" not in refusal(f"http://127.0.0.1:{port}/", timeout=0.5)
        assert time.monotonic() - started < 30
        for client in waiting:
            client.close()


def test_a_dead_port_is_a_clear_error() -> None:
    """Truth: connection refused."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    assert "refused" in refusal(f"http://127.0.0.1:{port}/")


@pytest.mark.parametrize("answer", [b"", b"\r\n", b"SSH-2.0-OpenSSH_9\r\n", b"HTTP/9.9 abc\r\n\r\n", b"\xff" * 70_000])
def test_a_server_that_speaks_no_http_is_a_clear_error(server: Server, answer: bytes) -> None:
    """Truth: one error for whatever goes wrong."""
    server.answers["/junk"] = lambda handler: handler.wfile.write(answer) and None
    assert refusal(server.url + "/junk")


def test_an_error_names_the_url_without_its_secrets(server: Server) -> None:
    """Truth: signed URLs end up in logs."""
    with pytest.raises(ImageLoadError) as caught:
        load_image(
            server.url + "/none.png?signature=secret", policy=ImagePolicy(allow_urls=True, allow_private_addresses=True)
        )
    assert f"'{server.url}/none.png'" in str(caught.value)
    assert "secret" not in str(caught.value)


# ---------------------------------------------------------------------------------------------- https


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate for images.example, made here by openssl."""
    openssl = shutil.which("openssl")
    if not openssl:
        pytest.skip("no openssl to make a certificate with")
    path = tmp_path_factory.mktemp("tls") / "both.pem"
    subject = ["-subj", "/CN=images.example", "-addext", "subjectAltName=DNS:images.example"]
    new = ["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
    subprocess.run(
        [openssl, *new, *subject, "-keyout", str(path), "-out", str(path.with_suffix(".crt"))],
        check=True,
        capture_output=True,
    )
    path.write_bytes(path.read_bytes() + path.with_suffix(".crt").read_bytes())
    return path


@pytest.fixture
def https(certificate: Path) -> Iterator[Server]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    running = Server(context)
    yield running
    running.close()


def test_https_proves_the_name_although_the_address_is_pinned(https: Server, certificate: Path) -> None:
    """Truth: the certificate is for images.example and trusted only by the context given."""
    trusting = ssl.create_default_context(cafile=certificate.with_suffix(".crt"))
    here = {"resolve": lambda *_: ["127.0.0.1"]}
    url = f"https://images.example:{https.port}/a.png"
    assert fetch(url, tls=trusting, **here) == PNG
    assert https.requests[0][1]["Host"] == f"images.example:{https.port}"
    assert "CERTIFICATE_VERIFY_FAILED" in refusal(url, **here).upper()
    other = f"https://other.example:{https.port}/a.png"
    assert "CERTIFICATE_VERIFY_FAILED" in refusal(other, tls=trusting, **here).upper()


def test_https_never_redirects_to_http(https: Server, server: Server, certificate: Path) -> None:
    """Truth: our choice: a signed URL must not leak onto the wire."""
    trusting = ssl.create_default_context(cafile=certificate.with_suffix(".crt"))
    https.answers["/go"] = lambda handler: send(handler, b"", 302, Location=server.url + "/a.png")
    url = f"https://images.example:{https.port}/go"
    assert "from https to http" in refusal(url, tls=trusting, resolve=lambda *_: ["127.0.0.1"])
    assert not server.requests


def test_a_server_that_stalls_the_handshake_is_given_up() -> None:
    """Truth: the limit of 0.5 s; the connection is accepted and nothing follows."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(5)
        started = time.monotonic()
        assert "no complete answer" in refusal(f"https://127.0.0.1:{listener.getsockname()[1]}/", timeout=0.5)
        assert time.monotonic() - started < 30


# ---------------------------------------------------------------------------------------------- nobody else fetches


def test_nothing_that_takes_an_image_asks_a_url_unasked(server: Server, tmp_path: Path) -> None:
    """Every public place where an untrusted URL can arrive, under a policy that fetches none.

    Truth: the server's list of requests. It could be reached: one switch more, and it is asked.
    """
    from llama_index.core.base.llms.types import ChatMessage, ImageBlock, TextBlock
    from llama_index.core.schema import ImageNode, MediaResource, Node, NodeWithScore, QueryBundle

    from mm_retriever import ComposedRetriever, ingest_images, open_store
    from mm_retriever.embedding import VisualizedBGEEmbedding
    from mm_retriever.engine import image_query_engine
    from mm_retriever.phi3_vision.llm import Phi3VisionLLM
    from mm_retriever.report import Hit, SearchReport, write_html, write_png
    from mm_retriever.rerank import Phi3VisionRerank, VisionLLMRerank
    from mm_retriever.search_tools import Conversation, ImageSearch
    from tests.support.drawn_store import ScriptedLLM, says, texts_of

    url, policy = server.url + "/a.png", ImagePolicy(allow_private_addresses=True)
    model = VisualizedBGEEmbedding("tiny", device="cpu", image_policy=policy)
    vector = model.get_text_embedding("a mug")
    nodes = [  # no ImageDocument: LlamaIndex downloads its URL while the caller makes it
        ImageNode(id_="by url", image_url=url, embedding=vector),
        ImageNode(id_="by path", image_path=url, embedding=vector),
        Node(id_="node", image_resource=MediaResource(url=url), embedding=vector),
    ]
    asks = [
        lambda: load_image(url, policy=policy),
        lambda: model.get_image_embedding(url),
        lambda: model.get_image_embedding_batch([url]),
        lambda: model.get_composed_embedding("in red", url),
        lambda: model.get_query_bundle("in red", url),
        lambda: Conversation().attach("a.png", url, policy=policy),
        *(lambda node=node: model([node]) for node in nodes),
    ]
    for ask in asks:
        with pytest.raises(ImageLoadError, match="fetching URLs is off"):
            ask()
    found = [NodeWithScore(node=node, score=0.5) for node in nodes[:2]]
    rerankers = [
        Phi3VisionRerank("tiny", image_policy=policy, device="cpu"),
        VisionLLMRerank(ScriptedLLM.of(*[says('{"ranking": [1]}')] * 9), image_policy=policy),
    ]
    for reranker in rerankers:
        notes = [one.node.metadata["rerank_note"] for one in reranker.rerank(found, "x").nodes]
        assert all("fetching URLs is off" in note for note in notes)
        with pytest.raises(ImageLoadError, match="fetching URLs is off"):
            reranker.rerank(found, QueryBundle("x", image_path=url))
    block = ImageBlock(url=url)
    with pytest.raises(ImageLoadError, match="fetching URLs is off"):
        Phi3VisionLLM("tiny", image_policy=policy).chat([ChatMessage(blocks=[block, TextBlock(text="what?")])])
    with open_store(tmp_path / "a.db", model) as store:
        skipped = ingest_images([url, *nodes], store, model, image_policy=policy, show_progress=False).skipped
        assert len(skipped) == 4
        store.add(nodes)
        search = ImageSearch(store, model, image_policy=policy, stored_policy=policy, rerank=rerankers[1])
        assert all("fetching URLs is off" in image.note for image in search.search("mug").pictures)
        assert "fetching URLs is off" in search.describe("by url").note
        for ask in (lambda: search.original("by path"), lambda: search.search(image=url), lambda: search.describe(url)):
            with pytest.raises(ImageLoadError, match="fetching URLs is off"):
                ask()
        retriever = ComposedRetriever(store, model, exclude_query_image=True)
        retriever.retrieve(QueryBundle("x", image_path=url, embedding=vector))
        with pytest.raises(ImageLoadError, match="fetching URLs is off"):
            retriever.retrieve(QueryBundle("x", image_path=url))
        llm = ScriptedLLM.of(says("nothing to see"))
        image_query_engine(store, model, llm=llm, image_policy=policy).query("a mug")
        assert "fetching URLs is off" in texts_of(llm.asked[0])
    report = SearchReport("x", hits=(Hit(1, "a", path=url), Hit(2, "b", image=url)), query_image=url)
    assert url not in write_html(tmp_path / "a.html", report, image_policy=policy).read_text().split("<body>")[0]
    assert "<img" not in (tmp_path / "a.html").read_text()
    write_png(tmp_path / "a.png", report, image_policy=policy)
    assert server.requests == []
    load_image(url, policy=ImagePolicy(allow_urls=True, allow_private_addresses=True))
    assert len(server.requests) == 1


NETWORK = {
    "aiohttp",
    "ftplib",
    "http",
    "httpcore",
    "httpx",
    "requests",
    "smtplib",
    "socket",
    "ssl",
    "urllib.request",
    "urllib3",
}
KNOWN = {
    "mm_retriever/images/url.py": {"httpcore", "socket", "ssl"},
    "mm_retriever/demo/__init__.py": {"urllib.request"},  # one published archive, when someone asks for it
    "mm_retriever/bulk/ray_data.py": {"socket"},  # is there a Ray where RAY_ADDRESS says?
    "mm_retriever/servers/failures.py": {"httpx"},  # the server that the caller names
    "mm_retriever/store/lite_wire.py": {"socket"},  # a Unix socket, for processes of the same user
    "mm_retriever/store/lite_server.py": {"socket"},  # the same
    "mm_retriever/running.py": {"http.client", "socket"},  # the user's own server of a file, or the one of --via
    "integrations/web_mm_retriever/serving.py": {"socket"},  # listens
    "integrations/web_mm_retriever/waiting.py": {"socket"},  # is given what listens
    "integrations/web_mm_retriever/admission.py": {"http.cookies"},  # reads a header
}


def test_no_other_file_can_open_a_connection_or_lets_llama_index_open_one() -> None:
    """Truth: the sources. Weights come through huggingface_hub, rows through pymilvus, images through one file."""
    root = Path(__file__).resolve().parents[2]
    found: dict[str, set[str]] = {}
    for path in [*(root / "mm_retriever").rglob("*.py"), *(root / "integrations").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [one.name for one in node.names] if isinstance(node, ast.Import) else []
            names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            opened = {name for name in names if name in NETWORK or name.split(".")[0] in NETWORK}
            if opened:
                found.setdefault(path.relative_to(root).as_posix(), set()).update(opened)
            called = node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
            assert called not in ("resolve_image", "urlretrieve", "ImageDocument"), path
    assert found == KNOWN
