"""Rows and ids in parts, as requests take and give them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

from mm_retriever.store.schema import CHECKSUM_FIELD

T = TypeVar("T")


def without_checksums(rows: Sequence[dict[str, Any]], names: Sequence[str]) -> Sequence[dict[str, Any]]:
    """Return the rows with the named columns alone: "*" does not ask for checksums."""
    for row in rows if CHECKSUM_FIELD not in names else ():
        row.pop(CHECKSUM_FIELD, None)
    return rows


def chunks(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """Yield the items in order, so many at a time."""
    for start in range(0, len(items), size):
        yield items[start : start + size]
