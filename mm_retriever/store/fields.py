"""The columns of a collection: their names, what may be stored in them, and which metadata keys can be columns too."""

from __future__ import annotations

import re

ID_FIELD = "id"
DOC_ID_FIELD = "doc_id"
TEXT_FIELD = "text"
VECTOR_FIELD = "embedding"
WORDS_FIELD = "_words"
SPARSE_FIELD = "_sparse"
CONTENT_FIELD = "_node_content"
TYPE_FIELD = "_node_type"
CHECKSUM_FIELD = "_row_checksum"

OWN_TEXT_COLUMNS = {
    ID_FIELD: ID_FIELD,
    DOC_ID_FIELD: DOC_ID_FIELD,
    "document_id": DOC_ID_FIELD,  # the names that other LlamaIndex stores give to the same thing
    "ref_doc_id": DOC_ID_FIELD,
    TEXT_FIELD: TEXT_FIELD,
}
_OTHER_COLUMNS = (VECTOR_FIELD, WORDS_FIELD, SPARSE_FIELD, CONTENT_FIELD, TYPE_FIELD, CHECKSUM_FIELD)
RESERVED_KEYS = frozenset((*OWN_TEXT_COLUMNS, *_OTHER_COLUMNS, "_seq", "_partition"))

MAX_TEXT_BYTES = 65_535
"""Of a text, of a node as JSON, and of all its metadata columns together: what a Milvus column holds."""

MAX_INTEGER = 2**63 - 1

_KEY = re.compile(r"\w[\w .-]{0,127}")
_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}")
_KEYWORDS = frozenset(("and", "or", "not", "in", "like", "is", "null", "exists", "iso", "interval", "true", "false"))


def key_problem(key: object) -> str | None:
    """Return why a metadata key cannot be a column that filters name, or None if it can."""
    if not isinstance(key, str):
        return f"a key must be text, not {type(key).__name__}"
    if key in RESERVED_KEYS:
        return f"{key!r} is a column of the store itself; choose another name"
    if not _KEY.fullmatch(key):
        return f"{key[:60]!r} is not a key: up to 128 letters, digits, '_', ' ', '.' and '-', the first no punctuation"
    return None


def takes_lists(key: str) -> bool:
    """Whether lists may be stored under the key: Milvus' list functions take plain ASCII identifiers only."""
    return _IDENTIFIER.fullmatch(key) is not None and key.lower() not in _KEYWORDS
