"""LlamaIndex nodes to the rows of a collection, and back, with a checksum that tells whether a row is what was stored.

Owns what may be stored: one vector of finite numbers, metadata of any kind (also as columns where a filter can name
them), an image by its path or URL and never by its bytes. Knows nothing of connections.

The checksum column has three sums: of the columns that a node is rebuilt from, of those that filters test, and of the
vector, so that a query can check the first without fetching the rest. They reveal bit rot and partial updates by other
programs, not forgery. Rows of early versions have none.
"""

from __future__ import annotations

import json
import logging
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
from llama_index.core.schema import (
    BaseNode,
    ImageNode,
    IndexNode,
    Node,
    NodeRelationship,
    RelatedNodeInfo,
    RelatedNodeType,
    TextNode,
)
from llama_index.core.vector_stores.utils import metadata_dict_to_node

from mm_retriever.errors import NodeError, StoreDamagedError, one_line, shown
from mm_retriever.images import is_image_path
from mm_retriever.store.schema import (
    CHECKSUM_FIELD,
    CONTENT_FIELD,
    DOC_ID_FIELD,
    ID_FIELD,
    MAX_INTEGER,
    MAX_TEXT_BYTES,
    SPARSE_FIELD,
    TEXT_FIELD,
    TYPE_FIELD,
    VECTOR_FIELD,
    WORDS_FIELD,
    key_problem,
    takes_lists,
)
from mm_retriever.store.values import plain_metadata, plain_value

logger = logging.getLogger(__name__)

T = TypeVar("T")

_CHECKSUM_BYTES = 64  # among the metadata
_BINARY = re.compile(r"\A%PDF-|[\x00-\x08\x0e-\x1a]")  # no text has these characters


def node_to_row(node: BaseNode, dimension: int) -> dict[str, Any]:
    """Return the row of any node; see `storable_node` and `stored_row`."""
    return stored_row(storable_node(node), dimension)


def stored_row(node: ImageNode | TextNode, dimension: int) -> dict[str, Any]:
    """Return the row of a storable node: ids, text, vector, the node itself as JSON, one column per metadata key.

    A node without a source document is its own document, and is deleted by its own id.

    Raises:
        NodeError: the node has no vector, a vector of another dimension or with NaN, or more than Milvus can hold.
    """
    if not node.node_id:
        raise NodeError("a node with an empty id cannot be stored")
    columns = metadata_columns(node.metadata)
    text = node.get_content()
    _check_text(text, "text", node, MAX_TEXT_BYTES)
    _check_text(node.node_id, "id", node, MAX_TEXT_BYTES)
    whole = _as_json(node)
    for what, size in (
        ("metadata and relationships", len(whole.encode())),
        ("metadata", len(json.dumps(columns, ensure_ascii=False).encode()) + _CHECKSUM_BYTES),
    ):
        if size > MAX_TEXT_BYTES:
            raise NodeError(f"{_name(node)}: {size} bytes of {what}; Milvus takes {MAX_TEXT_BYTES}")
    row = {
        ID_FIELD: node.node_id,
        DOC_ID_FIELD: node.ref_doc_id or node.node_id,
        TEXT_FIELD: text,
        CONTENT_FIELD: whole,
        TYPE_FIELD: _type_name(node),
        VECTOR_FIELD: _vector(node, dimension),
        **columns,
    }
    return {**row, CHECKSUM_FIELD: row_checksum(row)}


def _type_name(node: BaseNode) -> str:
    """The class that LlamaIndex restores; of a subclass it would make a text node, without image or index."""
    kinds = (kind for kind in (ImageNode, IndexNode) if isinstance(node, kind))
    return next(kinds, type(node)).class_name()


def _as_json(node: BaseNode) -> str:
    try:
        node = node.model_copy(update={"relationships": _plain_relationships(node)})
        content = node.model_dump(mode="json", fallback=plain_value)
    except (ValueError, TypeError, RecursionError) as error:  # pydantic's own are ValueErrors
        raise NodeError(f"{_name(node)} cannot be written as JSON: {one_line(error, 300)}") from error
    content.update({VECTOR_FIELD: None, TEXT_FIELD: ""})
    whole = json.dumps(content, ensure_ascii=False)
    return whole if _is_unicode(whole) else json.dumps(content)  # escaped, half a surrogate pair is kept


def _plain_relationships(node: BaseNode) -> dict[NodeRelationship, RelatedNodeType]:
    """The relationships with plain metadata; a text splitter copies the document's metadata into them."""

    def plain(info: RelatedNodeInfo) -> RelatedNodeInfo:
        return info.model_copy(update={"metadata": plain_metadata(info.metadata)})

    return {
        kind: list(map(plain, info)) if isinstance(info, list) else plain(info)
        for kind, info in node.relationships.items()
    }


def row_to_node(row: dict[str, Any]) -> BaseNode:
    """Return the node of a row, with its vector where the row has it.

    A row that another program wrote becomes a TextNode of its text.

    Raises:
        StoreDamagedError: the row is not what this package stored.
    """
    if node_is_damaged(row) or (VECTOR_FIELD in row and vector_is_damaged(row)):
        raise damaged_rows([row[ID_FIELD]])
    text = row.get(TEXT_FIELD) or ""
    try:
        node = metadata_dict_to_node(row, text=text)
    except (ValueError, TypeError, AttributeError, RecursionError):  # such a row must not end a search that meets it
        node = TextNode(text=text)
    if node.node_id != row[ID_FIELD]:  # whatever its content says
        node.id_ = row[ID_FIELD]
    if VECTOR_FIELD in row:
        node.embedding = [float(number) for number in row[VECTOR_FIELD]]
    return node


def storable_node(node: BaseNode, *, drop_bytes: bool = False) -> ImageNode | TextNode:
    """Return the node as it is stored; the caller's stays as it is.

    The result is an ImageNode, IndexNode or TextNode without the bytes of an image, with metadata as JSON takes them
    (see `plain_value`). An image node without a source document becomes its own source. Where the text is the bytes of
    an image file or a piece of them, as `SimpleDirectoryReader` without readers for files gives it, the node becomes
    that image, under the id of the document.

    Args:
        node: any LlamaIndex node or document.
        drop_bytes: also accept an image that exists only as bytes; the result then has no image.

    Raises:
        NodeError: the node is neither text nor image, or its image exists only as bytes.
    """
    try:
        metadata = plain_metadata(node.metadata)
    except (ValueError, RecursionError) as error:
        raise NodeError(f"{_name(node)}: metadata: {error}") from error
    plain = _plain_class(node, metadata, drop_bytes)
    if not isinstance(plain, ImageNode) or plain.ref_doc_id:
        return plain
    source = {NodeRelationship.SOURCE: RelatedNodeInfo(node_id=plain.node_id)}
    return plain.model_copy(update={"relationships": {**plain.relationships, **source}})


def _plain_class(node: BaseNode, metadata: dict[str, Any], drop_bytes: bool) -> ImageNode | TextNode:
    if isinstance(node, ImageNode):
        node = node.model_copy(update={"metadata": metadata})
        return _without_bytes(node, node.image_path, node.image_url, drop_bytes=drop_bytes)
    if isinstance(node, TextNode):
        path = _path_of_bytes(node)
        return _text_fields(node, metadata, path) if path else node.model_copy(update={"metadata": metadata})
    if not isinstance(node, Node):
        raise NodeError(f"{_name(node)} is a {type(node).__name__}; text and image nodes are stored")
    if node.audio_resource or node.video_resource:
        raise NodeError(f"{_name(node)} holds audio or video; text and image nodes are stored")
    image = node.image_resource
    if image is None:
        return _text_fields(node, metadata, _path_of_bytes(node))
    path, url = image.path.as_posix() if image.path else None, str(image.url) if image.url else None
    made = ImageNode(
        **_fields(node, metadata),
        text=node.get_content(),
        image=image.data.decode("latin-1") if image.data else None,
        image_path=path,
        image_url=url,
        image_mimetype=image.mimetype,
    )
    return _without_bytes(made, path, url, drop_bytes=drop_bytes)


def _text_fields(node: TextNode | Node, metadata: dict[str, Any], image_path: str | None) -> ImageNode | TextNode:
    """A text node or, where the text is the bytes of an image, an image node without the text."""
    if image_path:
        id_ = node.ref_doc_id or node.node_id  # all pieces that a text splitter has made of one image are that image
        kept = {key: info for key, info in node.relationships.items() if key is NodeRelationship.SOURCE}
        return ImageNode(**_fields(node, metadata) | {"id_": id_, "relationships": kept}, image_path=image_path)
    return TextNode(**_fields(node, metadata), text=node.get_content())


def _fields(node: TextNode | Node, metadata: dict[str, Any]) -> dict[str, Any]:
    names = ("embedding", "excluded_embed_metadata_keys", "excluded_llm_metadata_keys", "metadata_template")
    kept = {name: getattr(node, name) for name in (*names, "metadata_separator", "text_template", "relationships")}
    return {"id_": node.node_id, "metadata": metadata, **kept}


def _path_of_bytes(node: TextNode | Node) -> str | None:
    """The path of the image file that a node stands for: its text is the file's bytes, or empty. None for a text.

    Raises:
        NodeError: the text is the bytes of another kind of file.
    """
    text = node.get_content()
    path = str(node.metadata.get("file_path") or "")
    if text.strip() and not _is_file(text, of_image=is_image_path(path)):
        return None
    if not is_image_path(path):
        if not text.strip():
            return None
        raise NodeError(f"{_name(node)}: {bytes_as_text(path)}")
    return path


def _is_file(text: str, *, of_image: bool) -> bool:
    """Whether a text is the bytes of a file; outside of images, a few stray control characters do not count."""
    if of_image or text.startswith("%PDF-"):
        return _BINARY.search(text) is not None
    sample = text[:4096]
    return 20 * sum(_BINARY.match(sign) is not None for sign in sample) > len(sample)


def bytes_as_text(path: str) -> str:
    """Return the reason why a text that is the bytes of a file other than an image is refused."""
    return (
        f"its text is the bytes of a file ({path or 'of no known name'}): read that with a reader for its format, "
        'SimpleDirectoryReader(..., file_extractor={".pdf": ...}), or pip install llama-index-readers-file'
    )


def has_control_characters(text: str) -> bool:
    """Whether a text has characters that occur in binary files only."""
    return _BINARY.search(text) is not None


def metadata_columns(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return the columns that filters test: text, numbers and lists of either; bools as 1 or 0; None and [] left out.

    Metadata that a filter cannot name or compare stay in the node only: reserved keys (`id`, `text`, ...), keys with
    characters like `:` and `/`, nested values, integers of more than 64 bits.
    """
    return {
        key: _column_value(value) for key, value in metadata.items() if not _is_missing(value) and _fits(key, value)
    }


def unfiltered_keys(metadata: Mapping[str, Any]) -> list[str]:
    """Return the keys whose values, other than None and [], `metadata_columns` leaves out."""
    return [key for key, value in metadata.items() if not _is_missing(value) and not _fits(key, value)]


def log_unfiltered(nodes: Iterable[BaseNode], logged: set[str]) -> None:
    """Log the keys that filters cannot name, once each; `logged` has those that were logged before."""
    keys = {key for node in nodes for key in unfiltered_keys(node.metadata)} - logged
    if keys:
        logged |= keys
        some = ", ".join(map(repr, sorted(keys)[:9]))
        logger.warning(
            "metadata that filters cannot name or compare stay in the nodes only: %s (reserved or unusual keys, "
            "nested values, lists of anything but text and numbers)",
            some if len(keys) <= 9 else f"{some} and {len(keys) - 9} more",
        )


def _is_missing(value: object) -> bool:
    return value is None or value == []


def _fits(key: str, value: object) -> bool:
    if key_problem(key) is not None:
        return False
    return takes_lists(key) and all(map(_is_flat, value)) if isinstance(value, list) else _is_flat(value)


def _is_flat(value: object) -> bool:
    if isinstance(value, str):
        return _is_unicode(value)
    if isinstance(value, int):
        return -MAX_INTEGER <= value <= MAX_INTEGER
    return isinstance(value, float)


def _column_value(value: Any) -> Any:
    if isinstance(value, list):
        return [_column_value(item) for item in value]
    return int(value) if isinstance(value, bool) else value


def _without_bytes(node: ImageNode, path: str | None, url: str | None, *, drop_bytes: bool) -> ImageNode:
    is_data = url is not None and url[:5].lower() == "data:"
    has_bytes, url = is_data or bool(node.image), None if is_data else url
    if has_bytes and not path and not url and not drop_bytes:
        raise NodeError(
            f"{_name(node)} carries its image as bytes and no path or URL: Milvus is no place for files; "
            "save the image and set image_path, or give the node to ingest_images"
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


# ------------------------------------------------------------------------------------------ checksums

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
    """Return the error for rows that are not what was stored."""
    some = ", ".join(shown(id_) for id_ in ids[:10]) + (f" and {len(ids) - 10} more" if len(ids) > 10 else "")
    return StoreDamagedError(
        f"what the store holds under the id {some} is not what was stored there (its checksum differs): the disk or "
        "another program changed it. `mm-retriever info --db ... --verify` lists all such rows; restore the store "
        "from a backup, or remove them (store.delete_nodes) and index again"
    )


def _node_sum(row: Mapping[str, Any]) -> str:
    return _sum(json.dumps([row.get(name) for name in _NODE]).encode())


def _columns_sum(row: Mapping[str, Any]) -> str:
    # None is never stored; a field of another program's schema that a row does not have comes back so
    columns = {name: value for name, value in row.items() if name not in _NOT_METADATA and value is not None}
    return _sum(json.dumps([row.get(DOC_ID_FIELD), columns], sort_keys=True, default=str).encode())


def _vector_sum(row: Mapping[str, Any]) -> str:
    return _sum(np.ascontiguousarray(row[VECTOR_FIELD], dtype="<f4").tobytes())


def _sum(content: bytes) -> str:
    return f"{zlib.crc32(content):08x}"


def without_checksums(rows: Sequence[dict[str, Any]], names: Sequence[str]) -> Sequence[dict[str, Any]]:
    """Return the rows without the checksum, unless it is named; "*" does not name it."""
    for row in rows if CHECKSUM_FIELD not in names else ():
        row.pop(CHECKSUM_FIELD, None)
    return rows


def chunks(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """Yield the items in order, `size` at a time."""
    for start in range(0, len(items), size):
        yield items[start : start + size]
