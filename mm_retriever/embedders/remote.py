"""`RemoteEmbedding`: a model on a server, over OpenAI's protocol as vLLM extends it to images.

One content is one request with `messages`, as for a chat model: the instruction as the system's message, then the image
and the text as the user's. Source: vLLM's own client of ``/v1/embeddings`` for multimodal models.
"""

from __future__ import annotations

import base64
import hashlib
import inspect
import io
import json
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mm_retriever.embedders.embedder import Content
from mm_retriever.errors import ModelServerError, QueryError, one_line, shown
from mm_retriever.servers.json_server import JSONServer
from mm_retriever.threads import ForkLock

MAX_PIXELS = 1280 * 1440
"""The limit of Qwen3-VL-Embedding; larger images are shrunk before they are sent."""
_TEXTS = 32  # in one request
_LONGEST_VECTOR = 65_536


def load(name: str, *, base_url: str, device: Any = None, dtype: Any = None, **options: Any) -> RemoteEmbedding:
    """Return the model that a server serves under a name.

    Raises:
        QueryError: a device or dtype, which the server chooses, or an unknown option.
    """
    if device is not None or dtype is not None:
        raise QueryError(f"{name!r} runs on a server, which chooses its device and dtype: leave both out here")
    known = sorted(inspect.signature(RemoteEmbedding).parameters.keys() - {"base_url", "model"})
    if unknown := sorted(options.keys() - set(known)):
        raise QueryError(
            f"a model on a server has no option {', '.join(map(repr, unknown))}; there are {', '.join(known)}"
        )
    return RemoteEmbedding(base_url, name, **options)


class RemoteEmbedding:
    """A model on a server as an `Embedder`. The first answer tells its dimension.

    The name identifies the weights: the caller ensures that all servers use it for the same model. `space` holds the
    name, dimension and instructions, but not the address.

    Args:
        base_url: of the server, for example vLLM's "http://gpu:8000/v1".
        model: the name under which it serves the model.
        api_key: if the server needs one.
        dimensions: for shorter vectors of a Matryoshka model; default: the model's own.
        query_instruction: the instruction for queries that the model was trained with; default: the template's own.
        document_instruction: the same for stored contents.
        batch_texts: send texts without an instruction as one list of `input`. Correct only for a model without a chat
            template: `input` bypasses the template, which changes the vectors.
        extra_body: further fields of each request; they override ours.
        image_format: "png" keeps the exact pixels, "jpeg" (quality 95) needs a tenth of the bytes.
        max_pixels: limit of an image; larger ones are shrunk.
        concurrency: simultaneous requests of one call.
        timeout_s: limit for one request, from sending to the last byte.
        attempts: most requests for one answer, where the server is unreachable, overloaded or too slow.
        retry_wait_s: wait before the second attempt; doubles with each, up to a minute. A server's Retry-After is
            obeyed up to a minute.

    Raises:
        QueryError: the address is invalid, or a number is out of range.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        api_key: str | None = None,
        dimensions: int | None = None,
        query_instruction: str = "",
        document_instruction: str = "",
        batch_texts: bool = False,
        extra_body: Mapping[str, Any] | None = None,
        image_format: Literal["png", "jpeg"] = "png",
        max_pixels: int = MAX_PIXELS,
        concurrency: int = 8,
        timeout_s: float = 60.0,
        attempts: int = 4,
        retry_wait_s: float = 1.0,
    ) -> None:
        for name, value in (("dimensions", dimensions), ("max_pixels", max_pixels), ("concurrency", concurrency)):
            if value is not None and value < 1:
                raise QueryError(f"{name}={value}: at least 1")
        if not (timeout_s > 0 and attempts >= 1 and retry_wait_s >= 0):
            raise QueryError(f"timeout_s={timeout_s}, attempts={attempts}, retry_wait_s={retry_wait_s}: too small")
        if image_format not in ("png", "jpeg"):
            raise QueryError(f"image_format={shown(image_format)}: there are 'png' and 'jpeg'")
        try:
            json.dumps(extra_body, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise QueryError(f"extra_body goes into JSON, and cannot: {one_line(error, 200)}") from None
        self.server = JSONServer(base_url, model, api_key=api_key)
        self.name = model
        self.note = f"server, {image_format}"
        self._dimensions, self._dimension = dimensions, dimensions
        self._instructions = {True: query_instruction, False: document_instruction}
        self._batch_texts, self._extra_body = batch_texts, dict(extra_body or {})
        self._image_format, self._max_pixels, self._concurrency = image_format, max_pixels, concurrency
        self._asking: dict[str, Any] = {"timeout_s": timeout_s, "attempts": attempts, "retry_wait_s": retry_wait_s}
        self._lock = ForkLock()

    def __repr__(self) -> str:
        return f"RemoteEmbedding({self.server.base_url!r}, {self.name!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        self.server.portable()
        options: dict[str, Any] = {
            "dimensions": self._dimensions,
            "query_instruction": self._instructions[True],
            "document_instruction": self._instructions[False],
            "batch_texts": self._batch_texts,
            "extra_body": self._extra_body,
            "image_format": self._image_format,
            "max_pixels": self._max_pixels,
            "concurrency": self._concurrency,
            **self._asking,
        }
        return partial(type(self), self.server.base_url, self.name, **options), ()

    @property
    def dimension(self) -> int:
        """Length of every vector, requested from the server once."""
        if self._dimension is None:
            self.encode([Content("dimension")])
        assert self._dimension is not None
        return self._dimension

    @property
    def space(self) -> str:
        """Equal if and only if vectors may be compared."""
        facts = [self._instructions[True], self._instructions[False], self._batch_texts, self._extra_body]
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]
        return f"remote@{self.name}.{self.dimension}.{digest}"

    def prepare(self, image: Image.Image) -> NDArray[np.uint8]:
        """(H, W, 3): the image, shrunk to `max_pixels`."""
        rgb = image.convert("RGB")
        scale = math.sqrt(self._max_pixels / (rgb.width * rgb.height))
        if scale < 1:
            size = max(1, int(rgb.width * scale)), max(1, int(rgb.height * scale))
            rgb = rgb.resize(size, Image.Resampling.BICUBIC, reducing_gap=3.0)
        return np.asarray(rgb)

    def encode(self, contents: Sequence[Content], *, query: bool = False) -> NDArray[np.float32]:
        """(B, D), rows of length 1, in the order of the contents.

        Args:
            contents: what to embed.
            query: whether the vectors are searched with, rather than stored.

        Raises:
            ModelServerError: the server gave no answer, or one without these vectors.
        """
        if not contents:
            return np.empty((0, self.dimension), dtype=np.float32)
        instruction = self._instructions[query]
        plain = [
            row for row, content in enumerate(contents) if self._batch_texts and not instruction and _is_text(content)
        ]
        jobs: list[tuple[list[int], Callable[[], dict[str, Any]]]] = []
        for start in range(0, len(plain), _TEXTS):
            rows = plain[start : start + _TEXTS]
            jobs.append((rows, partial(self._input, [contents[row].text for row in rows])))
        others = sorted(set(range(len(contents))) - set(plain))
        jobs += [([row], partial(self._messages, contents[row], instruction)) for row in others]
        results = [np.empty(0, dtype=np.float32)] * len(contents)
        over = threading.Event()  # set when one request failed, so that the others stop retrying
        with ThreadPoolExecutor(min(self._concurrency, len(jobs)), thread_name_prefix="embed") as senders:
            try:
                ask = partial(self._ask, over)
                answers = senders.map(ask, [len(rows) for rows, _ in jobs], [body for _, body in jobs])
                for (rows, _), vectors in zip(jobs, answers, strict=True):
                    for row, vector in zip(rows, vectors, strict=True):
                        results[row] = vector
            finally:
                over.set()
                senders.shutdown(wait=False, cancel_futures=True)
        return np.stack(results)

    def _ask(self, over: threading.Event, count: int, make: Callable[[], dict[str, Any]]) -> NDArray[np.float32]:
        """(count, D): one request."""
        ours: dict[str, Any] = {"model": self.name, "encoding_format": "float"}
        if self._dimensions is not None:
            ours["dimensions"] = self._dimensions
        body = ours | make() | self._extra_body
        answer = self.server.post("embeddings", body, left=lambda: 0.0 if over.is_set() else None, **self._asking)
        try:
            vectors = read_vectors(answer, count)
        except ValueError as error:
            raise ModelServerError(f"{self.name!r} gave no vectors: {error}") from None
        with self._lock:
            if self._dimension is None:
                self._dimension = vectors.shape[1]
        if vectors.shape[1] != self._dimension:
            raise ModelServerError(
                f"{self.name!r} gave a vector of {vectors.shape[1]} numbers, and {self._dimension} are expected: "
                "is it the same model, and does it take `dimensions`?"
            )
        return vectors

    def _input(self, texts: list[str]) -> dict[str, Any]:
        return {"input": texts}

    def _messages(self, content: Content, instruction: str) -> dict[str, Any]:
        parts: list[dict[str, Any]] = []
        if content.image is not None:
            parts.append({"type": "image_url", "image_url": {"url": self._data_uri(content.image)}})
        if content.text or content.image is None:
            parts.append({"type": "text", "text": content.text})
        messages = [{"role": "user", "content": parts}]
        if instruction:
            messages.insert(0, {"role": "system", "content": [{"type": "text", "text": instruction}]})
        # such models take the vector at the end of the prompt, which includes the tokenizer's last token
        return {"messages": messages, "add_generation_prompt": True, "add_special_tokens": True}

    def _data_uri(self, pixels: NDArray[np.uint8]) -> str:
        out = io.BytesIO()
        options: dict[str, Any] = {"quality": 95, "subsampling": 0} if self._image_format == "jpeg" else {}
        Image.fromarray(pixels).save(out, self._image_format, **options or {"compress_level": 1})
        return f"data:image/{self._image_format};base64,{base64.b64encode(out.getvalue()).decode()}"


def _is_text(content: Content) -> bool:
    return content.image is None and bool(content.text)


def read_vectors(answer: Any, count: int) -> NDArray[np.float32]:
    """Return (count, D), rows of length 1: the vectors of an answer, in the order of their indices.

    Args:
        answer: JSON of a server.
        count: number of requested vectors.

    Raises:
        ValueError: the answer has another form.
    """
    data = answer.get("data") if isinstance(answer, dict) else None
    if not isinstance(data, list) or len(data) != count:
        raise ValueError(f"{len(data) if isinstance(data, list) else 'no'} vectors in the answer for {count} contents")
    rows: dict[int, NDArray[np.float64]] = {}
    for place, item in enumerate(data):
        fields = item if isinstance(item, dict) else {}
        index = fields.get("index", place if count == 1 else None)
        if type(index) is not int or not 0 <= index < count or index in rows:
            raise ValueError(f"an index {shown(index)} among {count} vectors: each from 0 must come once")
        rows[index] = _vector(fields.get("embedding"))
    if len({len(row) for row in rows.values()}) > 1:
        raise ValueError("vectors of different lengths in one answer")
    return np.stack([rows[index] for index in range(count)]).astype(np.float32)


def _decoded(text: str) -> list[float]:
    """The numbers of a vector in base64: 32-bit floats, little-endian. Source: OpenAI's client for Python."""
    try:
        numbers: list[float] = np.frombuffer(base64.b64decode(text, validate=True), dtype="<f4").tolist()
    except ValueError:
        raise ValueError(f"a vector is a list of numbers, not {shown(text)}") from None
    return numbers


def _vector(numbers: Any) -> NDArray[np.float64]:
    """The numbers, or their bytes in base64 as `encoding_format` has them, as a vector of length 1."""
    if isinstance(numbers, str):
        numbers = _decoded(numbers)
    if not isinstance(numbers, list) or not 1 <= len(numbers) <= _LONGEST_VECTOR:
        raise ValueError(f"a vector is a list of numbers, not {shown(numbers)}")
    if not all(type(number) in (float, int) for number in numbers):
        raise ValueError("a vector holds something other than numbers")
    try:
        vector = np.array(numbers, dtype=np.float64)
    except OverflowError:
        vector = np.array([math.inf])
    largest = float(np.abs(vector).max())
    if not math.isfinite(largest):
        raise ValueError("a vector with NaN or infinity in it")
    if largest == 0:
        raise ValueError("a vector of zeros, which has no direction")
    vector = vector / largest  # squares of very large or very small numbers are not finite or zero
    return vector / np.linalg.norm(vector)
