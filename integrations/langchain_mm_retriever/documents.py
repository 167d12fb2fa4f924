"""LlamaIndex nodes to LangChain documents and back, and what a query may look like in LangChain."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

from langchain_core.documents import Document
from llama_index.core.schema import ImageNode, NodeWithScore, TextNode

from mm_retriever.errors import QueryError
from mm_retriever.images import ImageSource

SCORE = "relevance_score"
IMAGE_PATH = "image_path"
IMAGE_URL = "image_url"

ComposedQuery: TypeAlias = str | Mapping[str, Any]
"""A text, or `{"text": ..., "image": ...}` with either or both: a chain hands on one value."""


def to_document(scored: NodeWithScore) -> Document:
    """Return the document of a node: its text ("" for most images), and path, score and all else in the metadata."""
    node = scored.node
    facts = {
        IMAGE_PATH: getattr(node, "image_path", None),
        IMAGE_URL: getattr(node, "image_url", None),
        SCORE: scored.score,
    }
    metadata = {**node.metadata, **{key: value for key, value in facts.items() if value is not None}}
    return Document(id=node.node_id, page_content=node.get_content(), metadata=metadata)


def to_node(document: Document) -> NodeWithScore:
    """Return the node of a document, wherever it comes from: an image if its metadata say where one is."""
    metadata = dict(document.metadata)
    score, path, url = (metadata.pop(key, None) for key in (SCORE, IMAGE_PATH, IMAGE_URL))
    named: dict[str, Any] = {"id_": document.id} if document.id else {}
    node = (
        ImageNode(text=document.page_content, image_path=path, image_url=url, metadata=metadata, **named)
        if path or url
        else TextNode(text=document.page_content, metadata=metadata, **named)
    )
    return NodeWithScore(node=node, score=score)


def read_query(query: ComposedQuery, image: ImageSource | None = None) -> tuple[str, ImageSource | None]:
    """Return text and image of a query.

    Raises:
        QueryError: a mapping with other keys, or an image given twice.
    """
    if not isinstance(query, Mapping):
        return query, image
    if query.keys() - {"text", "image"}:
        raise QueryError(f"a query of {', '.join(map(repr, query))}: give 'text', 'image', or both")
    if image is not None and query.get("image") is not None:
        raise QueryError("an image in the query and image= as well: give one of them")
    return query.get("text") or "", query.get("image") if image is None else image
