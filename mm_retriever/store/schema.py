"""The columns of a collection, the index and the model of its vectors, and the options that it is created with.

Source of the parameters of indexes: the documentation of Milvus (milvus.io/docs, "Index", "In-memory Index", "On-disk
Index").
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from llama_index.vector_stores.milvus import MilvusVectorStore
from pymilvus import CollectionSchema, DataType, MilvusClient

from mm_retriever.errors import QueryError, StoreError, shown

INDEXES = ("FLAT", "HNSW", "HNSW_SQ", "IVF_RABITQ", "DISKANN", "AUTOINDEX")
LITE_INDEXES = ("FLAT", "HNSW", "HNSW_SQ", "AUTOINDEX")
SINCE = {"HNSW_SQ": (2, 5), "IVF_RABITQ": (2, 6)}
"""The first version of Milvus that has an index; the others are older than what this package serves."""

MOST_FLAT_ROWS = 200_000
"""Of a Milvus Lite file: a search compares the query with all of them, in about 0.1 s at 768 numbers each."""
MOST_HNSW_ROWS = 5_000_000
"""At 3.2 kB of memory for 768 numbers, 16 GB."""
MOST_SQ_ROWS = 50_000_000
"""At 0.9 kB, 45 GB; above that, IVF_RABITQ scans what HNSW would keep links for."""

_GRAPH = {"M": 16, "efConstruction": 200}
_NPROBE = 64


def index_for(rows: int | None, *, lite: bool, self_hosted: bool) -> str:
    """The index of a new collection.

    Args:
        rows: the expected number; None: unknown, and taken to be small.
        lite: whether it is in a Milvus Lite file.
        self_hosted: whether the server is not Zilliz Cloud, which chooses for itself.
    """
    few = rows or 0
    if lite:
        return "FLAT" if few <= MOST_FLAT_ROWS else "HNSW"
    if not self_hosted:
        return "AUTOINDEX"
    if few <= MOST_HNSW_ROWS:
        return "HNSW"
    return "HNSW_SQ" if few <= MOST_SQ_ROWS else "IVF_RABITQ"


def build_params(index: str, rows: int | None) -> dict[str, Any]:
    """What an index is built with."""
    if index == "HNSW":
        return dict(_GRAPH)
    if index == "HNSW_SQ":
        return _GRAPH | {"sq_type": "SQ8"}
    if index == "IVF_RABITQ":  # 4 sqrt(n) lists, within what Milvus takes
        lists = min(65_536, max(1_024, round(4 * (rows or 0) ** 0.5)))
        return {"nlist": lists, "refine": True, "refine_type": "SQ8"}
    return {}


def search_params(index: str, limit: int) -> dict[str, Any]:
    """What a search for so many rows tells an index."""
    if index in ("HNSW", "HNSW_SQ"):
        return {"ef": min(32_768, max(256, 4 * limit))}
    if index == "IVF_RABITQ":
        return {"nprobe": _NPROBE, "rbq_query_bits": 6, "refine_k": 2}
    if index == "DISKANN":
        return {"search_list": min(65_535, max(100, 2 * limit))}
    return {}


ID_FIELD = "id"
DOC_ID_FIELD = "doc_id"
TEXT_FIELD = "text"
VECTOR_FIELD = "embedding"
WORDS_FIELD = "_words"
SPARSE_FIELD = "_sparse"
CONTENT_FIELD = "_node_content"
TYPE_FIELD = "_node_type"
CHECKSUM_FIELD = "_row_checksum"

NODE_FIELDS = (TEXT_FIELD, CONTENT_FIELD, TYPE_FIELD, CHECKSUM_FIELD)
"""The columns that a node is rebuilt from, and its checksum; the vectors would double the time of a query."""

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


_IDENTITY = re.compile(r".*@(?P<weights>[0-9a-f]{12})(?:\.(?P<inputs>[0-9a-f]{6}))?(?:/\w+)?", re.DOTALL)


def same_model(stored: str, given: str) -> bool:
    """Return whether vectors of two models may be compared.

    Collections of earlier versions have identities `name@weights/dtype`; their fingerprint of the weights is the one
    of today's form. Identities of other forms must be equal.
    """
    if stored == given:
        return True
    ours, theirs = _IDENTITY.fullmatch(stored), _IDENTITY.fullmatch(given)
    if ours is None or theirs is None or ours["weights"] != theirs["weights"]:
        return False
    return ours["inputs"] is None or theirs["inputs"] is None or ours["inputs"] == theirs["inputs"]


def model_facts(embed_model: Any) -> dict[str, Any]:
    """Return what a store keeps of a model: `dimension`, `model_id` and `model_note`.

    Raises:
        QueryError: it is no `ComposedEmbedding`.
    """
    if not hasattr(embed_model, "model_id"):
        given = shown(embed_model) if isinstance(embed_model, str) else f"a {type(embed_model).__name__}"
        raise QueryError(f"embed_model is {given}, not a ComposedEmbedding: give ComposedEmbedding(...) of it")
    note = str(getattr(embed_model, "model_note", ""))
    return {"dimension": getattr(embed_model, "dimension", None), "model_id": embed_model.model_id, "model_note": note}


WRITE_ROWS = 256
"""Rows sent with one request."""

RRF_K = 60
"""The constant of reciprocal rank fusion."""

METRICS = ("IP", "COSINE")

_NEEDED = {
    ID_FIELD: DataType.VARCHAR,
    DOC_ID_FIELD: DataType.VARCHAR,
    TEXT_FIELD: DataType.VARCHAR,
    VECTOR_FIELD: DataType.FLOAT_VECTOR,
}

_MODEL_PROPERTY = "mm_retriever.model"
_NOTE_PROPERTY = "mm_retriever.model_note"
MADE_FROM_PROPERTY = "mm_retriever.reindexed_from"
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,254}")


def collection_schema(dimension: int, description: str = "") -> CollectionSchema:
    """Return the columns of a collection; metadata are dynamic ones."""
    schema = MilvusClient.create_schema(auto_id=False, enable_dynamic_field=True, description=description)
    schema.add_field(ID_FIELD, DataType.VARCHAR, is_primary=True, max_length=MAX_TEXT_BYTES)
    # The node has fields of its own: among the metadata it would be parsed for every row that a filter looks at.
    for name in (DOC_ID_FIELD, TEXT_FIELD, CONTENT_FIELD, TYPE_FIELD):
        schema.add_field(name, DataType.VARCHAR, max_length=MAX_TEXT_BYTES)
    schema.add_field(VECTOR_FIELD, DataType.FLOAT_VECTOR, dim=dimension)
    return schema


def check_options(
    collection: str, dimension: int | None, index: str, metric: str | None, *, lite: bool = False
) -> None:
    """Refuse options that Milvus would misread: Milvus Lite takes any index and metric, and searches by another."""
    if not _NAME.fullmatch(collection):
        raise StoreError(f"collection {collection!r}: use up to 255 ASCII letters, digits and '_', no digit first")
    if dimension is not None and dimension < 1:
        raise StoreError(f"dimension {dimension!r}: a vector has at least one number")
    if index.lower() != "auto" and index.upper() not in INDEXES:
        raise StoreError(f"index {index!r} is not one of auto, {', '.join(INDEXES)}")
    if lite and index.lower() != "auto" and index.upper() not in LITE_INDEXES:
        raise StoreError(
            f"index {index!r} needs a Milvus server; a Milvus Lite file has auto, {', '.join(LITE_INDEXES)}"
        )
    if metric is not None and metric.upper() not in METRICS:
        hint = "; L2 ranks unit vectors in the same order" if metric.upper() == "L2" else ""
        raise StoreError(f"metric {metric!r} is not one of {', '.join(METRICS)}{hint}")


def model_properties(model_id: str, model_note: str, made_from: str = "") -> dict[str, str]:
    """Return the properties of a new collection that say which model its vectors come from.

    Args:
        model_id: the model.
        model_note: name and float format of the model, for people.
        made_from: the previous model, where `reindex` makes the collection.
    """
    properties = {_MODEL_PROPERTY: model_id, _NOTE_PROPERTY: model_note, MADE_FROM_PROPERTY: made_from}
    return {name: value for name, value in properties.items() if value}


def stored_model(description: Mapping[str, Any]) -> tuple[str | None, str]:
    """Return the model of a collection's vectors, None if it names none, and the note on it for people."""
    return stored_property(description, _MODEL_PROPERTY), stored_property(description, _NOTE_PROPERTY) or ""


def vector_length(description: Mapping[str, Any]) -> int:
    """Return how many numbers a vector of a collection has, 0 without our column of vectors."""
    fields = {field["name"]: field for field in description["fields"]}
    return int(fields.get(VECTOR_FIELD, {}).get("params", {}).get("dim", 0))


def lacks(description: Mapping[str, Any]) -> str | None:
    """Return what a collection lacks to be one of ours, as another program's does; None if it lacks nothing."""
    fields = {field["name"]: field for field in description["fields"]}
    if missing := sorted(_NEEDED.keys() - fields.keys()):
        return f"the fields {', '.join(missing)}"
    if not description.get("enable_dynamic_field"):
        return "dynamic fields"
    if other := [name for name, kind in _NEEDED.items() if fields[name].get("type") != kind]:
        return " and ".join(f"the field {name} of type {_NEEDED[name].name}" for name in other)
    if not fields[ID_FIELD].get("is_primary") or description.get("auto_id"):
        return f"ids that are given: {ID_FIELD} is not its primary key, or Milvus numbers the rows"
    return None


def declared_columns(description: Mapping[str, Any]) -> frozenset[str]:
    """Return the columns that another program declared: filters name dynamic ones, and would not find these."""
    return frozenset(field["name"] for field in description["fields"]) - RESERVED_KEYS


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
    """Return `MilvusVectorStore`'s fields with the values of this store; refuses other options and values."""
    declared = MilvusVectorStore.model_fields
    fields: dict[str, Any] = {name: None for name, field in declared.items() if field.is_required()}
    fields |= {"embedding_field": VECTOR_FIELD, "doc_id_field": DOC_ID_FIELD, "text_key": TEXT_FIELD}
    fields |= {"output_fields": list(NODE_FIELDS), "upsert_mode": True, "consistency_level": "Strong"}
    fields |= {"hybrid_ranker": "RRFRanker", "use_async_client": False}
    fields["batch_size"] = given.get("batch_size", WRITE_ROWS)
    done = fields | {"id_field": ID_FIELD, "hybrid_ranker_params": {"k": RRF_K}}
    for name, value in given.items():
        if name not in declared and name not in done:
            raise StoreError(f"ImageStore() takes no {name!r}; see open_store")
        own = done[name] if name in done else declared[name].get_default(call_default_factory=True)
        value, own = getattr(value, "value", value), getattr(own, "value", own)  # of an enumeration
        if value != own and (value or own):
            raise StoreError(f"{name}={shown(value)}: this store has {shown(own)}; leave it out, or see open_store")
    return fields
