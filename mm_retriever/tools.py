"""Image search as tools of a LlamaIndex agent.

Owns how answers of `ImageSearch` become tool outputs: text and images side by side, errors that an agent can act on.
Knows nothing of models and stores. (No `from __future__ import annotations` here: LlamaIndex reads the types.)
"""

import asyncio
import copy
import inspect
import logging
from collections.abc import Sequence
from typing import Any

from cachetools import LRUCache
from llama_index.core.agent.react import ReActChatFormatter
from llama_index.core.agent.react.types import BaseReasoningStep
from llama_index.core.base.llms.types import ChatMessage, ContentBlock, ImageBlock, TextBlock
from llama_index.core.tools import BaseTool, FunctionTool, ToolMetadata, ToolOutput
from llama_index.core.tools.tool_spec.base import BaseToolSpec
from llama_index.core.tools.utils import create_schema_from_function
from pydantic import PrivateAttr

from mm_retriever.errors import MMRetrieverError, QueryError, one_line
from mm_retriever.images import DEFAULT_POLICY, ImagePolicy, ImageSource
from mm_retriever.search_tools import (
    ChangeArgument,
    Conversation,
    FiltersArgument,
    ImageArgument,
    ImageDescription,
    ImageSearch,
    QuestionArgument,
    ResultArgument,
    SearchResult,
    TextArgument,
    TopKArgument,
)
from mm_retriever.threads import ForkLock

logger = logging.getLogger(__name__)

_OUTPUTS_KEPT = 8


class ImageSearchToolSpec(BaseToolSpec):
    """Three tools for one conversation: search_images, find_similar and describe_image.

    Make one for each conversation; that costs nothing, as models and store are in the `ImageSearch` that all share.
    "result 3" then means this conversation's result, and nobody can name another's attachments.

        search = ImageSearch(store, embed_model)
        tools = ImageSearchToolSpec(search)
        tools.attach("photo.jpg", "uploads/photo.jpg")
        agent = FunctionAgent(tools=tools.to_tool_list(), llm=llm)

    A `FunctionAgent`'s model receives the thumbnails. A `ReActAgent` passes on text only, unless it is given
    `formatter=tools.react_formatter()`. For a model that takes no images: `SearchLimits(thumbnails=0)`.

    Args:
        search: what is asked.
        conversation: what its models may refer to; by default a new one.
    """

    spec_functions = ["search_images", "find_similar", "describe_image"]  # noqa: RUF012 - as LlamaIndex declares it

    def __init__(self, search: ImageSearch, conversation: Conversation | None = None) -> None:
        self.search = search
        self.conversation = Conversation() if conversation is None else conversation
        self._lock = ForkLock()
        self._shown = LRUCache[str, list[ContentBlock]](_OUTPUTS_KEPT)

    def __getstate__(self) -> dict[str, Any]:
        """All but the lock, for a pickle or a copy."""
        with self._lock:
            kept = {name: value for name, value in self.__dict__.items() if name != "_lock"}
            return kept | {"_shown": copy.deepcopy(self._shown)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=ForkLock())

    def attach(self, name: str, image: ImageSource, *, policy: ImagePolicy = DEFAULT_POLICY) -> str:
        """Let the model refer to an image by a name, and return the name; say it in the message to the agent.

        Raises:
            QueryError: a name that could be taken for something else.
            ImageLoadError: the image cannot or must not be read.
        """
        return self.conversation.attach(name, image, policy=policy)

    # ------------------------------------------------------------------------------------------ what a model sees

    def search_images(
        self,
        text: TextArgument = None,
        image: ImageArgument = None,
        filters: FiltersArgument = None,
        top_k: TopKArgument = None,
    ) -> SearchResult:
        """Find images by words, by an image, or by both.

        With both, the text says what is wanted with the image: text "phone case with this" and the image of a leopard
        find phone cases with leopard print. Results are numbered; later calls can name them, as "result 3".
        """
        return self.search.search(text, image, filters, top_k, conversation=self.conversation)

    def find_similar(
        self,
        result: ResultArgument,
        change: ChangeArgument = None,
        filters: FiltersArgument = None,
        top_k: TopKArgument = None,
    ) -> SearchResult:
        """Find images like one that was found or attached before, with a change if there is one.

        "The third one but in red" is result "result 3" and change "in red". The image itself is left out.
        """
        return self.search.find_similar(result, change, filters, top_k, conversation=self.conversation)

    def describe_image(self, image: ResultArgument, question: QuestionArgument = None) -> ImageDescription:
        """Say what one image shows and what is known about it, or answer a question about it."""
        return self.search.describe(image, question, conversation=self.conversation)

    # ------------------------------------------------------------------------------------------ for LlamaIndex

    def to_tool_list(
        self,
        spec_functions: list[str | tuple[str, str]] | None = None,
        func_to_metadata_mapping: dict[str, ToolMetadata] | None = None,
    ) -> list[FunctionTool]:
        """Return the tools, for any agent, synchronous or not. An error is an output with `is_error`, never raised."""
        names = [name if isinstance(name, str) else name[0] for name in spec_functions or self.spec_functions]
        return [ImageTool(self, name, (func_to_metadata_mapping or {}).get(name)) for name in names]

    def react_formatter(self, context: str = "") -> ReActChatFormatter:
        """Return what puts the thumbnails of this conversation's results before the model of a `ReActAgent`."""
        formatter = ImageReActFormatter.from_defaults(context=context or None)
        assert isinstance(formatter, ImageReActFormatter)
        formatter._tools = self
        return formatter

    def keep_output(self, output: ToolOutput) -> None:
        """Remember the images of an output by its text, for `react_formatter`."""
        with self._lock:
            self._shown[output.content] = output.blocks

    def shown_blocks(self, text: str) -> list[ContentBlock]:
        """Return the blocks of an earlier output with this text, none if it is forgotten."""
        with self._lock:
            return self._shown.get(text, [])


class ImageTool(FunctionTool):
    """One of the tools: an agent gets text and images, or an error that says what to do instead."""

    def __init__(self, spec: ImageSearchToolSpec, name: str, metadata: ToolMetadata | None = None) -> None:
        function = getattr(spec, name)
        self._spec = spec
        self._made_of = (spec, name, metadata)
        super().__init__(
            fn=function,
            metadata=metadata
            or ToolMetadata(
                name=name,
                description=inspect.cleandoc(function.__doc__ or ""),
                fn_schema=create_schema_from_function(name, function),
            ),
        )

    def __reduce__(self) -> tuple[Any, ...]:
        """A pickle or copy of the tools of one conversation shares that conversation."""
        return type(self), self._made_of

    def call(self, *args: Any, **kwargs: Any) -> ToolOutput:
        """Return the answer as text and images; never raises."""
        name = self.metadata.get_name()
        given = {"args": args, "kwargs": kwargs} if args else kwargs
        try:
            answer = self._answer(*args, **{**self.partial_params, **kwargs})
        except Exception as error:
            reason = _reason(error)
            return ToolOutput(
                tool_name=name,
                content=f"Error: {reason}",
                raw_input=given,
                raw_output=reason,
                is_error=True,
                exception=error,
            )
        output = ToolOutput(tool_name=name, blocks=content_blocks(answer), raw_input=given, raw_output=answer.to_dict())
        self._spec.keep_output(output)
        return output

    def _answer(self, *args: Any, **kwargs: Any) -> Any:
        signature = inspect.signature(self.real_fn)
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError as error:
            raise QueryError(f"{error}; {self.metadata.name} takes {', '.join(signature.parameters)}") from None
        return self.fn(*bound.args, **bound.kwargs)

    async def acall(self, *args: Any, **kwargs: Any) -> ToolOutput:
        """As `call`; the event loop stays free."""
        return await asyncio.to_thread(self.call, *args, **kwargs)


class ImageReActFormatter(ReActChatFormatter):
    """Puts images back into observations, which a `ReActAgent` reduces to their text."""

    _tools: ImageSearchToolSpec | None = PrivateAttr(default=None)

    def format(
        self,
        tools: Sequence[BaseTool],
        chat_history: list[ChatMessage],
        current_reasoning: list[BaseReasoningStep] | None = None,
    ) -> list[ChatMessage]:
        """Return the messages of the superclass; observations of ours have their images."""
        messages = super().format(tools, chat_history, current_reasoning)
        steps = len(current_reasoning or [])
        return messages[: len(messages) - steps] + [
            self._seen(message) for message in messages[len(messages) - steps :]
        ]

    def _seen(self, message: ChatMessage) -> ChatMessage:
        text = message.content or ""
        if self._tools is None or not text.startswith("Observation: "):
            return message
        blocks = self._tools.shown_blocks(text.removeprefix("Observation: "))
        return ChatMessage(role=message.role, blocks=[TextBlock(text="Observation: "), *blocks]) if blocks else message


def content_blocks(answer: SearchResult | ImageDescription) -> list[ContentBlock]:
    """Return an answer as blocks: a line of text for each result, its thumbnail right after it."""
    blocks: list[ContentBlock] = []
    for part in answer.parts:
        blocks.append(TextBlock(text=part.text))
        if part.thumbnail is not None:
            blocks.append(ImageBlock(image=part.thumbnail, image_mimetype="image/jpeg"))
    return blocks


def _reason(error: Exception) -> str:
    """What a model may read about an error: ours say what to do, others might tell about the machine."""
    if isinstance(error, MMRetrieverError):
        return one_line(error, 1_000)
    logger.error("image search failed", exc_info=error)
    return f"image search failed ({type(error).__name__}); this is no fault of the arguments"
