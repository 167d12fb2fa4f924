"""Where ingestion keeps what it knows of an image, beside metadata that belong to the caller.

Ingestion stores `file_path`, `width`, `digest` and so on under these names where the caller has no metadata of the same
name; where the caller has, the caller's stay and ours go under the same name after `mm_`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

PREFIX = "mm_"
_SHA256 = re.compile(r"[0-9a-f]{64}")

DESCRIPTIVE_KEYS = ("label", "file_path", "file_name", "width", "height")
"""What ingestion tells a reader about an image."""

FILE_STAMP = "file_stamp"
"""What tells one state of a file from another beside size and time: ctime, inode and device."""

STAMP_KEYS = ("bytes", "mtime_ns", FILE_STAMP, "digest")
"""What ingestion needs to see that a file changed."""

OWN_KEYS = frozenset((*DESCRIPTIVE_KEYS, *STAMP_KEYS))

LAYERS_KEY = f"{PREFIX}columns"
"""Which metadata came from the caller's node, the sidecar and the EXIF block, as JSON."""

OLD_LAYERS_KEY = "metadata_digest"
"""What earlier versions stored in its place: one digest of all of them."""

BOOKKEEPING_KEYS = (
    *STAMP_KEYS,
    OLD_LAYERS_KEY,
    LAYERS_KEY,
    *(f"{PREFIX}{key}" for key in (*DESCRIPTIVE_KEYS, *STAMP_KEYS)),
)
"""What no language model should have to read."""

RESERVED_KEYS = frozenset(key for key in BOOKKEEPING_KEYS if key.startswith(PREFIX))
"""What a caller's metadata cannot be called."""


ITEM_KEY = "item"
"""The column that says which images show one thing, such as the photographs of one product."""


def own_value(metadata: Mapping[str, Any], key: str) -> Any:
    """Return what ingestion stored under one of `OWN_KEYS` in the metadata of a node or a row; None if nothing."""
    own = metadata.get(f"{PREFIX}{key}")
    return metadata.get(key) if own is None else own


def file_digest(metadata: Mapping[str, Any]) -> str | None:
    """Return the SHA-256 of the file of a node; None without one: a caller's `digest` may be any value."""
    digest = own_value(metadata, "digest")
    return digest if isinstance(digest, str) and _SHA256.fullmatch(digest) else None


def own_columns(*keys: str) -> list[str]:
    """Return the columns to fetch so that `own_value` finds these keys."""
    return [name for key in keys for name in (key, f"{PREFIX}{key}")]


def with_own(given: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Return the caller's metadata with ours, by `OWN_KEYS`, beside them; empty values of ours only where needed."""
    plain = {key: value for key, value in own.items() if key not in given and value not in (None, "")}
    # An empty value is kept here: otherwise `own_value` would take the caller's for ours.
    beside = {
        f"{PREFIX}{key}": "" if value is None else value
        for key, value in own.items()
        if key in given and (type(given[key]), given[key]) != (type(value), value)
    }
    return {**given, **plain, **beside}
