"""Metadata from numpy, pandas, EXIF readers or databases as plain JSON values."""

from __future__ import annotations

import base64
import dataclasses
import datetime
import enum
import math
import numbers
from collections.abc import Mapping, Set
from typing import Any

from llama_index.core.bridge.pydantic import BaseModel

MAX_DEPTH = 32
"""Of lists and mappings inside each other."""


def plain_metadata(metadata: Mapping[Any, Any]) -> dict[str, Any]:
    """Return the metadata as plain JSON values; equal metadata give equal results.

    Raises:
        ValueError: values that are nested deeper than `MAX_DEPTH`, or in themselves.
    """
    return {_key(key): plain_value(value) for key, value in metadata.items()}


def plain_value(value: Any, depth: int = 0) -> Any:
    """Return the nearest JSON value.

    Text, bools, whole numbers and finite numbers stay. Dates and times become ISO text, other numbers (numpy, Decimal,
    Fraction) numbers, arrays, tuples and sets lists (sets sorted), mappings and dataclasses objects with text keys, an
    Enum its value, bytes their text or base64. NaN, NaT and NA are missing values and become None. Anything else
    (paths, UUIDs, infinity) becomes text.
    """
    if depth > MAX_DEPTH:
        raise ValueError(f"nested more than {MAX_DEPTH} deep")
    if isinstance(value, enum.Enum):
        return plain_value(value.value, depth + 1)
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if _is_missing(value):
        return None
    if isinstance(value, datetime.date | datetime.time):  # pandas' Timestamp is one of them
        return value.isoformat()
    if isinstance(value, bytes | bytearray | memoryview):
        return _text_of(bytes(value))
    if isinstance(value, Mapping):
        return {_key(key): plain_value(item, depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain_value(item, depth + 1) for item in value]
    if isinstance(value, Set):
        return sorted((plain_value(item, depth + 1) for item in value), key=lambda item: (str(type(item)), str(item)))
    return _number(value) if isinstance(value, numbers.Number) else _other(value, depth)


def _number(value: Any) -> Any:
    """A number of any library; Decimal is one only by name."""
    if isinstance(value, numbers.Integral):
        return int(value)
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):  # complex, or more than a float holds
        return str(value)
    if math.isinf(number):
        return str(number)
    return None if math.isnan(number) else number


def _other(value: Any, depth: int) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return plain_value(fields, depth + 1)
    if isinstance(value, BaseModel):
        return plain_value(value.model_dump(), depth + 1)
    if type(value).__name__ == "datetime64":  # numpy's own, which turns into a number of nanoseconds
        return str(value)
    if callable(to_list := getattr(value, "tolist", None)):  # arrays, Series and tensors
        return plain_value(to_list(), depth + 1)
    return str(value)


def _is_missing(value: Any) -> bool:
    """Whether it is pandas' NaT or NA, or numpy's NaT; by name, so that pandas need not be installed."""
    name = type(value).__name__
    return name in ("NaTType", "NAType") or (name in ("datetime64", "timedelta64") and value != value)


def _text_of(data: bytes) -> str:
    """The text in the bytes (as EXIF has it, with zeros at its end), or base64 of them."""
    try:
        return data.rstrip(b"\0").decode()
    except UnicodeDecodeError:
        return base64.b64encode(data).decode()


def _key(key: Any) -> str:
    if isinstance(key, str):
        return str.__str__(key)
    return str(key.value if isinstance(key, enum.Enum) else key)
