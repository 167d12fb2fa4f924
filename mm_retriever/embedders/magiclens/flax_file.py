"""The tensors in a file of MagicLens: a pickle of one ``bytes`` object, which is flax msgpack. Nothing is executed.

The file is untrusted. Of the pickle only the opcodes are read that write one bytes object; of msgpack only what flax
writes: nested maps with text keys, arrays as extension 1 (shape, dtype name, raw bytes), arrays above 1 GiB in chunks.

Source: pickle's opcodes (Python's pickletools), the msgpack specification (github.com/msgpack/msgpack), and
``flax.serialization.to_bytes`` (github.com/google/flax). Rewritten. `from_flax` gives them our names and layouts.
"""

from __future__ import annotations

import math
import mmap
import pickletools
import re
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mm_retriever.errors import CheckpointError, shown

MAX_DEPTH = 32
MAX_ENTRIES = 100_000  # of all maps and lists; MagicLens large has a thousand
MAX_DIMENSIONS = 8
_NDARRAY, _SCALAR = 1, 3  # flax's extension types
_CHUNKED = "__msgpack_chunked_array__"
_FLOATS = {"float32": np.float32, "float16": np.float16, "float64": np.float64, "bfloat16": np.uint16}
_OPCODES = {opcode.code: opcode.name for opcode in pickletools.opcodes}
_BYTES_SIZES = {"SHORT_BINBYTES": "<B", "BINBYTES": "<I", "BINBYTES8": "<Q"}
_SKIPPED = {"PROTO": 1, "FRAME": 8, "MEMOIZE": 0, "BINPUT": 1, "LONG_BINPUT": 4}  # opcode -> bytes of its argument


def read_flax_file(path: Path) -> dict[str, Tensor]:
    """Arrays by their path, joined by "/".

    Raises:
        CheckpointError: the file is cut short, or holds anything else.
    """
    try:
        with path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return _tensors(_pickled_bytes(memoryview(mapped)))  # unmapped with the last view of it
    except _RefusedError as error:
        raise CheckpointError(f"{path} is not a file of MagicLens: {error}") from None
    except (struct.error, IndexError, UnicodeDecodeError, ValueError, OverflowError) as error:
        raise CheckpointError(f"{path} is not a whole file of MagicLens: it ends early or is damaged") from error


class _RefusedError(Exception):
    """The error for contents that no file of MagicLens has."""


def _pickled_bytes(whole: memoryview) -> memoryview:
    """The one bytes object of a pickle."""
    at, content = 0, None
    while True:
        name = _OPCODES.get(chr(whole[at]))
        if name is None:
            raise _RefusedError(f"byte {whole[at]:#x} at {at:,} is of no pickle")
        at += 1
        if name in _BYTES_SIZES and content is None:
            layout = _BYTES_SIZES[name]
            (size,) = struct.unpack_from(layout, whole, at)
            at += struct.calcsize(layout)
            if size > len(whole) - at:
                raise _RefusedError(f"it says {size:,} bytes and has {len(whole) - at:,}")
            content = whole[at : at + size]
            at += size
        elif name in _SKIPPED:
            at += _SKIPPED[name]
        elif name == "STOP" and content is not None and at == len(whole):
            return content
        else:
            raise _RefusedError(
                f"its pickle holds more than one bytes object (at byte {at - 1:,}: {name}), and could run code: refused"
            )


def _tensors(content: memoryview) -> dict[str, Tensor]:
    reader = _Reader(content)
    tree = reader.value(0)
    if reader.at != len(content):
        raise _RefusedError(f"{len(content) - reader.at:,} bytes after its end")
    if not isinstance(tree, dict):
        raise _RefusedError(f"it holds {shown(tree)}, expected a map of arrays")
    return dict(_flat(tree, ""))


def _flat(tree: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Tensor]]:
    for key, value in tree.items():
        path = f"{prefix}{key}"
        if isinstance(value, dict) and _CHUNKED in value:
            yield path, _joined(value, path)
        elif isinstance(value, dict):
            yield from _flat(value, f"{path}/")
        elif isinstance(value, Tensor):
            yield path, value
        else:
            raise _RefusedError(f"{path} is {shown(value)}, expected an array")


def _joined(chunked: Mapping[str, Any], path: str) -> Tensor:
    """An array that flax wrote in chunks, since msgpack holds 4 GiB at most."""
    shape, chunks = (_listed(chunked.get(key)) for key in ("shape", "chunks"))
    if not all(isinstance(chunk, Tensor) and chunk.ndim == 1 for chunk in chunks) or not chunks:
        raise _RefusedError(f"{path} has chunks that are no arrays")
    joined = torch.cat(chunks)
    _check_shape(shape, len(joined), path)
    return joined.reshape(shape)


def _listed(value: Any) -> list[Any]:
    """A list, which flax writes as a map from "0", "1", ... too."""
    if isinstance(value, dict):
        value = [value.get(str(place)) for place in range(len(value))]
    if not isinstance(value, list):
        raise _RefusedError(f"{shown(value)} where a list is expected")
    return value


def _check_shape(shape: list[Any], count: int, where: str) -> None:
    if len(shape) > MAX_DIMENSIONS or not all(type(size) is int and size >= 0 for size in shape):
        raise _RefusedError(f"{where} has the shape {shown(shape)}")
    if math.prod(shape) != count:
        raise _RefusedError(f"{where} has the shape {shown(shape)} and {count:,} numbers")


class _Reader:
    """Msgpack, as much of it as flax writes."""

    def __init__(self, content: memoryview) -> None:
        self.content = content
        self.at = 0
        self.counted = 0

    def value(self, depth: int) -> Any:
        if depth > MAX_DEPTH:
            raise _RefusedError(f"maps nested more than {MAX_DEPTH} deep")
        code = self.number("B")
        if code < 0x80:
            return code
        if code < 0x90:
            return self.entries_of(code & 0x0F, depth)
        if code < 0xA0:
            return self.items_of(code & 0x0F, depth)
        if code < 0xC0:
            return self.text(code & 0x1F)
        if code >= 0xE0:
            return code - 256
        simple = {0xC0: None, 0xC2: False, 0xC3: True}
        if code in simple:
            return simple[code]
        if code in (0xC4, 0xC5, 0xC6):
            return self.take(self.number("BHI"[code - 0xC4]))
        if code in (0xC7, 0xC8, 0xC9):
            return self.extension(self.number("BHI"[code - 0xC7]), depth)
        if 0xCA <= code <= 0xD3:
            return self.number("fdBHIQbhiq"[code - 0xCA])
        if 0xD4 <= code <= 0xD8:
            return self.extension(1 << (code - 0xD4), depth)
        if code in (0xD9, 0xDA, 0xDB):
            return self.text(self.number("BHI"[code - 0xD9]))
        if code in (0xDC, 0xDD):
            return self.items_of(self.number("HI"[code - 0xDC]), depth)
        if code in (0xDE, 0xDF):
            return self.entries_of(self.number("HI"[code - 0xDE]), depth)
        raise _RefusedError(f"byte {code:#x} at {self.at - 1:,} is no msgpack")

    def number(self, layout: str) -> Any:
        (number,) = struct.unpack_from(f">{layout}", self.content, self.at)
        self.at += struct.calcsize(f">{layout}")
        return number

    def take(self, size: int) -> memoryview:
        if size > len(self.content) - self.at:
            raise _RefusedError(f"it says {size:,} bytes at {self.at:,} and has {len(self.content) - self.at:,}")
        self.at += size
        return self.content[self.at - size : self.at]

    def text(self, size: int) -> str:
        return str(self.take(size), "utf-8")

    def count(self, size: int) -> range:
        self.counted += size
        if self.counted > MAX_ENTRIES:
            raise _RefusedError(f"more than {MAX_ENTRIES:,} entries")
        return range(size)

    def items_of(self, size: int, depth: int) -> list[Any]:
        return [self.value(depth + 1) for _ in self.count(size)]

    def entries_of(self, size: int, depth: int) -> dict[str, Any]:
        content: dict[str, Any] = {}
        for _ in self.count(size):
            key = self.value(depth + 1)
            if not isinstance(key, str) or key in content or "/" in key:
                raise _RefusedError(f"the key {shown(key)} in a map")
            content[key] = self.value(depth + 1)
        return content

    def extension(self, size: int, depth: int) -> Tensor:
        kind = self.number("b")
        end = self.at + size
        if kind not in (_NDARRAY, _SCALAR):
            raise _RefusedError(f"an extension of type {kind}, expected arrays")
        packed = self.value(depth + 1)
        if self.at != end or not isinstance(packed, list) or len(packed) != 3:
            raise _RefusedError(f"an array that is not (shape, dtype, bytes), at byte {self.at:,}")
        shape, dtype, raw = packed
        if not isinstance(dtype, str) or dtype not in _FLOATS or not isinstance(raw, memoryview):
            raise _RefusedError(f"an array of {shown(dtype)}, expected one of {', '.join(_FLOATS)}")
        numbers = np.frombuffer(raw, dtype=np.dtype(_FLOATS[dtype]).newbyteorder("<"))
        _check_shape(_listed(shape), len(numbers), f"the array before byte {self.at:,}")
        copied = torch.from_numpy(numbers.copy())  # tensors outlive the mapped file
        if dtype == "bfloat16":
            copied = copied.view(torch.bfloat16)
        return copied.reshape(shape)


_CLIP_LAYER = {
    "attn/query": "self_attn.q_proj", "attn/key": "self_attn.k_proj", "attn/value": "self_attn.v_proj",
    "attn/out": "self_attn.out_proj", "ln_1": "layer_norm1", "ln_2": "layer_norm2",
    "mlp/c_fc": "mlp.fc1", "mlp/c_proj": "mlp.fc2",
}  # fmt: skip
_SIDES = {"visual": "vision_model", "text": "text_model"}
_WHOLE = {
    "clip/logit_scale": "clip.logit_scale",
    "clip/visual/class_embedding": "clip.vision_model.embeddings.class_embedding",
    "clip/visual/positional_embedding": "clip.vision_model.embeddings.position_embedding.weight",
    "clip/text/positional_embedding": "clip.text_model.embeddings.position_embedding.weight",
    "clip/text/token_embedding/embedding": "clip.text_model.embeddings.token_embedding.weight",
    "contrastive_multimodal_pooler/pooling_attn_query": "contrastive_multimodal_pooler.pooling_attn_query",
    "contrastive_multimodal_pooler/pool_attn/per_dim_scale/per_dim_scale": (
        "contrastive_multimodal_pooler.pool_attn.per_dim_scale"
    ),
}
_NORMS = {
    "clip/visual/ln_pre": "clip.vision_model.pre_layrnorm",
    "clip/visual/ln_post": "clip.vision_model.post_layernorm",
    "clip/text/ln_final": "clip.text_model.final_layer_norm",
}
_PROJECTIONS = {
    "clip/visual/proj/kernel": "clip.visual_projection.weight",
    "clip/text/text_projection/kernel": "clip.text_projection.weight",
}
_CLIP_BLOCK = re.compile(r"clip/(visual|text)/transformer/resblocks_(\d{1,4})/(.+)/(kernel|bias|scale)")
_MIXER = re.compile(r"multimodal_encoder/x_layers_(\d{1,4})/(.+)")
_POOL = "contrastive_multimodal_pooler/"


def from_flax(arrays: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of `MagicLens`, from the arrays of a checkpoint by their path.

    Raises:
        CheckpointError: an array that no MagicLens has.
    """
    state: dict[str, Tensor] = {}
    for path, array in arrays.items():
        name, layout = _renamed(path.removeprefix("params/"))
        try:
            state[name] = layout(array).contiguous()  # the layout decides which product a CPU takes
        except (RuntimeError, IndexError) as error:  # another number of dimensions
            raise CheckpointError(f"the array {shown(path)} has the shape {list(array.shape)}") from error
    return state


def _renamed(path: str) -> tuple[str, Callable[[Tensor], Tensor]]:
    if path in _WHOLE:
        return _WHOLE[path], lambda array: array
    if path == "clip/visual/conv1/kernel":  # (H, W, in, out)
        return "clip.vision_model.embeddings.patch_embedding.weight", lambda array: array.permute(3, 2, 0, 1)
    if path in _PROJECTIONS:
        return _PROJECTIONS[path], lambda array: array.T
    module, _, leaf = path.rpartition("/")
    if module in _NORMS and leaf in ("scale", "bias"):
        return f"{_NORMS[module]}.{'weight' if leaf == 'scale' else leaf}", lambda array: array
    if (block := _CLIP_BLOCK.fullmatch(path)) and block[3] in _CLIP_LAYER:
        return _of_clip_block(_SIDES[block[1]], block[2], block[3], block[4])
    if mixer := _MIXER.fullmatch(path):
        return _of_head(f"multimodal_encoder.{mixer[1]}", mixer[2], path)
    if path.startswith(_POOL):
        return _of_head("contrastive_multimodal_pooler", path.removeprefix(_POOL), path)
    raise CheckpointError(f"the array {shown(path)} is of no MagicLens")


def _of_clip_block(side: str, layer: str, module: str, leaf: str) -> tuple[str, Callable[[Tensor], Tensor]]:
    name = f"clip.{side}.encoder.layers.{layer}.{_CLIP_LAYER[module]}"
    if leaf == "bias":
        return f"{name}.bias", lambda array: array.flatten()
    if leaf == "scale":
        return f"{name}.weight", lambda array: array
    if module == "attn/out":  # (heads, head, D)
        return f"{name}.weight", lambda array: array.flatten(0, 1).T
    return f"{name}.weight", lambda array: array.flatten(1).T  # (D, out), or (D, heads, head)


def _of_head(prefix: str, path: str, whole: str) -> tuple[str, Callable[[Tensor], Tensor]]:
    """Of the layers above CLIP, which have their own LayerNorm: it multiplies by 1 + scale."""
    module, _, leaf = path.rpartition("/")
    module = re.sub(r"/(linear|bias)$", "", module)
    name = f"{prefix}.{module.replace('/', '.')}"
    if leaf == "scale":
        return f"{name}.weight", lambda array: 1 + array
    if leaf in ("b", "bias"):
        return f"{name}.bias", lambda array: array.flatten()
    if leaf == "w" and module.endswith("post"):  # (D, heads, head)
        return f"{name}.weight", lambda array: array.flatten(1)
    if leaf == "w":  # (D, heads, head) or (in, out)
        return f"{name}.weight", lambda array: array.flatten(1).T
    raise CheckpointError(f"the array {shown(whole)} is of no MagicLens")
