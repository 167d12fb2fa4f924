"""Files as ``pickle.dump(flax.serialization.to_bytes(params))`` writes them, for tests of what reads them."""

from __future__ import annotations

import pickle
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor


def write_flax_file(path: Path, arrays: Mapping[str, Tensor]) -> Path:
    """Arrays by their path, joined by "/"."""
    path.write_bytes(pickle.dumps(packed(nested(arrays)), protocol=4))
    return path


def nested(arrays: Mapping[str, Tensor]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, array in arrays.items():
        *folders, leaf = path.split("/")
        place = tree
        for folder in folders:
            place = place.setdefault(folder, {})
        place[leaf] = array.numpy()
    return tree


def packed(value: Any) -> bytes:
    """Msgpack of what flax keeps: maps, lists, texts, whole numbers, true, bytes and arrays."""
    if value is True:
        return b"\xc3"
    if isinstance(value, dict):
        return (
            b"\xdf" + struct.pack(">I", len(value)) + b"".join(packed(part) for pair in value.items() for part in pair)
        )
    if isinstance(value, list | tuple):
        return b"\xdc" + struct.pack(">H", len(value)) + b"".join(map(packed, value))
    if isinstance(value, str):
        return b"\xd9" + struct.pack(">B", len(value.encode())) + value.encode()
    if isinstance(value, bytes):
        return b"\xc6" + struct.pack(">I", len(value)) + value
    if isinstance(value, np.ndarray):
        return extension(1, packed([list(value.shape), value.dtype.name, value.tobytes()]))
    return b"\xd3" + struct.pack(">q", value)


def extension(kind: int, content: bytes) -> bytes:
    return b"\xc9" + struct.pack(">Ib", len(content), kind) + content
