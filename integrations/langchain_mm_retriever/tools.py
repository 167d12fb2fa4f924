"""`image_search_tools`: the tools of mm_retriever for LangChain's agents."""

import threading
from collections.abc import Callable
from typing import Any, cast

from cachetools import LRUCache
from langchain_core.messages.content import create_image_block, create_text_block
from langchain_core.runnables import RunnableConfig
from langchain_core.tools import StructuredTool, ToolException
from llama_index.core.base.llms.types import ContentBlock, ImageBlock, TextBlock
from llama_index.core.tools import FunctionTool
from pydantic import create_model, model_validator

from mm_retriever.search_tools import Conversation, ImageSearch, check_names
from mm_retriever.tools import ImageSearchToolSpec

_THREADS = 1_000  # conversations that are remembered


def image_search_tools(
    search: ImageSearch, conversation: Conversation | Callable[[str], Conversation] | None = None
) -> list[StructuredTool]:
    """Return search_images, find_similar and describe_image.

    A `ToolMessage` has a line of text for each result and its thumbnail after it, as LangChain's standard content
    blocks, and the answer as plain data in `artifact`. A mistake of the model comes back as a message with
    `status="error"` that says what to do instead.

    Args:
        search: what is asked.
        conversation: what the model may refer to, with `conversation.attach(name, image)`. By default each `thread_id`
            of a run's configuration has one of its own, so that all users may share the tools: "result 3" is the
            user's own. Runs without a `thread_id` share one. A function gives the conversation of a `thread_id`.
    """
    if isinstance(conversation, Conversation):
        spec = ImageSearchToolSpec(search, conversation)
        threads = _Threads(lambda _: spec)
    else:
        of_thread = conversation or (lambda _: Conversation())
        threads = _Threads(lambda thread_id: ImageSearchToolSpec(search, of_thread(thread_id)))
    return [_tool(tool, threads) for tool in ImageSearchToolSpec(search).to_tool_list()]


class _Threads:
    """The tools of each conversation, by `thread_id`; the ones unused for longest are forgotten beyond a number."""

    def __init__(self, make: Callable[[str], ImageSearchToolSpec]) -> None:
        self._make, self._lock = make, threading.Lock()
        self._specs: LRUCache[str, list[FunctionTool]] = LRUCache(_THREADS)

    def tools(self, thread_id: str) -> list[FunctionTool]:
        with self._lock:
            if thread_id not in self._specs:
                self._specs[thread_id] = self._make(thread_id).to_tool_list()
            return self._specs[thread_id]


def _tool(tool: FunctionTool, threads: _Threads) -> StructuredTool:
    schema, name = tool.metadata.fn_schema, tool.metadata.get_name()
    assert schema is not None
    known = frozenset(schema.model_fields)

    def names_are_known(arguments: Any) -> Any:
        check_names(arguments, known)  # LangChain passes over what no tool takes
        return arguments

    check = model_validator(mode="before")(names_are_known)
    schema = create_model(schema.__name__, __base__=schema, __validators__={"names_are_known": cast("Any", check)})

    def call(config: RunnableConfig, **arguments: Any) -> tuple[list[dict[str, Any]], Any]:
        tools = threads.tools(str((config.get("configurable") or {}).get("thread_id", "")))
        output = next(candidate for candidate in tools if candidate.metadata.get_name() == name).call(**arguments)
        if output.is_error:
            raise ToolException(output.raw_output)
        return [_block(block) for block in output.blocks], output.raw_output

    return StructuredTool(
        name=name,
        description=tool.metadata.description,
        args_schema=schema,
        func=call,
        response_format="content_and_artifact",
        handle_tool_error=True,
        handle_validation_error=_what_is_wrong,
    )


def _what_is_wrong(error: Any) -> str:
    """What pydantic found, for a model: LangChain's own sentence names no argument."""
    reasons = (f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors()[:5])
    return "; ".join(reason.removeprefix(": Value error, ") for reason in reasons)[:500]


def _block(block: ContentBlock) -> dict[str, Any]:
    if isinstance(block, ImageBlock):
        assert isinstance(block.image, bytes)  # a thumbnail, in base64
        return dict(create_image_block(base64=block.image.decode(), mime_type=block.image_mimetype))
    assert isinstance(block, TextBlock)
    return dict(create_text_block(block.text))
