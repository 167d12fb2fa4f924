"""What tests of the MCP server share: the environment of a subprocess, and a client that uses every tool."""

from __future__ import annotations

import base64
import io
import json
import os
from pathlib import Path

import pytest

pytest.importorskip("mcp.server", reason='needs the extra "mcp"')
from mcp.client.client import Client
from mcp.shared.exceptions import MCPError
from PIL import Image

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {
    **os.environ,
    "HF_HUB_OFFLINE": "1",
    "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "integrations")]),
}


def opened(content) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(content.data)))


async def assert_every_tool_works(client: Client, leopard: Path, *, remembers: bool) -> None:
    """A whole session: every tool is listed and called, a resource is read, an image opens, errors are text."""
    tools = {tool.name: tool for tool in (await client.list_tools()).tools}
    assert list(tools) == ["search_images", "find_similar", "describe_image"]
    for tool in tools.values():
        assert tool.annotations.read_only_hint
        assert not any(line.startswith(" ") for line in tool.description.splitlines() if not line.startswith("    "))
    filters = tools["search_images"].input_schema["properties"]["filters"]
    assert filters["anyOf"][0]["items"]["required"] == ["key"]

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
    assert found.structured_content is None  # many clients that read it leave out the images beside it
    first = found.content[1].text
    assert first.startswith('result 1: "phone case" | id "')
    assert '"file_name": "natural leopard.jpg"' in first
    id_ = json.loads(first.split(" | id ")[1].split(" | ")[0])

    named = "result 1" if remembers else id_
    similar = await client.call_tool("find_similar", {"result": named, "change": "in red", "top_k": 1})
    assert '"file_name": "red leopard.jpg"' in similar.content[1].text
    described = await client.call_tool("describe_image", {"image": id_})
    assert [block.type for block in described.content] == ["text", "image"]
    assert id_ in described.content[0].text

    templates = (await client.list_resource_templates()).resource_templates
    assert [one.uri_template for one in templates] == ["image://indexed/{node_id}", "image://view/{node_id}"]
    link = found.content[3]
    (original,) = (await client.read_resource(link.uri)).contents
    assert original.mime_type == link.mime_type == "image/jpeg"
    assert len(base64.b64decode(original.blob)) == link.size
    assert Image.open(io.BytesIO(base64.b64decode(original.blob))).size == (160, 160)
    (view,) = (await client.read_resource(link.uri.replace("indexed", "view"))).contents
    assert Image.open(io.BytesIO(base64.b64decode(view.blob))).size == (160, 160)

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
