"""Every form of a query image, every way to ask with it, and a reranker that sees every pixel.

Truth: the order that the file's path gives. A reranker whose order depends on every pixel of the query image
(`PixelOrder`) tells whether the pixels arrived unchanged; the models of the package are the bundled small ones.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import random
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llama_index.core.base.llms.types import ChatMessage, ImageBlock
from llama_index.core.llms.mock import MockFunctionCallingLLM
from llama_index.core.schema import NodeWithScore
from PIL import Image

from mm_retriever.embedding import VisualizedBGEEmbedding
from mm_retriever.engine import image_query_engine
from mm_retriever.images import ImagePolicy, load_image, pixel_digest, portable_image
from mm_retriever.rerank import Phi3VisionRerank, VisionLLMRerank
from mm_retriever.rerank.reranker import Meter, Query, Reranker
from mm_retriever.rerank.scorer import Candidate, Ranking
from mm_retriever.retriever import ComposedRetriever
from mm_retriever.search_tools import ImageSearch
from mm_retriever.store import ImageStore
from mm_retriever.tools import ImageSearchToolSpec
from tests.support.drawn_store import ScriptedLLM, images_of, says

TEXT = "mug with this"


TOP_K = 6


class PixelOrder(Reranker):
    """Puts candidates in an order that is another one for every other query image."""

    model_name: str = "pixel order"
    top_n: int = TOP_K

    def _rank(self, query: Query, candidates: list[Candidate], meter: Meter) -> Ranking:
        assert query.image is not None
        order = list(range(len(candidates)))
        random.Random(pixel_digest(query.image) + query.text).shuffle(order)
        return Ranking(order, [float(-order.index(place)) for place in range(len(order))])


@dataclass(frozen=True)
class World:
    """A store of drawn products, what searches it, and the file in it that is the query."""

    store: ImageStore
    model: VisualizedBGEEmbedding
    path: Path
    vision: Phi3VisionRerank


UPLOADS: list[Any] = []


def upload(data: bytes) -> Any:
    """What web frameworks give: a temporary file that was read or written to its end."""
    file = tempfile.SpooledTemporaryFile(max_size=2**20)  # noqa: SIM115 - closed with the world
    file.write(data)
    UPLOADS.append(file)
    return file


def starlette_upload(data: bytes) -> Any:
    """The object itself, of which `read` must be awaited."""
    datastructures = pytest.importorskip("starlette.datastructures")
    return datastructures.UploadFile(upload(data), filename="photo.jpg")


def data_uri(data: bytes) -> str:
    return "data:image/jpeg;base64," + base64.b64encode(data).decode()


FORMS: dict[str, Callable[[Path], Any]] = {
    "path": str,
    "Path": Path,
    "bytes": Path.read_bytes,
    "memoryview": lambda path: memoryview(path.read_bytes()),
    "BytesIO": lambda path: io.BytesIO(path.read_bytes()),
    "PIL": Image.open,
    "data URI": lambda path: data_uri(path.read_bytes()),
    "base64": lambda path: base64.b64encode(path.read_bytes()).decode(),
    "upload": lambda path: upload(path.read_bytes()),
    "UploadFile": lambda path: starlette_upload(path.read_bytes()),
    "numpy": lambda path: np.asarray(load_image(path)),
}


SIMILAR = ("Path", "memoryview", "BytesIO", "base64", "UploadFile")  # to another form, where a model looks at it


def ids(nodes: Sequence[NodeWithScore]) -> list[str]:
    return [node.node.node_id for node in nodes]


def retrieved(world: World, image: Any) -> list[NodeWithScore]:
    return ComposedRetriever(world.store, world.model, top_k=TOP_K).retrieve(world.model.get_query_bundle(TEXT, image))


def others(world: World, image: Any) -> list[NodeWithScore]:
    retriever = ComposedRetriever(world.store, world.model, top_k=TOP_K, exclude_query_image=True)
    return retriever.retrieve(world.model.get_query_bundle(TEXT, image))


def reranked(reranker: Reranker, count: int, world: World, image: Any) -> list[str]:
    bundle = world.model.get_query_bundle(TEXT, image)
    nodes = ComposedRetriever(world.store, world.model, top_k=count).retrieve(bundle)
    return ids(reranker.postprocess_nodes(nodes, query_bundle=bundle))


def likelihood(world: World, image: Any) -> list[str]:
    return reranked(world.vision, 3, world, image)


def sheet(world: World, image: Any) -> list[str]:
    return reranked(world.vision.model_copy(update={"mode": "sheet"}), 3, world, image)


def remote(world: World, image: Any) -> list[str]:
    """An LLM of which the answer depends on every byte of the query image that it was sent."""

    def answer(messages: Sequence[ChatMessage], **_: Any) -> ChatMessage:
        first = next(block for block in messages[-1].blocks if isinstance(block, ImageBlock))
        order = list(range(1, TOP_K + 1))
        random.Random(first.resolve_image().read()).shuffle(order)
        return says(json.dumps({"ranking": order}))

    llm = MockFunctionCallingLLM(response_generator=answer, is_chat_model=True)
    return reranked(VisionLLMRerank(llm, reasons="none"), TOP_K, world, image)


def engine(world: World, image: Any) -> list[str]:
    llm = ScriptedLLM.of(says("The first."))
    asked = image_query_engine(
        world.store, world.model, rerank=PixelOrder(), llm=llm, top_k=TOP_K, exclude_query_image=True
    )
    response = asked.query(world.model.get_query_bundle(TEXT, image))
    first = images_of(llm.asked[0])[0]
    return [*ids(response.source_nodes), pixel_digest(Image.open(first.resolve_image()))]


def tool(world: World, image: Any) -> list[str]:
    search = ImageSearch(world.store, world.model, rerank=PixelOrder())
    tools = ImageSearchToolSpec(search)
    tools.attach("photo", image)
    (searching,) = tools.to_tool_list(["search_images"])
    output = searching.call(text=TEXT, image="photo", top_k=TOP_K)
    assert not output.is_error, output.content
    return [one["id"] for one in output.raw_output["results"]]


def langchain(world: World, image: Any) -> list[str]:
    adapters = pytest.importorskip("langchain_mm_retriever")
    retriever = adapters.ComposedImageRetriever(
        store=world.store, embeddings=world.model, k=TOP_K, exclude_query_image=True
    )
    query = {"text": TEXT, "image": image}
    documents = adapters.RerankCompressor(reranker=PixelOrder()).compress_documents(retriever.invoke(query), query)
    return [document.id for document in documents]


def mcp(world: World, image: Any) -> list[str]:
    """MCP carries text: a path in an allowed folder, or a data URI."""
    pytest.importorskip("mcp.server", reason='needs the extra "mcp"')
    from mcp.client.client import Client
    from mcp_server_mm_retriever import create_server

    policy = ImagePolicy(roots=(world.path.parent,))
    search = ImageSearch(world.store, world.model, rerank=PixelOrder(), image_policy=policy)
    arguments = {"text": TEXT, "image": str(portable_image(image)), "top_k": TOP_K}

    async def ask() -> list[str]:
        async with Client(create_server(search, structured=True)) as client:
            found = await client.call_tool("search_images", arguments)
        assert not found.is_error, found.content
        return [one["id"] for one in found.structured_content["results"]]

    return asyncio.run(ask())


WAYS: dict[str, Callable[[World, Any], list[str]]] = {
    "retrieve": lambda world, image: ids(retrieved(world, image)),
    "exclude": lambda world, image: ids(others(world, image)),
    "likelihood": likelihood,
    "sheet": sheet,
    "remote": remote,
    "engine": engine,
    "agent tool": tool,
    "LangChain": langchain,
    "MCP": mcp,
}
