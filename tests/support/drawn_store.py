"""A small store of drawn products under the bundled embedder, and scripted models, for tests of tools and engines."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from llama_index.core.base.llms.types import ChatMessage, ImageBlock, MessageRole, ToolCallBlock
from llama_index.core.llms.mock import MockFunctionCallingLLM

from mm_retriever.demo.catalogue import draw_product, draw_theme
from mm_retriever.embedding import VisualizedBGEEmbedding
from mm_retriever.ingest import ingest_images
from mm_retriever.store import ImageStore, open_store

KINDS = ("phone case", "mug", "umbrella")
LOOKS = (("leopard", "natural"), ("leopard", "red"), ("polka dots", "red"), ("stars", "blue"))


def draw_images(folder: Path) -> Path:
    """Products in one sub-folder for each kind: `phone case/red leopard.jpg`."""
    for kind in KINDS:
        for pattern, colour in LOOKS:
            path = folder / kind / f"{colour} {pattern}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            draw_product(kind, pattern, colour, seed=7, size=160).save(path, quality=92)
    return folder


def draw_leopard(path: Path) -> Path:
    """An image that is in no store."""
    draw_theme("leopard", "natural", seed=99, size=160).save(path)
    return path


def drawn_store(folder: Path, embed_model: VisualizedBGEEmbedding) -> ImageStore:
    """A Milvus Lite store of `draw_images`."""
    store = open_store(folder / "drawn.db", embed_model)
    ingest_images(draw_images(folder / "images"), store, embed_model, show_progress=False)
    return store


class ScriptedLLM(MockFunctionCallingLLM):
    """A function-calling LLM that says what its script says, and remembers what it was asked."""

    @classmethod
    def of(cls, *script: ChatMessage | Callable[[Sequence[ChatMessage]], ChatMessage]) -> ScriptedLLM:
        asked: list[list[ChatMessage]] = []
        lines = iter(script)

        def answer(messages: Sequence[ChatMessage], **kwargs: Any) -> ChatMessage:
            asked.append(list(messages))
            line = next(lines)
            return line(messages) if callable(line) else line

        llm = cls(response_generator=answer, is_chat_model=True)
        llm._asked = asked
        return llm

    _asked: list[list[ChatMessage]]

    @property
    def asked(self) -> list[list[ChatMessage]]:
        return self._asked


def says(text: str) -> ChatMessage:
    return ChatMessage(role=MessageRole.ASSISTANT, content=text)


def calls(tool: str, **arguments: Any) -> ChatMessage:
    """What a function-calling model answers to call a tool."""
    call = ToolCallBlock(tool_call_id=f"call-{tool}", tool_name=tool, tool_kwargs=arguments)
    return ChatMessage(role=MessageRole.ASSISTANT, blocks=[call])


def images_of(messages: Sequence[ChatMessage]) -> list[ImageBlock]:
    return [block for message in messages for block in message.blocks if isinstance(block, ImageBlock)]


def texts_of(messages: Sequence[ChatMessage]) -> str:
    return "\n".join(message.content or "" for message in messages)
