"""Image search as an MCP server: started as a program of its own, asked by the official client.

    pip install "mm-retriever[mcp]"
    python examples/05_mcp_client.py

In a desktop client's configuration the same server is: {"command": "mm-retriever", "args": ["mcp", "--db", "..."]}.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
from pathlib import Path

from mcp.client.client import Client
from mcp.client.stdio import StdioServerParameters

from mm_retriever import VisualizedBGEEmbedding, ingest_images, open_store
from mm_retriever.demo.catalogue import draw_product, draw_theme


async def ask(folder: Path) -> None:
    arguments = ["mcp", "--db", str(folder / "products.db"), "--model", "tiny", "--root", str(folder)]
    server = StdioServerParameters(command=sys.executable, args=["-m", "mm_retriever.cli", *arguments])
    async with Client(server) as client:
        print("tools:", ", ".join(tool.name for tool in (await client.list_tools()).tools))
        question = {"text": "phone case with this", "image": str(folder / "leopard.png"), "top_k": 2}
        answer = await client.call_tool("search_images", question)
        for content in answer.content:
            print(content.text if content.type == "text" else f"<{content.type}>")
        original = next(content.uri for content in answer.content if content.type == "resource_link")
        (image,) = (await client.read_resource(original)).contents
        print(f"the original of the first: {image.mime_type}, {len(image.blob)} characters of base64")


def main() -> None:
    folder = Path(tempfile.mkdtemp())
    (folder / "products").mkdir()
    for kind in ("phone case", "mug", "cap"):
        for pattern, colour in (("leopard", "natural"), ("stars", "blue")):
            draw_product(kind, pattern, colour, seed=1).save(folder / "products" / f"{pattern} {kind}.png")
    draw_theme("leopard", "natural", seed=1).save(folder / "leopard.png")

    embed_model = VisualizedBGEEmbedding("tiny")
    with open_store(folder / "products.db", embed_model) as store:  # a Milvus Lite file serves one process at a time
        ingest_images(folder / "products", store, embed_model, show_progress=False)
    asyncio.run(ask(folder))


if __name__ == "__main__":
    main()
