"""`Phi3VisionLLM`: Phi-3 Vision as a LlamaIndex LLM that takes images.

Owns how chat messages become a prompt, token limits, and streaming, synchronous and asynchronous. Images in messages
are read by our own `load_image` under an `ImagePolicy`; `resolve_image`, which would download any URL, is never called.
(LlamaIndex's own multimodal query engine reads the images of nodes itself before it asks an LLM.)
"""

from __future__ import annotations

import asyncio
import base64
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Collection, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from llama_index.core.base.llms.types import (
    CachePoint,
    ChatMessage,
    ChatResponse,
    ChatResponseAsyncGen,
    ChatResponseGen,
    CompletionResponse,
    CompletionResponseAsyncGen,
    CompletionResponseGen,
    ImageBlock,
    LLMMetadata,
    MessageRole,
    TextBlock,
)
from llama_index.core.llms import LLM
from llama_index.core.llms.callbacks import llm_chat_callback, llm_completion_callback
from PIL import Image
from pydantic import ConfigDict, Field, PrivateAttr, ValidationError
from transformers import SuppressTokensLogitsProcessor

from mm_retriever.errors import PromptError
from mm_retriever.images import ImagePolicy, ImageSource, load_image
from mm_retriever.phi3_vision.config import DEFAULT_MODEL
from mm_retriever.phi3_vision.decoding import Sampler, TextStream
from mm_retriever.phi3_vision.load import load_phi3_vision
from mm_retriever.phi3_vision.model import Phi3Vision, Prefix
from mm_retriever.phi3_vision.processor import Message, Phi3VisionProcessor, Slot
from mm_retriever.rebuild import Name, Rebuilt, field_arguments, loaded_model_error, portable_name, wrong_options
from mm_retriever.threads import ForkLock, in_thread

_ROLES = {
    MessageRole.SYSTEM: "system",
    MessageRole.DEVELOPER: "system",
    MessageRole.USER: "user",
    MessageRole.TOOL: "user",
    MessageRole.FUNCTION: "user",
    MessageRole.ASSISTANT: "assistant",
    MessageRole.CHATBOT: "assistant",
    MessageRole.MODEL: "assistant",
}
_CHANGED = ("messages_to_prompt", "completion_to_prompt", "query_wrapper_prompt")  # no arguments of an equal object
T = TypeVar("T")


@dataclass(frozen=True)
class _Prompt:
    """Ids of a whole conversation and the images for its slots."""

    ids: list[int]
    images: list[Image.Image]


@dataclass(frozen=True)
class _Written:
    """What is written so far: all text, the newest piece, and figures for the response."""

    text: str
    delta: str
    details: dict[str, Any]


class Phi3VisionLLM(Rebuilt, LLM):
    """Phi-3 Vision answering text and image blocks.

    Several threads may ask at once: the model takes one step at a time, so their answers grow side by side. A pickle
    holds the name and the options, and loads the model again; a copy shares it.

    Args:
        model_name: hub id, local folder, or "tiny", the small model that comes with the package.
        model: a loaded model, e.g. quantised or with an adapter, instead of a name; needs `processor`.
        processor: of that model.
        options: the fields below, and those of LlamaIndex's LLMs; None stands for the default.

    Raises:
        PromptError: an option that does not exist, or a value that it does not take.
    """

    model_config = ConfigDict(extra="forbid")

    model_name: str = DEFAULT_MODEL
    max_new_tokens: int = Field(default=512, ge=1)
    """Most tokens of an answer; ``max_new_tokens=...`` in a call overrides it."""
    temperature: float = Field(default=0.0, ge=0)
    """0: always the most likely word."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Keeps the most likely words that make up this much probability."""
    seed: int | None = None
    """For temperatures above 0."""
    context_window: int = Field(default=0, ge=0)
    """Prompt and answer together; by default all the model has."""
    revision: str | None = None
    """Of the hub repository."""
    device: Name = None
    """"cpu", "cuda", "mps", ...; by default the fastest there is."""
    dtype: Name = None
    """"float32", "bfloat16", ...; by default what the weights are stored in."""
    num_crops: int | None = None
    """Most crops per image; fewer cost less and see less. By default the checkpoint's."""
    image_policy: ImagePolicy = Field(default_factory=ImagePolicy, exclude=True)
    """Which images may be read, and how large."""

    _model: Phi3Vision = PrivateAttr()
    _processor: Phi3VisionProcessor = PrivateAttr()
    _named: bool = PrivateAttr(default=True)
    _lock: ForkLock = PrivateAttr(default_factory=partial(ForkLock, threading.RLock))

    def __init__(
        self,
        model_name: str = DEFAULT_MODEL,
        *,
        model: Phi3Vision | None = None,
        processor: Phi3VisionProcessor | None = None,
        **options: Any,
    ) -> None:
        if (model is None) != (processor is None):
            raise PromptError("give model and processor together, or neither and a model_name")
        given = {name: value for name, value in options.items() if value is not None}
        try:
            super().__init__(model_name=model_name, **given)  # type: ignore[call-arg]
        except ValidationError as error:
            raise PromptError(wrong_options(type(self), error)) from None
        if model is None or processor is None:
            model, processor = load_phi3_vision(
                model_name, revision=self.revision, device=self.device, dtype=self.dtype, num_crops=self.num_crops
            )
        else:
            self._named = False
        self._model, self._processor = model, processor
        most = int(model.config.max_position_embeddings)
        self.context_window = min(self.context_window or most, most)

    @classmethod
    def class_name(cls) -> str:
        """LlamaIndex's name for the class."""
        return "Phi3VisionLLM"

    @property
    def metadata(self) -> LLMMetadata:
        """What LlamaIndex plans prompts by."""
        return LLMMetadata(
            context_window=self.context_window,
            num_output=self.max_new_tokens,
            is_chat_model=True,
            model_name=self.model_name,
        )

    @property
    def model(self) -> Phi3Vision:
        """The model, to share it with a reranker; take `lock` while it computes."""
        return self._model

    @property
    def processor(self) -> Phi3VisionProcessor:
        """Images to crops, messages to ids."""
        return self._processor

    @property
    def lock(self) -> ForkLock:
        """Held during each step of the model."""
        return self._lock

    def _made_of(self) -> dict[str, Any]:
        if not self._named:
            raise loaded_model_error("Phi3VisionLLM")
        given = {name: value for name, value in field_arguments(self).items() if name not in _CHANGED}
        return given | {"model_name": portable_name(self.model_name)}

    def _changed_since(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _CHANGED}

    def _change(self, changes: Mapping[str, Any]) -> None:
        for name, value in changes.items():
            setattr(self, name, value)

    # ------------------------------------------------------------------ LlamaIndex's eight ways to ask

    @llm_chat_callback()
    def chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        """The answer to a conversation of text and image blocks.

        Raises:
            PromptError: Too long, or a block that cannot be shown.
            ImageLoadError: An image that cannot or must not be read.
        """
        return _chat_response(_last(self._answer(self._chat_prompt(messages), kwargs)))

    @llm_chat_callback()
    def stream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseGen:
        """Like `chat`, piece by piece; errors come before the first piece."""
        written = self._answer(self._chat_prompt(messages), kwargs)
        return (_chat_response(piece) for piece in written)

    achat = in_thread(chat)

    @llm_completion_callback()
    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        """The answer to one question; ``formatted``: the prompt has its control tokens already."""
        return _completion(_last(self._answer(self._text_prompt(prompt, formatted), kwargs)))

    acomplete = in_thread(complete)

    @llm_completion_callback()
    def stream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponseGen:
        """Like `complete`, piece by piece."""
        written = self._answer(self._text_prompt(prompt, formatted), kwargs)
        return (_completion(piece) for piece in written)

    @llm_chat_callback()
    async def astream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseAsyncGen:
        """`stream_chat`, each piece made in a thread."""
        written = await asyncio.to_thread(lambda: self._answer(self._chat_prompt(messages), kwargs))
        return _in_threads(_chat_response(piece) for piece in written)

    @llm_completion_callback()
    async def astream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponseAsyncGen:
        """`stream_complete`, each piece made in a thread."""
        written = await asyncio.to_thread(lambda: self._answer(self._text_prompt(prompt, formatted), kwargs))
        return _in_threads(_completion(piece) for piece in written)

    # ------------------------------------------------------------------ prompts

    def _chat_prompt(self, messages: Sequence[ChatMessage]) -> _Prompt:
        images: list[Image.Image] = []
        turns = [Message(_ROLES[message.role], self._parts(message, images)) for message in messages]
        if not any(message.parts for message in turns):
            raise PromptError("nothing to answer: no message has text or an image")
        return _Prompt(self._processor.encode_messages(turns), images)

    def _text_prompt(self, prompt: str, formatted: bool) -> _Prompt:
        if formatted:
            return _Prompt(self._processor.encode(prompt), [])
        prompt = self.completion_to_prompt(prompt) if self.completion_to_prompt else prompt
        return _Prompt(self._processor.encode_messages([Message("user", [prompt])]), [])

    def _parts(self, message: ChatMessage, images: list[Image.Image]) -> list[str | Slot]:
        """Texts and slots of one message, a line each; its images are put into `images`."""
        parts: list[str | Slot] = []
        for block in message.blocks:
            part: str | Slot
            if isinstance(block, TextBlock):
                part = block.text
            elif isinstance(block, ImageBlock):
                images.append(load_image(_image_source(block), policy=self.image_policy))
                part = Slot(self._processor.image_tokens(*images[-1].size))
            elif isinstance(block, CachePoint):
                continue
            else:
                raise PromptError(f"a {block.block_type!r} block cannot be shown to Phi-3 Vision; give text and images")
            parts += ["\n", part] if parts else [part]
        return parts

    def _check_length(self, prompt: _Prompt, max_new_tokens: int) -> None:
        if len(prompt.ids) + max_new_tokens <= self.context_window:
            return
        slots = sum(i < 0 for i in prompt.ids)
        advice = f"ask for fewer than max_new_tokens={max_new_tokens}, shorten the text"
        if prompt.images:
            advice += f", give fewer images, or load the model with num_crops below {self._processor.num_crops}"
        raise PromptError(
            f"the prompt has {len(prompt.ids)} tokens ({slots} of {len(prompt.images)} images) and the answer may "
            f"have {max_new_tokens}, together more than the {self.context_window} that fit: {advice}"
        )

    # ------------------------------------------------------------------ answers

    def _answer(self, prompt: _Prompt, options: dict[str, Any]) -> Generator[_Written, None, None]:
        """Check everything and compute the prompt now, then write piece by piece."""
        started = time.perf_counter()
        max_new_tokens, sampler = self._options(options)
        self._check_length(prompt, max_new_tokens)
        prefix = self._prefill(prompt, max_new_tokens)
        stops = {*self._processor.stop_ids, *_as_ids(self._model.generation_config)}
        stream = TextStream(
            _Locked(self._model, self._lock),
            prefix,
            stop_ids=stops,
            max_new_tokens=max_new_tokens,
            processors=[
                SuppressTokensLogitsProcessor(sorted(self._processor.special_ids - stops), str(prefix.logits.device))
            ],
            choose=sampler,
        )
        return self._write(stream, len(prompt.ids), started)

    def _prefill(self, prompt: _Prompt, max_new_tokens: int) -> Prefix:
        inputs = self._processor.image_inputs(prompt.images)
        with self._lock, torch.inference_mode():
            features = self._model.image_features(inputs.pixel_values, inputs.image_sizes) if prompt.images else []
            return self._model.prefill(prompt.ids, features, total_length=len(prompt.ids) + max_new_tokens)

    def _options(self, options: dict[str, Any]) -> tuple[int, Sampler]:
        """What a call may set beside the messages."""
        options = {name: value for name, value in options.items() if value is not None}
        max_new_tokens = options.pop("max_new_tokens", options.pop("max_tokens", self.max_new_tokens))
        if not isinstance(max_new_tokens, int) or max_new_tokens < 1:
            raise PromptError(f"max_new_tokens={max_new_tokens!r} is not a whole number of 1 or more")
        sampler = Sampler(
            options.pop("temperature", self.temperature),
            options.pop("top_p", self.top_p),
            options.pop("seed", self.seed),
        )
        if options:
            raise TypeError(f"unknown options {sorted(options)}; max_new_tokens, temperature, top_p and seed are known")
        return max_new_tokens, sampler

    def _write(self, stream: TextStream[Prefix], prompt_tokens: int, started: float) -> Generator[_Written, None, None]:
        text = ""
        for _ in stream:
            decoded = self._processor.decode(stream.rows[0])
            if decoded.endswith("\N{REPLACEMENT CHARACTER}"):
                continue  # half a character; the rest is in the next tokens
            if decoded != text:
                yield _Written(decoded, decoded[len(text) :], {})
                text = decoded
        decoded = self._processor.decode(stream.rows[0])
        details = {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": len(stream.rows[0]),
            "total_tokens": prompt_tokens + len(stream.rows[0]),
            "finish_reason": stream.finish_reason,
            "seconds": round(time.perf_counter() - started, 3),
        }
        yield _Written(decoded, decoded[len(text) :], details)


class _Locked:
    """A model that takes one step at a time, whoever asks."""

    def __init__(self, model: Phi3Vision, lock: ForkLock) -> None:
        self._model, self._lock = model, lock

    def extend(self, prefix: Prefix, input_ids: Sequence[int] | torch.Tensor, /) -> Prefix:
        with self._lock:
            return self._model.extend(prefix, input_ids)


def _image_source(block: ImageBlock) -> ImageSource:
    """What to read; nothing is opened yet. LlamaIndex keeps bytes as base64."""
    if isinstance(block.image, bytes):
        return base64.b64decode(block.image)
    if block.image is not None:
        return block.image  # type: ignore[return-value]
    if block.path is not None:
        return block.path
    if block.url is not None:
        return str(block.url)
    raise PromptError("an image block without image, path or url; give one of them")


def _as_ids(config: Any) -> Collection[int]:
    """Ids that the checkpoint's own generation settings stop at."""
    eos = getattr(config, "eos_token_id", None)
    return [] if eos is None else [eos] if isinstance(eos, int) else list(eos)


def _last(pieces: Iterator[T]) -> T:
    return deque(pieces, maxlen=1)[0]


def _chat_response(written: _Written) -> ChatResponse:
    message = ChatMessage(role=MessageRole.ASSISTANT, content=written.text)
    return ChatResponse(message=message, delta=written.delta, additional_kwargs=written.details)


def _completion(written: _Written) -> CompletionResponse:
    return CompletionResponse(text=written.text, delta=written.delta, additional_kwargs=written.details)


async def _in_threads(pieces: Iterator[T]) -> AsyncGenerator[T, None]:
    """The pieces, each made in a thread, so that the event loop stays free while the model computes."""
    end = object()
    while (piece := await asyncio.to_thread(next, pieces, end)) is not end:
        yield piece  # type: ignore[misc]
