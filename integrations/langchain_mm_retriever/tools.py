"""`image_search_tools`: the tools of mm_retriever for LangChain's agents."""

from __future__ import annotations

from typing import Any

from langchain_core.messages.content import create_image_block, create_text_block
from langchain_core.tools import StructuredTool, ToolException
from llama_index.core.base.llms.types import ContentBlock, ImageBlock, TextBlock
from llama_index.core.tools import FunctionTool

from mm_retriever.search_tools import Conversation, ImageSearch
from mm_retriever.tools import ImageSearchToolSpec


def image_search_tools(search: ImageSearch, conversation: Conversation | None = None) -> list[StructuredTool]:
    """Return search_images, find_similar and describe_image for one conversation.

    A `ToolMessage` has a line of text for each result and its thumbnail after it, as LangChain's standard content
    blocks, and the answer as plain data in `artifact`. A mistake of the model comes back as a message with
    `status="error"` that says what to do instead.

    Args:
        search: what is asked.
        conversation: what the model may refer to, with `conversation.attach(name, image)`; by default a new one.
    """
    spec = ImageSearchToolSpec(search, conversation)
    return [_tool(tool) for tool in spec.to_tool_list()]


def _tool(tool: FunctionTool) -> StructuredTool:
    schema = tool.metadata.fn_schema
    assert schema is not None

    def call(**arguments: Any) -> tuple[list[dict[str, Any]], Any]:
        output = tool.call(**arguments)
        if output.is_error:
            raise ToolException(output.raw_output)
        return [_block(block) for block in output.blocks], output.raw_output

    return StructuredTool(
        name=tool.metadata.get_name(),
        description=tool.metadata.description,
        args_schema=schema,
        func=call,
        response_format="content_and_artifact",
        handle_tool_error=True,
        handle_validation_error=_what_is_wrong,
    )


def _what_is_wrong(error: Any) -> str:
    """What pydantic found, for a model: LangChain's own sentence names no argument."""
    return "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors()[:5])[:500]


def _block(block: ContentBlock) -> dict[str, Any]:
    if isinstance(block, ImageBlock):
        assert isinstance(block.image, bytes)  # a thumbnail, in base64
        return dict(create_image_block(base64=block.image.decode(), mime_type=block.image_mimetype))
    assert isinstance(block, TextBlock)
    return dict(create_text_block(block.text))
