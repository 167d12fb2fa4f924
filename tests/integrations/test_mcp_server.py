"""The MCP server through the official client: in memory, over stdio as a subprocess, and over HTTP."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path

import pytest

pytest.importorskip("mcp.server", reason='needs the extra "mcp"')

import httpx2
import psutil
import uvicorn
from mcp.client.client import Client
from mcp.client.stdio import StdioServerParameters
from mcp.client.streamable_http import streamable_http_client
from mcp.shared.exceptions import MCPError
from mcp_server_mm_retriever import ImageSearchServer, check_access, create_server, http_app, image_search
from mcp_server_mm_retriever.http import Admission, BoundedProtocol
from PIL import Image

from mm_retriever.cli import main
from mm_retriever.embedding import VisualizedBGEEmbedding
from mm_retriever.errors import QueryError
from mm_retriever.images import ImagePolicy
from mm_retriever.search_tools import ImageSearch, SearchLimits
from mm_retriever.store import open_store
from tests.support.drawn_store import draw_leopard, draw_pictures, drawn_store

ROOT = Path(__file__).parents[2]
TOKEN = "a-token-that-nobody-guesses"
HEADER = b"POST /mcp HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
BODY_STARTS = b"Content-Length: 9\r\n\r\n{"
ENVIRONMENT = {
    **os.environ,
    "HF_HUB_OFFLINE": "1",
    "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "integrations")]),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("mcp")


@pytest.fixture(scope="module")
def search(folder) -> Iterator[ImageSearch]:
    embed_model = VisualizedBGEEmbedding("tiny", device="cpu")
    store = drawn_store(folder, embed_model)
    yield image_search(store, embed_model, roots=[folder])
    store.close()


@pytest.fixture(scope="module")
def leopard(folder) -> Path:
    return draw_leopard(folder / "leopard.png")


@pytest.fixture(scope="module")
def db(tmp_path_factory) -> Path:
    """A store in a file that this process does not hold open."""
    folder = tmp_path_factory.mktemp("served")
    with pytest.raises(SystemExit):
        main(["index", str(draw_pictures(folder / "pictures")), "--db", str(folder / "drawn.db"), "--model", "tiny"])
    return folder / "drawn.db"


def opened(content) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(content.data)))


async def assert_every_tool_works(client: Client, leopard: Path, *, remembers: bool) -> None:
    """What the issue asks of a session: list and call every tool, read a resource, a picture opens, errors are said."""
    tools = {tool.name: tool for tool in (await client.list_tools()).tools}
    assert list(tools) == ["search_images", "find_similar", "describe_image"]
    assert all(tool.description and tool.annotations.read_only_hint for tool in tools.values())

    steps: list[tuple[float, float | None, str | None]] = []

    async def progress(done: float, total: float | None, message: str | None) -> None:
        steps.append((done, total, message))

    uri = "data:image/png;base64," + base64.b64encode(leopard.read_bytes()).decode()
    found = await client.call_tool(
        "search_images", {"text": "phone case with this", "image": uri, "top_k": 2}, progress_callback=progress
    )
    assert not found.is_error
    assert [block.type for block in found.content] == ["text", *["text", "image", "resource_link"] * 2]
    assert opened(found.content[2]).size == (160, 160)
    assert [done for done, _, _ in steps] == [0, 1, 2, 3]
    first = found.structured_content["results"][0]
    assert (first["label"], first["metadata"]["file_name"]) == ("phone case", "natural leopard.jpg")

    named = "result 1" if remembers else first["id"]
    similar = await client.call_tool("find_similar", {"result": named, "change": "in red", "top_k": 1})
    assert similar.structured_content["results"][0]["metadata"]["file_name"] == "red leopard.jpg"
    described = await client.call_tool("describe_image", {"image": first["id"]})
    assert [block.type for block in described.content] == ["text", "image"]
    assert first["id"] in described.content[0].text

    (template,) = (await client.list_resource_templates()).resource_templates
    assert template.uri_template == "image://indexed/{node_id}"
    (original,) = (await client.read_resource(found.content[3].uri)).contents
    assert original.mime_type == "image/jpeg"
    assert Image.open(io.BytesIO(base64.b64decode(original.blob))).size == (160, 160)

    for tool, arguments, message in (
        ("search_images", {}, "nothing to search for"),
        ("search_images", {"text": 5}, "valid string"),
        ("search_images", {"text": "x", "filters": [{"key": "a;b", "value": 1}]}, "is not a key"),
        ("search_images", {"image": "/etc/passwd"}, "no image is known"),
        ("search_images", {"image": "/etc/hostname.png"}, "cannot load"),
        ("search_images", {"image": "http://127.0.0.1/a.png"}, "URLs is off"),
        ("find_similar", {}, "result"),
        ("describe_image", {"image": "nothing"}, "no image is known"),
    ):
        refused = await client.call_tool(tool, arguments)
        assert refused.is_error
        assert message in refused.content[0].text
    for unknown in ("image://indexed/nobody", "image://indexed/..%2F..%2Fetc%2Fpasswd", "file:///etc/passwd"):
        with pytest.raises(MCPError):
            await client.read_resource(unknown)


@pytest.mark.parametrize("mode", ["auto", "legacy"])
async def test_a_session_in_memory(search, leopard, mode):
    async with Client(create_server(search), mode=mode) as client:
        await assert_every_tool_works(client, leopard, remembers=True)


async def test_a_path_inside_the_roots_can_be_named(search, leopard):
    async with Client(create_server(search)) as client:
        found = await client.call_tool("search_images", {"image": str(leopard), "top_k": 1})
    assert not found.is_error


async def test_a_session_over_stdio_as_a_subprocess(db, leopard):
    """`mm-retriever mcp`, as a client's configuration starts it."""
    arguments = ["-m", "mm_retriever.cli", "mcp", "--db", str(db), "--model", "tiny", "--root", str(db.parent)]
    server = StdioServerParameters(command=sys.executable, args=arguments, env=ENVIRONMENT)
    async with Client(server) as client:
        await assert_every_tool_works(client, leopard, remembers=True)


async def assert_the_vision_model_ranks_and_describes(client: Client, leopard: Path) -> None:
    """What only the small Phi-3 Vision adds: a reason at the first result, and a description of a picture."""
    found = await client.call_tool("search_images", {"text": "phone case with this", "image": str(leopard), "top_k": 3})
    assert not found.is_error
    first, *others = found.structured_content["results"]
    assert (first["label"], first["metadata"]["file_name"]) == ("phone case", "natural leopard.jpg")
    assert "phone case with leopard" in first["reason"]
    assert first["reason"] in found.content[1].text
    assert not any("reason" in other for other in others)
    scores = [picture["score"] for picture in (first, *others)]
    assert scores == sorted(scores, reverse=True)
    assert 0 <= scores[-1] <= scores[0] <= sum(scores) <= 1  # shares of a reranker, not similarities
    described = await client.call_tool("describe_image", {"image": first["id"], "question": "What is it?"})
    assert "phone case with leopard" in described.structured_content["description"]
    assert described.structured_content["description"] in described.content[0].text


async def test_a_vision_model_ranks_and_describes(search, folder, leopard):
    """`image_search(vision_model="tiny")`: one model, shared by reranker and describer."""
    seeing = image_search(search._store, search._embed_model, vision_model="tiny", roots=[folder], device="cpu")
    async with Client(create_server(seeing)) as client:
        await assert_the_vision_model_ranks_and_describes(client, leopard)
        refused = await client.call_tool("describe_image", {"image": "/etc/hostname.png"})
    assert refused.is_error


@pytest.mark.slow
async def test_the_command_serves_a_vision_model(db):
    """`mm-retriever mcp --vision-model tiny` over stdio."""
    leopard = draw_leopard(db.parent / "leopard.png")
    options = ["--db", str(db), "--model", "tiny", "--vision-model", "tiny", "--root", str(db.parent)]
    server = StdioServerParameters(
        command=sys.executable, args=["-m", "mm_retriever.cli", "mcp", *options], env=ENVIRONMENT
    )
    async with Client(server) as client:
        await assert_the_vision_model_ranks_and_describes(client, leopard)


@pytest.mark.slow
def test_nothing_but_the_protocol_is_on_stdout(db):
    """Whatever loading the models and a failing search print: every line is a message, words are on stderr."""
    request = {
        "jsonrpc": "2.0",
        "id": 1,
        "method": "initialize",
        "params": {"protocolVersion": "2025-06-18", "capabilities": {}, "clientInfo": {"name": "t", "version": "1"}},
    }
    call = {"name": "search_images", "arguments": {"text": "mug", "filters": [{"key": "a;b", "value": 1}]}}
    lines = [
        request,
        {"jsonrpc": "2.0", "method": "notifications/initialized"},
        {"jsonrpc": "2.0", "id": 2, "method": "tools/call", "params": call},
        "no JSON",
    ]
    with subprocess.Popen(
        [sys.executable, "-m", "mm_retriever.cli", "mcp", "--db", str(db), "--model", "tiny"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    ) as process:
        for line in lines:
            process.stdin.write((line if isinstance(line, str) else json.dumps(line)) + "\n")
        process.stdin.flush()
        answers = []
        while not answers or answers[-1].get("id") != 2:
            answers.append(json.loads(process.stdout.readline()))
        process.stdin.close()
        rest = process.stdout.read()
        assert process.wait(60) == 0
    assert all(json.loads(line)["jsonrpc"] == "2.0" for line in rest.splitlines())
    assert answers[-1]["result"]["isError"]


# ---------------------------------------------------------------------------------------------- HTTP


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
                answer = await http.post(url, content=body, headers={"content-type": "application/json"})
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


@pytest.mark.parametrize("start", [HEADER, b"", HEADER + BODY_STARTS], ids=["header", "nothing", "body"])
async def test_3000_half_open_connections_change_nothing_for_others(search, start):
    """Whoever has no token can open connections and leave them; the oldest of them give way."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 8_000:
        pytest.skip("this system lets no process open 8,000 files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 8_000), hard))
    try:
        with serving(http_app(search, token=TOKEN)) as url, half_open(url, 3_000, start):
            port = int(url.split(":")[2].split("/")[0])
            deadline = time.monotonic() + 20  # a busy machine accepts faster than it lets go
            while (open_now := connections_to(port)) > BoundedProtocol.limit and time.monotonic() < deadline:
                time.sleep(0.05)
            assert open_now <= BoundedProtocol.limit
            async with over_http(url, Authorization=f"Bearer {TOKEN}") as client:
                assert not (await client.call_tool("search_images", {"text": "mug", "top_k": 1})).is_error
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


@pytest.mark.slow
async def test_the_command_serves_http(db):
    """`mm-retriever mcp --http`, with its token from the environment."""
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
            url = f"http://127.0.0.1:{port}/mcp"
            for _ in range(100):
                try:
                    async with over_http(url, Authorization=f"Bearer {TOKEN}") as client:
                        assert len((await client.list_tools()).tools) == 3
                    break
                except Exception:
                    time.sleep(0.1)
            else:
                pytest.fail("no answer")
        finally:
            process.terminate()


# ---------------------------------------------------------------------------------------------- the command


def test_the_command_refuses_what_cannot_be_served(capfd, tmp_path):
    """One line and exit code 2, before any model is loaded."""
    for arguments, message in (
        (["--http", "--host", "0.0.0.0"], "needs a token"),
        (["--db", str(tmp_path / "none.db"), "--model", "tiny"], "there is no store"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(["mcp", *arguments])
        out, err = capfd.readouterr()
        assert stopped.value.code == 2
        assert out == ""
        assert message in err


def test_without_the_extra_the_error_names_it():
    """In a process where mcp cannot be imported."""
    code = "import sys; sys.modules['mcp'] = None; from mm_retriever.cli import main; main(['mcp'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 2
    assert 'pip install "mm-retriever[mcp]"' in done.stderr


def test_pictures_of_a_shared_server_are_read_only_inside_given_folders(search, tmp_path):
    """Who else can write to a server could name any file there."""

    class Shared:
        uri = "http://milvus:19530"

        def __getattr__(self, name):
            return getattr(search._store, name)

    assert image_search(Shared(), search._embed_model).stored_policy.roots == ()
    assert image_search(Shared(), search._embed_model, roots=[tmp_path]).stored_policy.roots == (tmp_path,)
    assert image_search(search._store, search._embed_model).stored_policy.roots is None


async def test_an_id_with_any_letters_is_a_resource(tmp_path, search):
    """Ids that someone chose: slashes, percent signs, spaces."""
    from llama_index.core.schema import ImageNode

    embed_model = search._embed_model
    (tmp_path / "x.png").write_bytes(draw_leopard(tmp_path / "y.png").read_bytes())
    strange = "a/b c%2F?#é.."
    with open_store(tmp_path / "ids.db", embed_model) as store:
        vector = embed_model.get_text_embedding("x")
        digest = hashlib.sha256((tmp_path / "x.png").read_bytes()).hexdigest()
        image = {"image_path": str(tmp_path / "x.png"), "metadata": {"digest": digest}}
        store.add([ImageNode(id_=strange, **image, embedding=vector)])
        server = create_server(ImageSearch(store, embed_model, limits=SearchLimits(thumbnail_side=32)))
        async with Client(server) as client:
            found = await client.call_tool("search_images", {"text": "x"})
            (original,) = (await client.read_resource(found.content[3].uri)).contents
    assert original.mime_type == "image/png"
    assert base64.b64decode(original.blob) == (tmp_path / "x.png").read_bytes()


@pytest.mark.slow
def test_ctrl_c_ends_a_server_on_stdio_at_once(db):
    """Its reading thread would wait for one more line of a client that sends none."""
    command = [sys.executable, "-m", "mm_retriever.cli", "mcp", "--db", str(db), "--model", "tiny"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT
    ) as process:
        hello = {"protocolVersion": "2025-06-18", "capabilities": {}, "clientInfo": {"name": "t", "version": "1"}}
        process.stdin.write(json.dumps({"jsonrpc": "2.0", "id": 1, "method": "initialize", "params": hello}) + "\n")
        process.stdin.flush()
        assert json.loads(process.stdout.readline())["id"] == 1
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130
        assert "Traceback" not in process.stderr.read()
