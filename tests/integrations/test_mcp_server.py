"""The MCP server through the official client: in memory, over stdio as a subprocess, and as a command."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import signal
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import anyio
import numpy as np
import pytest
from PIL import Image

pytest.importorskip("mcp.server", reason='needs the extra "mcp"')
from mcp.client.client import Client
from mcp.client.stdio import StdioServerParameters
from mcp.shared.message import SessionMessage
from mcp_server_mm_retriever import create_server, image_search
from mcp_server_mm_retriever.lines import pass_on
from mcp_server_mm_retriever.server import SEARCHES_AT_ONCE
from mcp_types import jsonrpc_message_adapter
from pydantic import ValidationError

from mm_retriever.cli import main
from mm_retriever.errors import QueryError
from mm_retriever.ingest import ingest_images
from mm_retriever.search_tools import ImageSearch, SearchLimits
from mm_retriever.store import open_store
from tests.support.drawn_store import draw_leopard
from tests.support.mcp import ENVIRONMENT, assert_every_tool_works


@pytest.mark.parametrize("mode", ["auto", "legacy"])
async def test_a_session_in_memory(search, leopard, mode):
    async with Client(create_server(search), mode=mode) as client:
        await assert_every_tool_works(client, leopard, remembers=True)


async def test_a_path_inside_the_roots_can_be_named(search, leopard):
    async with Client(create_server(search)) as client:
        found = await client.call_tool("search_images", {"image": str(leopard), "top_k": 1})
    assert not found.is_error


@pytest.mark.slow
async def test_a_session_over_stdio_as_a_subprocess(db, leopard):
    """`mm-retriever mcp`, as a client's configuration starts it."""
    arguments = ["-m", "mm_retriever.cli", "mcp", "--db", str(db), "--model", "tiny", "--root", str(db.parent)]
    server = StdioServerParameters(command=sys.executable, args=arguments, env=ENVIRONMENT)
    async with Client(server) as client:
        await assert_every_tool_works(client, leopard, remembers=True)


async def assert_the_vision_model_ranks_and_describes(client: Client, leopard: Path) -> None:
    """What only the small Phi-3 Vision adds: a reason at the first result, and a description of an image."""
    found = await client.call_tool("search_images", {"text": "phone case with this", "image": str(leopard), "top_k": 3})
    assert not found.is_error
    first, *others = found.structured_content["results"]
    assert (first["label"], first["metadata"]["file_name"]) == ("phone case", "natural leopard.jpg")
    assert "phone case with leopard" in first["reason"]
    assert first["reason"] in found.content[1].text
    assert not any("reason" in other for other in others)
    scores = [image["score"] for image in (first, *others)]
    assert scores == sorted(scores, reverse=True)
    assert 0 <= scores[-1] <= scores[0] <= sum(scores) <= 1  # shares of a reranker, not similarities
    described = await client.call_tool("describe_image", {"image": first["id"], "question": "What is it?"})
    assert "phone case with leopard" in described.structured_content["description"]
    assert described.structured_content["description"] in described.content[0].text


async def test_a_vision_model_ranks_and_describes(search, folder, leopard):
    """`image_search(vision_model="tiny")`: one model, shared by reranker and describer."""
    seeing = image_search(search._store, search._embed_model, vision_model="tiny", roots=[folder], device="cpu")
    async with Client(create_server(seeing, structured=True)) as client:
        await assert_the_vision_model_ranks_and_describes(client, leopard)
        refused = await client.call_tool("describe_image", {"image": "/etc/hostname.png"})
    assert refused.is_error


@pytest.mark.slow
async def test_the_command_serves_a_vision_model(db):
    """`mm-retriever mcp --vision-model tiny` over stdio."""
    leopard = draw_leopard(db.parent / "leopard.png")
    options = ["--db", str(db), "--model", "tiny", "--vision-model", "tiny", "--root", str(db.parent), "--structured"]
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


def test_images_of_a_shared_server_are_read_only_inside_given_folders(search, tmp_path):
    """Who else can write to a server could name any file there."""

    class Shared:
        uri = "http://milvus:19530"

        def __getattr__(self, name):
            return getattr(search._store, name)

    assert image_search(Shared(), search._embed_model).stored_policy.roots == ()
    assert image_search(Shared(), search._embed_model, roots=[tmp_path]).stored_policy.roots == (tmp_path,)
    assert image_search(search._store, search._embed_model).stored_policy.roots is None


async def test_without_images_answers_are_json_with_a_schema(search):
    """For models that take text alone; with images, JSON beside them only where it is asked for."""
    texts = ImageSearch(search._store, search._embed_model, limits=SearchLimits(thumbnails=0))
    async with Client(create_server(texts)) as client:
        tools = {tool.name: tool for tool in (await client.list_tools()).tools}
        found = await client.call_tool("search_images", {"text": "mug", "top_k": 2})
    assert {block.type for block in found.content} == {"text"}
    assert len(found.structured_content["results"]) == 2
    assert "results" in tools["search_images"].output_schema["properties"]
    assert "description" in tools["describe_image"].output_schema["properties"]
    async with Client(create_server(search, structured=True)) as client:
        both = await client.call_tool("search_images", {"text": "mug", "top_k": 1})
    assert {block.type for block in both.content} == {"text", "image", "resource_link"}
    assert both.structured_content["results"][0]["file_type"] == "image/jpeg"


@pytest.mark.parametrize(
    ("tool", "arguments"),
    [
        ("search_images", {"text": "mug", "filters": {"width": 160}}),
        ("search_images", {"text": "mug", "filters": '[{"key": "width", "operator": ">", "value": 1}]'}),
        ("search_images", {"text": "mug", "filters": "", "top_k": ""}),
        ("search_images", {"text": "mug", "filters": [{"key": "width", "value": "160"}], "top_k": "3"}),
        ("find_similar", {"result": 2, "top_k": 1.0}),
        ("describe_image", {"image": 1}),
        ("search_images", {"image": 1, "text": "in red"}),
    ],
)
async def test_what_models_write_in_place_of_the_schema_is_understood(search, tool, arguments):
    async with Client(create_server(search)) as client:
        await client.call_tool("search_images", {"text": "mug"})
        answer = await client.call_tool(tool, arguments)
    assert not answer.is_error, answer.content[0].text
    assert len(answer.content) > 1


@pytest.mark.parametrize("wrong", [0, False, [], {}, ["result 1"]])
async def test_an_image_that_is_none_is_not_passed_over(search, wrong):
    """Results for the words alone would look like results for both."""
    async with Client(create_server(search)) as client:
        await client.call_tool("search_images", {"text": "mug"})
        answer = await client.call_tool("search_images", {"text": "in red", "image": wrong})
    assert answer.is_error
    assert "image" in answer.content[0].text


@pytest.mark.parametrize("wrong", ["filter", "Filters", "topK", "top-k", "top_n", "images"])
async def test_an_argument_that_is_misspelt_is_not_passed_over(search, wrong):
    """Results without the filter would look like results with it."""
    async with Client(create_server(search)) as client:
        answer = await client.call_tool("search_images", {"text": "mug", wrong: {"label": "umbrella"}})
    assert answer.is_error
    assert f"no argument '{wrong}'; did you mean" in answer.content[0].text


async def test_arguments_of_another_type_are_named_on_one_line(search):
    async with Client(create_server(search)) as client:
        answer = await client.call_tool("search_images", {"text": ["mug"]})
    assert answer.is_error
    assert answer.content[0].text == "text: Input should be a valid string"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('{"jsonrpc": "2.0", "id": 1, "method": "ping"}', (1, "ping")),
        (r'{"jsonrpc": "2.0", "id": "a\ud800", "method": "ping"}', ("a?", "ping")),
        ("no JSON", (None, -32700)),
        ('[{"jsonrpc": "2.0", "id": 1, "method": "ping"}]', (None, -32600)),
        ('{"jsonrpc": "2.0", "id": 7}', (7, -32600)),
        ('{"jsonrpc": "2.0", "id": 7, "method": "ping", "params": [1]}', (7, -32600)),
        ('{"jsonrpc": "2.0", "method": "notifications/x", "params": 5}', None),
        ('{"id": 5, "result": {}}', None),
        ("", None),
    ],
)
async def test_lines_that_are_no_message_are_answered(line, expected):
    """The SDK passes them over, so that clients waited for ever, also for an answer to half a surrogate pair."""
    answers: list[SessionMessage] = []

    async def lines():
        try:
            yield SessionMessage(jsonrpc_message_adapter.validate_json(line, by_name=False))
        except ValidationError as error:
            yield error

    async def answer(message: SessionMessage) -> None:
        answers.append(message)

    send, receive = anyio.create_memory_object_stream(1)
    async with receive:
        await pass_on(lines(), send, answer)
        passed = [(item.message.id, item.message.method) async for item in receive]
    assert passed + [(one.message.id, one.message.error.code) for one in answers] == ([expected] if expected else [])


async def test_arguments_that_a_client_adds_to_every_call_are_passed_over(search):
    """n8n sends some of its own."""
    added = {"sessionId": "1", "action": "sendMessage", "chatInput": "mugs", "toolCallId": "2", "tool": "search_images"}
    async with Client(create_server(search)) as client:
        answer = await client.call_tool("search_images", {"text": "mug"} | added)
    assert not answer.is_error


async def test_a_file_inside_the_roots_can_be_named_by_its_url(tmp_path, store, embed_model):
    leopard = draw_leopard(tmp_path / "a leopard.png")
    async with Client(create_server(image_search(store, embed_model, roots=[tmp_path]))) as client:
        found = await client.call_tool("search_images", {"image": leopard.as_uri(), "top_k": 1})
        outside = await client.call_tool("search_images", {"image": "file:///etc/hostname.png"})
    assert not found.is_error, found.content[0].text
    assert outside.is_error


async def test_a_large_image_has_a_view_that_fits_into_a_message(tmp_path, search):
    """Hosts refuse more than 1 MB; noise is what compresses worst."""
    noise = np.random.default_rng(0).integers(0, 255, (1600, 1600, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "big.jpg", quality=92)
    with open_store(tmp_path / "big.db", search._embed_model) as store:
        ingest_images(tmp_path, store, search._embed_model, show_progress=False)
        async with Client(create_server(image_search(store, search._embed_model))) as client:
            link = (await client.call_tool("search_images", {"text": "mug"})).content[3]
            (view,) = (await client.read_resource(link.uri.replace("indexed", "view"))).contents
            (original,) = (await client.read_resource(link.uri)).contents
    assert (link.mime_type, link.size) == ("image/jpeg", (tmp_path / "big.jpg").stat().st_size)
    assert len(original.blob) > 2**20 > len(view.blob)
    assert max(Image.open(io.BytesIO(base64.b64decode(view.blob))).size) > 500


async def test_a_call_that_is_given_up_frees_its_place_at_once(search):
    """As many as may run at once are stuck in a slow step; when they are cancelled, the next is answered meanwhile."""
    stuck, go_on = threading.Semaphore(0), threading.Event()

    class Slow(ImageSearch):
        def describe(self, *arguments, **options):
            stuck.release()
            go_on.wait(60)
            raise QueryError("nobody waits for this")

    async with Client(create_server(Slow(search._store, search._embed_model))) as client:
        async with anyio.create_task_group() as calls:
            for _ in range(SEARCHES_AT_ONCE):
                calls.start_soon(client.call_tool, "describe_image", {"image": "result 1"})
            for _ in range(SEARCHES_AT_ONCE):
                await anyio.to_thread.run_sync(partial(stuck.acquire, timeout=30))
            calls.cancel_scope.cancel()
        with anyio.fail_after(30):
            found = await client.call_tool("search_images", {"text": "mug"})
        go_on.set()
    assert not found.is_error


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
