"""LlamaIndex nodes to the rows of a collection, and back.

Owns what may be stored: one vector of finite numbers, flat metadata under keys that filters can name, a picture by its
path or URL and never by its bytes. Knows nothing of connections.
"""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
from llama_index.core.schema import BaseNode, ImageNode, MediaResource, Node, TextNode
from llama_index.core.vector_stores.utils import metadata_dict_to_node

from mm_retriever.errors import NodeError, shown
from mm_retriever.store.checksums import damaged_rows, node_is_damaged, row_checksum
from mm_retriever.store.filters import (
    CHECKSUM_FIELD,
    CONTENT_FIELD,
    DOC_ID_FIELD,
    ID_FIELD,
    MAX_INTEGER,
    MAX_TEXT_BYTES,
    TEXT_FIELD,
    TYPE_FIELD,
    VECTOR_FIELD,
    key_problem,
    takes_lists,
)

NODE_FIELDS = (TEXT_FIELD, CONTENT_FIELD, TYPE_FIELD, CHECKSUM_FIELD)
"""What a node is rebuilt from, and its checksum: fetching the vectors too would double the time of a query."""

_CHECKSUM_BYTES = 64  # among the metadata


def node_to_row(node: BaseNode, dimension: int) -> dict[str, Any]:
    """Return the row of a node: id, document id, text, vector, the node itself as JSON, one column per metadata key.

    Raises:
        NodeError: the node has no vector, a vector of another dimension or with NaN, or something Milvus cannot hold.
    """
    node = storable_node(node)
    columns = metadata_columns(node.metadata, owner=_name(node))
    text = node.get_content()
    _check_text(text, "text", node, MAX_TEXT_BYTES)
    _check_text(node.node_id, "id", node, MAX_TEXT_BYTES)
    if not node.node_id:
        raise NodeError("a node with an empty id cannot be stored")
    content = node.model_dump(mode="json")
    content.update({VECTOR_FIELD: None, TEXT_FIELD: ""})
    whole = json.dumps(content, ensure_ascii=False)
    for what, size in (
        ("metadata and relationships", len(whole.encode("utf-8", "replace"))),
        ("metadata", len(json.dumps(columns, ensure_ascii=False).encode("utf-8", "replace")) + _CHECKSUM_BYTES),
    ):
        if size > MAX_TEXT_BYTES:
            raise NodeError(f"{_name(node)}: {size} bytes of {what}; Milvus takes {MAX_TEXT_BYTES}")
    row = {
        ID_FIELD: node.node_id,
        DOC_ID_FIELD: node.ref_doc_id or "",
        TEXT_FIELD: text,
        CONTENT_FIELD: whole,
        TYPE_FIELD: node.class_name(),
        VECTOR_FIELD: _vector(node, dimension),
        **columns,
    }
    return {**row, CHECKSUM_FIELD: row_checksum(row)}


def row_to_node(row: dict[str, Any]) -> BaseNode:
    """Return the node of a row; a row that another program wrote becomes a TextNode of its text.

    Raises:
        StoreDamagedError: the row is not what this package stored.
    """
    if node_is_damaged(row):
        raise damaged_rows([row[ID_FIELD]])
    text = row.get(TEXT_FIELD) or ""
    try:
        node = metadata_dict_to_node(row, text=text)
    except (ValueError, TypeError, AttributeError, RecursionError):  # such a row must not end a search that meets it
        return TextNode(id_=row[ID_FIELD], text=text)
    node.id_ = row[ID_FIELD]  # whatever its content says
    return node


def storable_node(node: BaseNode) -> ImageNode | TextNode:
    """Return the node as an ImageNode, IndexNode or TextNode without picture bytes; the caller's stays as it is."""
    if isinstance(node, ImageNode):
        return _without_bytes(node, node.image_path, node.image_url, has_bytes=bool(node.image))
    if isinstance(node, TextNode):
        return node
    if not isinstance(node, Node):
        raise NodeError(f"{_name(node)} is a {type(node).__name__}; text and image nodes are stored")
    if node.audio_resource or node.video_resource:
        raise NodeError(f"{_name(node)} holds audio or video; text and image nodes are stored")
    kept: dict[str, Any] = {
        "id_": node.node_id,
        "embedding": node.embedding,
        "metadata": node.metadata,
        "excluded_embed_metadata_keys": node.excluded_embed_metadata_keys,
        "excluded_llm_metadata_keys": node.excluded_llm_metadata_keys,
        "metadata_template": node.metadata_template,
        "metadata_separator": node.metadata_separator,
        "text_template": node.text_template,
        "relationships": node.relationships,
        "text": node.text_resource.text or "" if node.text_resource else "",
    }
    picture = node.image_resource
    if picture is None:
        return TextNode(**kept)
    path, url = _place(picture)
    image = ImageNode(image_path=path, image_url=url, image_mimetype=picture.mimetype, **kept)
    return _without_bytes(image, path, url, has_bytes=picture.data is not None)


def metadata_columns(metadata: dict[str, Any], *, owner: str) -> dict[str, Any]:
    """Return the columns that filters see: text, numbers, lists of either; a bool as 1 or 0; nothing for None and [].

    Args:
        metadata: the metadata of a node.
        owner: whose metadata it is, for messages.

    Raises:
        NodeError: a key that is reserved or no name, or a value that is nested, not finite or not Unicode.
    """
    columns = {}
    for key, value in metadata.items():
        if (problem := key_problem(key)) is not None:
            raise NodeError(f"{owner}: metadata: {problem}")
        if isinstance(value, list | tuple) and not takes_lists(key):
            raise NodeError(f"{owner}: metadata {key!r}: a list needs a key of ASCII letters, digits and '_'")
        column = _column_value(value, f"{owner}: metadata {key!r}")
        if column is not None and column != []:
            columns[key] = column
    return columns


def _column_value(value: object, where: str) -> object:
    if isinstance(value, list | tuple):
        if any(one is None or isinstance(one, list | tuple) for one in value):
            raise NodeError(f"{where}: a list may hold text and numbers only")
        return [_column_value(one, where) for one in value]
    if isinstance(value, str):
        if not _is_unicode(value):
            raise NodeError(f"{where}: holds half a surrogate pair, which is not Unicode text")
        return value
    if isinstance(value, int):
        if not -MAX_INTEGER <= value <= MAX_INTEGER:
            raise NodeError(f"{where}: {shown(value)} does not fit into 64 bits")
        return int(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise NodeError(f"{where}: {value!r} is not a finite number")
        return float(value)
    if value is None:
        return None
    raise NodeError(
        f"{where}: a {type(value).__name__} is not flat; give text, numbers, bools or lists of them, "
        "one key for each value (for example 'size_width' and 'size_height' for {'size': {...}})"
    )


def _place(picture: MediaResource) -> tuple[str | None, str | None]:
    return (picture.path.as_posix() if picture.path else None, str(picture.url) if picture.url else None)


def _without_bytes(node: ImageNode, path: str | None, url: str | None, *, has_bytes: bool) -> ImageNode:
    if url is not None and url[:5].lower() == "data:":
        path, url, has_bytes = path, None, True
    if not path and not url and has_bytes:
        raise NodeError(
            f"{_name(node)} carries its picture as bytes and no path or URL: Milvus is no place for files; "
            "save the picture and set image_path"
        )
    if node.image is None and node.image_url == url:
        return node
    return node.model_copy(update={"image": None, "image_url": url})


def _vector(node: BaseNode, dimension: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    if node.embedding is None:
        raise NodeError(f"{_name(node)} has no embedding; embed it before it is stored")
    with np.errstate(over="ignore"):  # what does not fit becomes infinite, and is refused below
        vector = np.asarray(node.embedding, dtype=np.float32)
    if vector.shape != (dimension,):
        raise NodeError(f"{_name(node)}: a vector of {vector.size} numbers; the collection holds {dimension}")
    if not np.isfinite(vector).all():
        raise NodeError(f"{_name(node)}: the vector holds NaN or infinity")
    return vector


def _check_text(text: str, what: str, node: BaseNode, limit: int) -> None:
    if not _is_unicode(text):
        raise NodeError(f"{_name(node)}: the {what} holds half a surrogate pair, which is not Unicode text")
    if (size := len(text.encode())) > limit:
        raise NodeError(f"{_name(node)}: a {what} of {size} bytes; Milvus takes {limit}, split it into smaller nodes")


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _name(node: BaseNode) -> str:
    return f"node {node.node_id[:80]!r}"
