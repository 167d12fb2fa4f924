"""The checksum column of a row: whether what comes back is what was stored.

Three sums, of what a node is rebuilt from, of what filters look at, and of the vector, so that a query can check the
first without fetching the rest. They show bit rot and half an update by another program, not a forgery. Rows that were
stored by versions before this have none.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mm_retriever.errors import StoreDamagedError, shown
from mm_retriever.store.fields import (
    CHECKSUM_FIELD,
    CONTENT_FIELD,
    DOC_ID_FIELD,
    ID_FIELD,
    SPARSE_FIELD,
    TEXT_FIELD,
    TYPE_FIELD,
    VECTOR_FIELD,
    WORDS_FIELD,
)

_NODE = (ID_FIELD, TEXT_FIELD, CONTENT_FIELD, TYPE_FIELD)
_NOT_METADATA = {*_NODE, DOC_ID_FIELD, VECTOR_FIELD, WORDS_FIELD, SPARSE_FIELD, CHECKSUM_FIELD}
_FORM = re.compile(r"1-([0-9a-f]{8})-([0-9a-f]{8})-([0-9a-f]{8})")


def row_checksum(row: Mapping[str, Any]) -> str:
    """Return the checksum of a row as it is stored."""
    return f"1-{_node_sum(row)}-{_columns_sum(row)}-{_vector_sum(row)}"


def has_checksum(row: Mapping[str, Any]) -> bool:
    """Whether the row was stored with a checksum."""
    value = row.get(CHECKSUM_FIELD)
    return isinstance(value, str) and _FORM.fullmatch(value) is not None


def node_is_damaged(row: Mapping[str, Any]) -> bool:
    """Whether what a node is rebuilt from differs from what was stored; False for a row without a checksum."""
    match = _FORM.fullmatch(str(row.get(CHECKSUM_FIELD)))
    return match is not None and match[1] != _node_sum(row)


def vector_is_damaged(row: Mapping[str, Any]) -> bool:
    """Whether the vector of a row differs from what was stored; False for a row without a checksum."""
    match = _FORM.fullmatch(str(row.get(CHECKSUM_FIELD)))
    return match is not None and match[3] != _vector_sum(row)


def row_is_damaged(row: Mapping[str, Any]) -> bool:
    """Whether anything in a whole row differs from what was stored; False for a row without a checksum."""
    return has_checksum(row) and row[CHECKSUM_FIELD] != row_checksum(row)


def damaged_rows(ids: Sequence[str]) -> StoreDamagedError:
    """Return the error that rows are not what was stored."""
    some = ", ".join(shown(id_) for id_ in ids[:10]) + (f" and {len(ids) - 10} more" if len(ids) > 10 else "")
    return StoreDamagedError(
        f"what the store holds under the id {some} is not what was stored there (its checksum differs): the disk or "
        "another program changed it. `mm-retriever info --db ... --verify` lists all such rows; restore the store "
        "from a backup, or remove them (store.delete_nodes) and index again"
    )


def _node_sum(row: Mapping[str, Any]) -> str:
    return _sum(json.dumps([row.get(name) for name in _NODE]).encode())


def _columns_sum(row: Mapping[str, Any]) -> str:
    columns = {name: value for name, value in row.items() if name not in _NOT_METADATA}
    return _sum(json.dumps([row.get(DOC_ID_FIELD), columns], sort_keys=True, default=str).encode())


def _vector_sum(row: Mapping[str, Any]) -> str:
    return _sum(np.ascontiguousarray(row[VECTOR_FIELD], dtype="<f4").tobytes())


def _sum(content: bytes) -> str:
    return f"{zlib.crc32(content):08x}"
