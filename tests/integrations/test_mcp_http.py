"""The MCP server over HTTP: who may connect, and how much one client can take from the others."""

from __future__ import annotations

import base64
import io
import json
import resource
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path

import anyio
import pytest

pytest.importorskip("mcp.server", reason='needs the extra "mcp"')
import httpx2
import psutil
import uvicorn
from mcp.client.client import Client
from mcp.client.streamable_http import streamable_http_client
from mcp_server_mm_retriever import ImageSearchServer, check_access, create_server, http_app
from mcp_server_mm_retriever.http import Admission, BoundedProtocol
from mcp_server_mm_retriever.server import Conversations
from PIL import Image

from mm_retriever.cli import main
from mm_retriever.embedding import VisualizedBGEEmbedding
from mm_retriever.errors import QueryError
from mm_retriever.images import ImagePolicy
from mm_retriever.search_tools import ImageSearch
from mm_retriever.store import open_store
from tests.support.drawn_store import draw_leopard
from tests.support.mcp import ENVIRONMENT, assert_every_tool_works

TOKEN = "a-token-that-nobody-guesses"
HEADER = b"POST /mcp HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
BODY_STARTS = b"Content-Length: 9\r\n\r\n{"


@contextmanager
def serving(app) -> Iterator[str]:
    """The URL of an ASGI app on a free port."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    server = uvicorn.Server(
        uvicorn.Config(app, port=port, log_config=None, ws="none", http=BoundedProtocol, backlog=2048)
    )
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        yield f"http://127.0.0.1:{port}/mcp"
    finally:
        server.should_exit = True
        thread.join()


@asynccontextmanager
async def over_http(url: str, mode: str = "auto", **headers: str):
    async with (
        httpx2.AsyncClient(headers=headers, timeout=60) as http,
        Client(streamable_http_client(url, http_client=http), mode=mode) as client,
    ):
        yield client


@pytest.mark.parametrize(("mode", "remembers"), [("auto", False), ("legacy", True)])
async def test_a_session_over_http(search, leopard, mode, remembers):
    """Protocol versions with sessions remember results; the latest has none, and names results by id."""
    with serving(http_app(search)) as url:
        async with over_http(url, mode) as client:
            await assert_every_tool_works(client, leopard, remembers=remembers)


async def test_sessions_over_http_do_not_see_each_others_results(search):
    with serving(http_app(search)) as url:
        async with over_http(url, "legacy") as one, over_http(url, "legacy") as other:
            await one.call_tool("search_images", {"text": "mug", "top_k": 1})
            refused = await other.call_tool("describe_image", {"image": "result 1"})
            assert refused.is_error
            assert "nothing was found yet" in refused.content[0].text
            assert not (await one.call_tool("describe_image", {"image": "result 1"})).is_error


async def test_a_session_id_that_a_client_makes_up_opens_nobodys_conversation(search):
    """The latest protocol has no sessions, and passes the header on as it comes."""
    with serving(http_app(search)) as url:
        async with over_http(url, "auto", **{"mcp-session-id": "guessed"}) as client:
            await client.call_tool("search_images", {"text": "mug", "top_k": 1})
            refused = await client.call_tool("describe_image", {"image": "result 1"})
    assert "not remembered here" in refused.content[0].text


async def test_with_a_token_only_who_sends_it_is_served(search):
    call = {"jsonrpc": "2.0", "id": 1, "method": "tools/list"}
    with serving(http_app(search, token=TOKEN)) as url:
        async with over_http(url, Authorization=f"Bearer {TOKEN}") as client:
            assert len((await client.list_tools()).tools) == 3
        async with httpx2.AsyncClient() as http:
            for header in (None, "", "Bearer", "Bearer wrong", f"Basic {TOKEN}", f"Bearer {TOKEN}x", "Bearer \xe9"):
                headers = [] if header is None else [(b"authorization", header.encode("latin-1"))]
                for method in ("POST", "GET", "DELETE"):
                    answer = await http.request(method, url, headers=headers, json=call)
                    assert answer.status_code == 401
                    assert answer.headers["www-authenticate"] == "Bearer"


async def test_a_request_too_large_is_refused_before_it_is_read(search):
    """The largest image that may be sent fits; what is larger is refused in words, and never gathered without end."""

    async def without_length():
        for _ in range(30):
            yield b"x" * 2**20

    with serving(http_app(search)) as url:
        async with httpx2.AsyncClient() as http:
            for body in (b"x" * (29 * 2**20), without_length()):
                headers = {"content-type": "application/json", "mcp-protocol-version": "2026-07-28"}
                answer = await http.post(url, content=body, headers=headers)
                assert answer.status_code == 413
                assert "larger than 28 MiB; send a smaller image" in answer.json()["error"]["message"]
        async with over_http(url) as client:
            assert len((await client.list_tools()).tools) == 3


async def test_an_unexpected_failure_tells_a_client_nothing(search, folder):
    """An error that is not ours may hold paths and secrets: its text stays here."""

    class Broken(ImageSearch):
        def search(self, *args, **kwargs):
            raise OSError(2, "secret words", "/home/someone/secret path")

    embed_model = VisualizedBGEEmbedding("tiny", device="cpu")
    with open_store(folder / "drawn.db", embed_model) as store:
        async with Client(create_server(Broken(store, embed_model))) as client:
            refused = await client.call_tool("search_images", {"text": "x"})
    assert refused.is_error
    assert "secret" not in refused.content[0].text


async def test_a_web_page_cannot_reach_a_local_server_under_its_own_name(search):
    """DNS rebinding: the page's name leads to the loopback address."""
    call = {"jsonrpc": "2.0", "id": 1, "method": "tools/list"}
    accept = {"accept": "application/json, text/event-stream"}
    with serving(http_app(search)) as url:
        async with httpx2.AsyncClient() as http:
            for headers in ({"host": "evil.example"}, {"origin": "http://evil.example"}):
                answer = await http.post(url, headers=headers | accept, json=call)
                assert answer.status_code in (403, 421)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.7", "example.org", ""])
def test_other_machines_are_not_served_without_a_token(search, host):
    with pytest.raises(QueryError, match="needs a token"):
        check_access(host, None)
    check_access(host, TOKEN)
    for weak in ("short", "with space in it 1234", "x" * 15, "é" * 20):
        with pytest.raises(QueryError, match="16 printable"):
            check_access(host, weak)


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_an_empty_or_guessable_token_is_refused(host):
    """Whoever gives a token means to keep others out, also where its variable was left empty."""
    for empty in ("", "  ", "\t"):
        with pytest.raises(QueryError, match="empty, which would let everyone in"):
            check_access(host, empty)
    with pytest.raises(QueryError, match="can be guessed"):
        check_access(host, "ab" * 10)


def test_the_command_refuses_an_empty_token_from_the_environment(monkeypatch, capfd):
    monkeypatch.setenv("MM_RETRIEVER_MCP_TOKEN", "")
    with pytest.raises(SystemExit):
        main(["mcp", "--http"])
    assert "the token is empty" in capfd.readouterr().err


async def test_with_a_token_a_proxy_may_pass_requests_on_under_its_own_host_name(search):
    """A TLS proxy in front of a loopback server keeps the name that its clients use."""
    with serving(http_app(search, token=TOKEN)) as url:
        async with over_http(url, Authorization=f"Bearer {TOKEN}", Host="photos.example.org") as client:
            assert len((await client.list_tools()).tools) == 3


@contextmanager
def half_open(url: str, count: int, start: bytes) -> Iterator[list[socket.socket]]:
    """Connections that have sent the start of a request and no more."""
    port = int(url.split(":")[2].split("/")[0])
    sockets: list[socket.socket] = []
    try:
        for _ in range(count):
            connection = socket.create_connection(("127.0.0.1", port), 10)
            with suppress(OSError):  # the server may have let go of it already
                connection.sendall(start)
            sockets.append(connection)
        yield sockets
    finally:
        for connection in sockets:
            connection.close()


def connections_to(port: int) -> int:
    """How many this process, which is the server too, has accepted."""
    return sum(one.laddr.port == port and one.status != "LISTEN" for one in psutil.Process().net_connections())


@pytest.mark.parametrize(
    "start",
    [
        pytest.param(HEADER, id="header", marks=pytest.mark.slow),
        pytest.param(b"", id="nothing", marks=pytest.mark.slow),
        pytest.param(HEADER + BODY_STARTS, id="body"),
    ],
)
async def test_3000_half_open_connections_change_nothing_for_others(search, start, tried):
    """Whoever has no token can open connections and leave them; the oldest of them give way."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 8_000:
        pytest.skip("this system lets no process open 8,000 files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 8_000), hard))
    try:
        with serving(http_app(search, token=TOKEN)) as url, half_open(url, 3_000, start):
            port = int(url.split(":")[2].split("/")[0])
            deadline = time.monotonic() + 60  # a busy machine accepts faster than it lets go
            while (open_now := connections_to(port)) > BoundedProtocol.limit and time.monotonic() < deadline:
                time.sleep(0.2)
            assert open_now <= BoundedProtocol.limit
            async with over_http(url, Authorization=f"Bearer {TOKEN}") as client:
                assert not (await client.call_tool("search_images", {"text": "mug", "top_k": 1})).is_error
            tried["half-open connections"] += 3_000
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("start", [HEADER, HEADER + BODY_STARTS], ids=["header", "body"])
async def test_a_request_that_does_not_arrive_within_its_deadline_is_given_up(search, start, monkeypatch):
    monkeypatch.setattr("mcp_server_mm_retriever.http.HEADER_SECONDS", 0.2)
    monkeypatch.setattr("mcp_server_mm_retriever.http.BODY_SECONDS", 0.2)
    with serving(http_app(search)) as url, half_open(url, 1, start) as (connection,):
        connection.settimeout(10)
        with suppress(ConnectionResetError):
            assert connection.recv(1000) == b""


async def test_a_conversation_ends_with_its_session(search):
    """Over HTTP a client ends its session with DELETE; ids are all that was kept of its results."""
    server = ImageSearchServer(search, one_client=False)
    app = Admission(server.streamable_http_app(), server.conversations, None)
    with serving(app) as url:
        async with over_http(url, "legacy") as client:
            await client.call_tool("search_images", {"text": "mug", "top_k": 2})
            assert len(server.conversations) == 1
        assert len(server.conversations) == 0


async def test_a_client_is_not_told_where_files_lie(search, tmp_path):
    """Folders of the server's machine in errors and notes help only an attacker."""
    private = tmp_path / "home of someone" / "photos"
    private.mkdir(parents=True)
    draw_leopard(private.parent / "leopard.png")
    limited = ImageSearch(
        search._store,
        search._embed_model,
        image_policy=ImagePolicy(roots=(private,)),
        stored_policy=ImagePolicy(roots=(private,)),
    )
    async with Client(create_server(limited)) as client:
        answers = [
            await client.call_tool("search_images", {"image": str(private.parent / "leopard.png")}),
            await client.call_tool("search_images", {"image": str(private / "none.png")}),
            await client.call_tool("search_images", {"text": "mug", "top_k": 2}),
        ]
    told = "".join(str(answer) for answer in answers)
    assert "home of someone" not in told
    assert "photos'" in told
    assert str(tmp_path) not in told


@pytest.mark.parametrize(("session", "size", "followed"), [(b"a", 2**20, True), (b"a", 99, False), (b"", 2**20, False)])
async def test_a_small_message_follows_a_large_one_of_a_session(session, size, followed):
    """The SDK's session holds its last message with its body: 256 of them would be 12 GB."""
    bodies = []

    async def app(scope, receive, send):
        bodies.append((await receive())["body"])

    async def receive():
        return {"type": "http.request", "body": b"x" * size}

    async def send(message):
        pass

    headers = [(b"content-length", str(size).encode()), *([(b"mcp-session-id", session)] if session else [])]
    scope = {"type": "http", "method": "POST", "headers": headers}
    await Admission(app, Conversations(one_client=False), None)(scope, receive, send)
    assert len(bodies[0]) == size
    assert (len(bodies) == 2 and b"notifications/" in bodies[1]) is followed


async def test_the_request_that_opens_a_session_is_small(search):
    """The SDK's session holds it as long as it lives. One that does not say its size is read to the limit."""
    hello = {"protocolVersion": "2025-06-18", "capabilities": {}, "clientInfo": {"name": "t", "version": "1"}}
    small = {"jsonrpc": "2.0", "id": 1, "method": "initialize", "params": hello}
    large = small | {"params": hello | {"x": "x" * 2**21}}

    async def pieces(call):
        yield json.dumps(call).encode()

    headers = {"content-type": "application/json", "accept": "application/json, text/event-stream"}
    with serving(http_app(search)) as url:
        async with httpx2.AsyncClient(timeout=60) as http:
            for call, status in ((small, 200), (large, 413)):
                assert (await http.post(url, json=call, headers=headers)).status_code == status
                answer = await http.post(url, content=pieces(call), headers=headers)
                assert answer.status_code == status
    assert "opens a session is at most 1 MiB" in answer.json()["error"]["message"]


async def test_a_stream_is_opened_again_where_nothing_can_be_sent_again(search):
    """A client that lost its stream names the last event it saw; the answer is a new stream, not an error 500."""
    hello = {"protocolVersion": "2025-06-18", "capabilities": {}, "clientInfo": {"name": "t", "version": "1"}}
    headers = {"accept": "application/json, text/event-stream", "mcp-protocol-version": "2025-06-18"}
    with serving(http_app(search)) as url:
        async with httpx2.AsyncClient(timeout=20) as http:
            call = {"jsonrpc": "2.0", "id": 1, "method": "initialize", "params": hello}
            opened = await http.post(url, json=call, headers=headers)
            again = headers | {"mcp-session-id": opened.headers["mcp-session-id"], "last-event-id": "7"}
            async with http.stream("GET", url, headers=again) as stream:
                assert stream.status_code == 200
                assert stream.headers["content-type"].startswith("text/event-stream")


async def test_a_named_web_page_may_read_the_answers(search):
    """CORS: only the pages that the user named, over loopback as well as with a token."""
    page, other = "https://inspector.example", "https://elsewhere.example"
    asked = {"access-control-request-method": "POST", "access-control-request-headers": "mcp-session-id"}
    for token in (None, TOKEN):
        with serving(http_app(search, token=token, origins=[page])) as url:
            async with httpx2.AsyncClient(timeout=20) as http:
                allowed = await http.options(url, headers=asked | {"origin": page})
                refused = await http.options(url, headers=asked | {"origin": other})
                call = {"jsonrpc": "2.0", "id": 1, "method": "ping"}
                sent = {"origin": page, "accept": "application/json, text/event-stream"}
                if token:
                    sent["authorization"] = f"Bearer {token}"
                answer = await http.post(url, json=call, headers=sent)
                hidden = await http.post(url, json=call, headers=sent | {"origin": other})
        assert allowed.headers["access-control-allow-origin"] == page
        assert "access-control-allow-origin" not in refused.headers
        assert answer.headers["access-control-allow-origin"] == page
        assert answer.status_code != 403
        assert "access-control-allow-origin" not in hidden.headers
        assert token or hidden.status_code == 403


@pytest.fixture(scope="module")
def the_command(db) -> Iterator[tuple[str, int]]:
    """URL and process of `mm-retriever mcp --http`, with its token from the environment."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    command = [sys.executable, "-m", "mm_retriever.cli", "mcp", "--db", str(db), "--model", "tiny"]
    environment = {**ENVIRONMENT, "MM_RETRIEVER_MCP_TOKEN": TOKEN}
    with subprocess.Popen(
        [*command, "--http", "--port", str(port)], stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        try:
            while "serving MCP on" not in (line := process.stderr.readline()):
                assert line, "the server ended"
            for _ in range(100):
                with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                    break
                time.sleep(0.1)
            yield f"http://127.0.0.1:{port}/mcp", process.pid
        finally:
            process.terminate()


@pytest.mark.slow
async def test_the_command_serves_http(the_command):
    url, _ = the_command
    async with over_http(url, Authorization=f"Bearer {TOKEN}") as client:
        assert len((await client.list_tools()).tools) == 3


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells the height of a process's memory")
async def test_eight_clients_with_images_of_25_megapixels_take_no_gigabytes(the_command, tried):
    """A file of a few kilobytes is 100 MB of pixels; together they took 8.5 GB, half of which was kept."""
    data = io.BytesIO()
    Image.new("RGBA", (5000, 5000), (200, 30, 30, 128)).save(data, "PNG")
    uri = "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()

    async def ask(url: str) -> None:
        async with over_http(url, Authorization=f"Bearer {TOKEN}") as client:
            for _ in range(2):
                found = await client.call_tool("search_images", {"text": "mug", "image": uri, "top_k": 2})
                assert not found.is_error, found.content[0].text
                tried["large images sent by MCP clients"] += 1

    url, pid = the_command

    def held(what: str) -> int:
        lines = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        return int(lines[what].split()[0]) // 1024

    await ask(url)
    before = held("VmRSS")
    Path(f"/proc/{pid}/clear_refs").write_text("5")  # the height is what is held now
    async with anyio.create_task_group() as clients:
        for _ in range(8):
            clients.start_soon(ask, url)
    assert held("VmHWM") - before < 1_300
    await anyio.sleep(3)  # what is given back goes back a second later
    assert held("VmRSS") - before < 300
