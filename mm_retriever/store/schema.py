"""The schema of a new collection, the properties that say which model made its vectors, and the options of a store."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from llama_index.vector_stores.milvus import MilvusVectorStore
from pymilvus import CollectionSchema, DataType, MilvusClient

from mm_retriever.errors import StoreError, shown
from mm_retriever.store.fields import (
    CONTENT_FIELD,
    DOC_ID_FIELD,
    ID_FIELD,
    MAX_TEXT_BYTES,
    TEXT_FIELD,
    TYPE_FIELD,
    VECTOR_FIELD,
)
from mm_retriever.store.rows import NODE_FIELDS
from mm_retriever.store.words import WordIndex

WRITE_ROWS = 256
"""Rows sent with one request."""

INDEXES = ("FLAT", "HNSW", "AUTOINDEX")
METRICS = ("IP", "COSINE")

_MODEL_PROPERTY = "mm_retriever.model"
_NOTE_PROPERTY = "mm_retriever.model_note"
SPARSE_PROPERTY = "mm_retriever.sparse_model"
ANALYZER_PROPERTY = "mm_retriever.analyzer"
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,254}")


def collection_schema(dimension: int, words: WordIndex | None, description: str = "") -> CollectionSchema:
    """Return the columns of a collection; metadata are dynamic ones."""
    schema = MilvusClient.create_schema(auto_id=False, enable_dynamic_field=True, description=description)
    schema.add_field(ID_FIELD, DataType.VARCHAR, is_primary=True, max_length=MAX_TEXT_BYTES)
    # The node has fields of its own: among the metadata it would be parsed for every row that a filter looks at.
    for name in (DOC_ID_FIELD, TEXT_FIELD, CONTENT_FIELD, TYPE_FIELD):
        schema.add_field(name, DataType.VARCHAR, max_length=MAX_TEXT_BYTES)
    schema.add_field(VECTOR_FIELD, DataType.FLOAT_VECTOR, dim=dimension)
    if words is not None:
        words.add_to(schema)
    return schema


def check_options(collection: str, dimension: int | None, index: str, metric: str | None) -> None:
    """Refuse what Milvus would misread; Milvus Lite would take any index and metric, and search by something else."""
    if not _NAME.fullmatch(collection):
        raise StoreError(f"collection {collection!r}: use up to 255 ASCII letters, digits and '_', no digit first")
    if dimension is not None and dimension < 1:
        raise StoreError(f"dimension {dimension!r}: a vector has at least one number")
    if index.lower() != "auto" and index.upper() not in INDEXES:
        raise StoreError(f"index {index!r} is not one of auto, {', '.join(INDEXES)}")
    if metric is not None and metric.upper() not in METRICS:
        hint = "; L2 ranks unit vectors in the same order" if metric.upper() == "L2" else ""
        raise StoreError(f"metric {metric!r} is not one of {', '.join(METRICS)}{hint}")


def stored_identity(model_id: str, model_note: str, words: WordIndex | None) -> dict[str, str]:
    """Return the properties of a new collection."""
    identity = {_MODEL_PROPERTY: model_id, _NOTE_PROPERTY: model_note}
    if words is not None and words.model is not None:
        identity[SPARSE_PROPERTY] = words.model.model_id
    elif words is not None:
        identity[ANALYZER_PROPERTY] = words.analyzer
    return {name: value for name, value in identity.items() if value}


def stored_model(description: Mapping[str, Any]) -> tuple[str | None, str]:
    """Return the model whose vectors a collection holds, None if it does not say, and the note on it for people."""
    return stored_property(description, _MODEL_PROPERTY), stored_property(description, _NOTE_PROPERTY) or ""


def stored_property(description: Mapping[str, Any], name: str) -> str | None:
    """Return one of the properties that a collection was made with."""
    properties = description.get("properties") or {}
    if name in properties:
        return str(properties[name])
    try:
        return str(json.loads(description.get("description") or "")[name])
    except (ValueError, KeyError, TypeError):
        return None


def milvus_fields(given: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a `MilvusVectorStore` that say what this store does; others that are given are refused."""
    declared = MilvusVectorStore.model_fields
    fields: dict[str, Any] = {name: None for name, field in declared.items() if field.is_required()}
    fields |= {"embedding_field": VECTOR_FIELD, "doc_id_field": DOC_ID_FIELD, "text_key": TEXT_FIELD}
    fields |= {"output_fields": list(NODE_FIELDS), "upsert_mode": True, "consistency_level": "Strong"}
    fields |= {"hybrid_ranker": "RRFRanker", "use_async_client": False}
    fields["batch_size"] = given.get("batch_size", WRITE_ROWS)
    for name, value in given.items():
        if name not in declared:
            raise StoreError(f"ImageStore() takes no {name!r}; see open_store")
        own = fields.get(name, declared[name].get_default(call_default_factory=True))
        if value != own and (value or own):
            raise StoreError(f"{name}={shown(value)}: this store has {shown(own)}; leave it out, or see open_store")
    return fields
