"""A LlamaIndex agent that searches images: three turns, and what its model gets to see.

    python examples/03_agent_with_image_search.py

The model here follows a script, so that the example runs anywhere; put yours in its place.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llama_index.core.agent.workflow import FunctionAgent
from llama_index.core.base.llms.types import ChatMessage, ToolCallBlock
from llama_index.core.llms.mock import MockFunctionCallingLLM
from llama_index.core.memory import ChatMemoryBuffer

from mm_retriever import VisualizedBGEEmbedding, ingest_images, open_store
from mm_retriever.demo.catalogue import draw_product, draw_theme
from mm_retriever.search_tools import ImageSearch, SearchLimits
from mm_retriever.tools import ImageSearchToolSpec

TURNS = {
    "find phone cases like photo.png": ("search_images", {"text": "phone case with this", "image": "photo.png"}),
    "the first one, but red": ("find_similar", {"result": "result 1", "change": "in red"}),
    "describe it": ("describe_image", {"image": "result 1"}),
}


async def talk(folder: Path) -> None:
    embed_model = VisualizedBGEEmbedding("tiny")
    with open_store(folder / "products.db", embed_model) as store:
        ingest_images(folder / "products", store, embed_model, show_progress=False)

        search = ImageSearch(store, embed_model, limits=SearchLimits(top_k=3))  # one for all
        tools = ImageSearchToolSpec(search)  # one for each conversation
        tools.attach("photo.png", folder / "photo.png")
        llm = MockFunctionCallingLLM(response_generator=follow_the_script)  # yours: any that calls functions
        agent = FunctionAgent(tools=tools.to_tool_list(), llm=llm)
        # a model that only writes text: ReActAgent(..., formatter=tools.react_formatter())

        memory = ChatMemoryBuffer.from_defaults(llm=llm)
        for turn in TURNS:
            print(f"\nuser:  {turn}")
            print(f"agent: {await agent.run(turn, memory=memory)}")


def follow_the_script(messages: Sequence[ChatMessage], **kwargs: Any) -> ChatMessage:
    """Calls the tool of the turn; then says what came back, in text and in images."""
    last = messages[-1]
    if last.role == "user":
        name, arguments = TURNS[str(last.content)]
        call = ToolCallBlock(tool_call_id=name, tool_name=name, tool_kwargs=arguments)
        return ChatMessage(role="assistant", blocks=[call])
    images = sum(block.block_type == "image" for block in last.blocks)
    return ChatMessage(role="assistant", content=f"I see {images} thumbnails, and read:\n{last.content}")


def main() -> None:
    folder = Path(tempfile.mkdtemp())
    (folder / "products").mkdir()
    for kind in ("phone case", "mug", "cap"):
        for pattern, colour in (("leopard", "natural"), ("leopard", "red"), ("stars", "blue")):
            draw_product(kind, pattern, colour, seed=1).save(folder / "products" / f"{colour} {pattern} {kind}.png")
    draw_theme("leopard", "natural", seed=1).save(folder / "photo.png")
    asyncio.run(talk(folder))


if __name__ == "__main__":
    main()
