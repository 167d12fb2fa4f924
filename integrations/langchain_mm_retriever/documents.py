"""LlamaIndex nodes to LangChain documents and back, and what queries and filters may look like in LangChain."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence, Set
from datetime import date, time
from decimal import Decimal
from enum import Enum
from pathlib import Path
from typing import Any, TypeAlias
from urllib.parse import unquote
from uuid import UUID

from langchain_core.documents import Document
from langchain_core.messages import BaseMessage, HumanMessage
from langchain_core.messages.content import ContentBlock
from llama_index.core.schema import BaseNode, ImageNode, NodeWithScore, TextNode
from llama_index.core.vector_stores.types import FilterCondition, FilterOperator, MetadataFilter, MetadataFilters
from pydantic import ValidationError

from mm_retriever.errors import FilterError, QueryError, shown
from mm_retriever.images import ImageSource
from mm_retriever.own_keys import own_columns
from mm_retriever.store import ImageStore
from mm_retriever.store.conditions import condition
from mm_retriever.store.values import plain_value

SCORE = "relevance_score"
IMAGE_PATH = "image_path"
IMAGE_URL = "image_url"

ComposedQuery: TypeAlias = str | Mapping[str, Any] | BaseMessage | Sequence[ContentBlock | dict[str, Any] | str]
"""A text; `{"text": ..., "image": ...}` with either or both, since a chain hands on one value; a message, or its
content blocks, with at most one image."""

Filters: TypeAlias = MetadataFilters | Mapping[str, Any]
"""LlamaIndex's filters, or a mapping: `{"label": "mug", "price": {"$lt": 20}}`."""

_NAMES = ("caption", "label", "file_name")  # what an image is said to be, where it has no text
_Op = FilterOperator
_OPERATORS = {
    "$eq": _Op.EQ, "$ne": _Op.NE, "$gt": _Op.GT, "$gte": _Op.GTE, "$lt": _Op.LT, "$lte": _Op.LTE,
    "$in": _Op.IN, "$nin": _Op.NIN,
}  # fmt: skip
_JOINED = {"$and": FilterCondition.AND, "$or": FilterCondition.OR}


def to_document(scored: NodeWithScore, *, with_score: bool = False) -> Document:
    """Return the document of a node.

    Its `page_content` is the text of the node, or, for an image without text, what the image is: caption, label and
    file name, as far as they are known, or the last part of its place.

    Args:
        scored: the node.
        with_score: also put the score into the metadata, where it makes one image of two queries two documents.
    """
    node = scored.node
    facts = {IMAGE_PATH: getattr(node, "image_path", None), IMAGE_URL: getattr(node, "image_url", None)}
    if with_score:
        facts[SCORE] = scored.score
    metadata = {**node.metadata, **{key: value for key, value in facts.items() if value is not None}}
    text = node.get_content() or (_what_it_is(metadata) if isinstance(node, ImageNode) else "")
    return Document(id=node.node_id, page_content=text, metadata=metadata)


def _what_it_is(metadata: Mapping[str, Any]) -> str:
    if names := ", ".join(str(metadata[name]) for name in _NAMES if metadata.get(name)):
        return names
    if path := metadata.get(IMAGE_PATH):
        return Path(path).name
    url = str(metadata.get(IMAGE_URL) or "")
    return "" if url.startswith("data:") else unquote(Path(re.split("[?#]", url)[0]).name)


def to_node(document: Document) -> NodeWithScore:
    """Return the node of a document, wherever it comes from: an image if its metadata say where one is."""
    metadata = dict(document.metadata)
    known = _what_it_is(metadata) if metadata.get(IMAGE_PATH) or metadata.get(IMAGE_URL) else ""
    score, path, url = (metadata.pop(key, None) for key in (SCORE, IMAGE_PATH, IMAGE_URL))
    named: dict[str, Any] = {"id_": document.id} if document.id else {}
    node: BaseNode
    if path or url:
        path = os.path.expanduser(path) if path else None  # noqa: PTH111 - a path of any kind, as text
        own = "" if document.page_content == known else document.page_content
        node = ImageNode(text=own, image_path=path and os.fspath(path), image_url=url, metadata=metadata, **named)
    else:
        node = TextNode(text=document.page_content, metadata=metadata, **named)
    return NodeWithScore(node=node, score=score)


def read_query(query: ComposedQuery, image: ImageSource | None = None) -> tuple[str, ImageSource | None]:
    """Return text and image of a query.

    Raises:
        QueryError: a mapping with other keys, a block of another kind, or more than one image.
    """
    if isinstance(query, BaseMessage):
        query = query.content_blocks
    elif isinstance(query, list | tuple):  # blocks as any provider has them, as messages take them
        try:
            query = HumanMessage([dict(part) if isinstance(part, Mapping) else part for part in query]).content_blocks
        except ValidationError:
            raise QueryError(f"a query of {shown(query)}: give content blocks, or words") from None
    if isinstance(query, str):
        return query, image
    images = [] if image is None else [image]
    if not isinstance(query, Mapping | Sequence):
        raise QueryError(f"a query of {shown(query)}: give a text, {{'text': ..., 'image': ...}}, or a message")
    if isinstance(query, Mapping):
        if query.keys() - {"text", "image"}:
            raise QueryError(f"a query of {', '.join(map(repr, query))}: give 'text', 'image', or both")
        text = query.get("text") or ""
        images += [] if query.get("image") is None else [query["image"]]
    else:
        read = [_read_block(block) for block in query]
        text = "\n".join(words for words, _ in read if words)
        images += [picture for _, picture in read if picture is not None]
    if len(images) > 1:
        raise QueryError(f"{len(images)} images in one query: give one of them")
    return text, images[0] if images else None


def _read_block(block: ContentBlock | dict[str, Any] | str) -> tuple[str, ImageSource | None]:
    """Text and image of a content block, in LangChain's standard form or in OpenAI's."""
    if isinstance(block, str):
        return block, None
    given: Mapping[str, Any] = dict(block)
    if given.get("type") in ("text", "text-plain"):
        return str(given.get("text") or ""), None
    if given.get("type") == "image_url":
        linked = given.get("image_url")
        linked = linked.get("url") if isinstance(linked, Mapping) else linked
        if isinstance(linked, str):
            return "", linked
    if given.get("type") == "image":
        if isinstance(given.get("base64"), str):
            return "", f"data:{given.get('mime_type') or 'image/unknown'};base64,{given['base64']}"
        if isinstance(given.get("url"), str):
            return "", given["url"]
    raise QueryError(f"a content block of type {shown(given.get('type'))}: give text, and an image as base64 or URL")


def read_filters(filters: Filters | None, store: ImageStore) -> MetadataFilters | None:
    """Return filters as LlamaIndex has them.

    A mapping names columns: `{"label": "mug"}`; a list means any of them. `$eq`, `$ne`, `$gt`, `$gte`, `$lt`, `$lte`,
    `$in` and `$nin` compare otherwise, `{"price": {"$gte": 5, "$lt": 20}}`; `$and` and `$or` join lists of mappings.
    Bools and dates are compared as they are stored. `image_path` and `image_url`, which documents have and rows do
    not, become the ids of the rows.

    Raises:
        FilterError: anything else.
    """
    if filters is None:
        return None
    if isinstance(filters, MetadataFilters):
        return _with_ids(filters, store)
    if not isinstance(filters, Mapping):
        raise FilterError(f"filters must be MetadataFilters or a mapping like {{'label': 'mug'}}, got {shown(filters)}")
    return _with_ids(_all_of(filters), store)


def _with_ids(group: MetadataFilters, store: ImageStore) -> MetadataFilters:
    """The filters with ids in the place of places."""
    filters: list[MetadataFilter | MetadataFilters] = []
    for item in group.filters:
        if isinstance(item, MetadataFilters):
            filters.append(_with_ids(item, store))
        else:
            filters.append(_by_ids(item, store) if item.key in (IMAGE_PATH, IMAGE_URL) else item)
    return MetadataFilters(filters=filters, condition=group.condition)


def _by_ids(item: MetadataFilter, store: ImageStore) -> MetadataFilter:
    """The condition that a row has one of the ids of the images that lie in these places."""
    places = item.value if isinstance(item.value, list) else [item.value]
    if item.operator not in (_Op.EQ, _Op.NE, _Op.IN, _Op.NIN) or not all(isinstance(place, str) for place in places):
        raise FilterError(f"{item.key!r} is where images lie: compare it by $eq, $ne, $in or $nin with text")
    columns = own_columns("file_path")  # which ingestion stores; of other rows the node alone has the place
    named = [MetadataFilter(key=key, operator=_Op.IN, value=list(map(str, places))) for key in columns]
    others = MetadataFilters(filters=[MetadataFilter(key=key, value=None) for key in columns])
    perhaps = MetadataFilters(filters=[*named, others], condition=FilterCondition.OR)
    ids = [node.node_id for node in store.get_nodes(filters=perhaps) if getattr(node, item.key, None) in places]
    return MetadataFilter(key="id", operator=_Op.IN if item.operator in (_Op.EQ, _Op.IN) else _Op.NIN, value=ids)


def _all_of(filters: Mapping[str, Any]) -> MetadataFilters:
    return MetadataFilters(filters=[part for key, value in filters.items() for part in _conditions(key, value)])


def _conditions(key: object, value: Any) -> list[MetadataFilter | MetadataFilters]:
    if not isinstance(key, str):
        raise FilterError(f"key {shown(key)}: give the name of a metadata column")
    if key in _JOINED:
        if not isinstance(value, list | tuple) or not all(isinstance(part, Mapping) for part in value):
            raise FilterError(f"{key} {shown(value)}: give a list of mappings")
        return [MetadataFilters(filters=[_all_of(part) for part in value], condition=_JOINED[key])]
    if key.startswith("$"):
        raise FilterError(f"{key} is not one of {', '.join([*_JOINED, *_OPERATORS])}, or needs a column before it")
    if isinstance(value, Mapping) and not value:
        raise FilterError(f"{key!r}: an empty mapping asks for nothing; give a value, or {{'$gt': ...}}")
    several = isinstance(value, list | tuple | Set)
    compared = value if isinstance(value, Mapping) else {"$in" if several else "$eq": value}
    for operator in compared:
        if operator not in _OPERATORS:
            raise FilterError(f"operator {shown(operator)} of {key!r}: give one of {', '.join(_OPERATORS)}")
    try:
        return [_comparison(key, _OPERATORS[name], _plain(wanted)) for name, wanted in compared.items()]
    except ValidationError:
        raise FilterError(f"{key!r}: {shown(value)} is no value of a filter: give text, a number or a list") from None


def _comparison(key: str, operator: FilterOperator, value: Any) -> MetadataFilter | MetadataFilters:
    if operator in (_Op.IN, _Op.NIN) and isinstance(value, list):
        return condition(key, operator.value, value)  # of texts and numbers together, which no filter holds
    return MetadataFilter(key=key, value=value, operator=operator)


def _plain(value: Any) -> Any:
    """A value as metadata have it: dates as ISO text, and a bool as the text that equals it however it is stored."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list | tuple | Set):
        return [_plain(item) for item in value]
    if isinstance(value, date | time | Decimal | UUID | Enum | os.PathLike) or hasattr(value, "tolist"):
        plain = plain_value(value)
        return _plain(plain) if isinstance(plain, bool | list) else plain
    return value
