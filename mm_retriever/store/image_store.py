"""`open_store` and `ImageStore`: a LlamaIndex vector store on one Milvus collection.

Owns the collection (schema, index, the name of its model) and what is asked of it. Every expression comes from
`filters.py`, every row from `rows.py`, every request goes through a `Connection`.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, TypeVar

import numpy as np
from llama_index.core.bridge.pydantic import PrivateAttr
from llama_index.core.indices.query.embedding_utils import get_top_k_mmr_embeddings
from llama_index.core.schema import BaseNode
from llama_index.core.vector_stores.types import (
    MetadataFilters,
    VectorStoreQuery,
    VectorStoreQueryMode,
    VectorStoreQueryResult,
)
from llama_index.vector_stores.milvus import MilvusVectorStore
from pymilvus import AnnSearchRequest, DataType, RRFRanker
from pymilvus.exceptions import MilvusException

from mm_retriever.errors import FilterError, QueryError, StoreError, StoreMismatchError
from mm_retriever.store.connection import Connection
from mm_retriever.store.filters import (
    CONTENT_FIELD,
    DOC_ID_FIELD,
    ID_FIELD,
    TEXT_FIELD,
    TYPE_FIELD,
    VECTOR_FIELD,
    filter_expression,
    joined,
    one_of,
    quoted,
)
from mm_retriever.store.rows import MAX_TEXT_BYTES, NODE_FIELDS, node_to_row, row_to_node
from mm_retriever.store.words import SparseEmbedding, WordIndex, new_word_index, word_index_of

logger = logging.getLogger(__name__)

MAX_TOP_K = 16_384
"""The most rows that one Milvus request returns."""

INDEXES = ("FLAT", "HNSW", "AUTOINDEX")
METRICS = ("IP", "COSINE")

_PAGE_ROWS = 10_000
_IDS_PER_REQUEST = 1_000
_WRITE_ROWS = 256
_STRONG_AFTER_DELETE_SECONDS = 5.0
_NOT_LOADED = 101
_MODEL_PROPERTY = "mm_retriever.model"
_SPARSE_PROPERTY = "mm_retriever.sparse_model"
_FUSED_ROWS = 128
"""Each half of a hybrid search looks at least so deep: what one ranks first, the other may rank far below top_k."""
_RRF_K = 60
_UNUSED_FIELDS = (
    "index_config",
    "search_config",
    "sparse_index_config",
    "collection_properties",
    "sparse_embedding_function",
    "scalar_field_names",
    "scalar_field_types",
)
_WORD_MODES = (VectorStoreQueryMode.HYBRID, VectorStoreQueryMode.TEXT_SEARCH, VectorStoreQueryMode.SPARSE)
_MODES = (VectorStoreQueryMode.DEFAULT, VectorStoreQueryMode.MMR, *_WORD_MODES)
_MMR_OPTIONS = ("mmr_threshold", "mmr_prefetch_factor", "mmr_prefetch_k")
_COLLECTION_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,254}")

T = TypeVar("T")


class EmbeddingIdentity(Protocol):
    """What a store must know of the model whose vectors it keeps."""

    @property
    def dimension(self) -> int:
        """Numbers in one vector."""
        ...

    @property
    def model_id(self) -> str:
        """Equal for two models if and only if their vectors may be compared."""
        ...


def open_store(
    uri: str | Path,
    embed_model: EmbeddingIdentity,
    *,
    collection: str = "mm_retriever",
    token: str | None = None,
    index: str = "auto",
    metric: str = "IP",
    timeout: float = 30.0,
    overwrite: bool = False,
    hybrid: bool | SparseEmbedding = False,
) -> ImageStore:
    """Return a store that is ready to be written and searched; the collection is made if it is not there.

    Args:
        uri: a Milvus Lite file (a path that ends in `.db`; parents are made), or the URI of a Milvus server or of
            Zilliz Cloud (`http://`, `https://`, `tcp://`, `unix:`).
        embed_model: gives the dimension and the name that are kept with the collection and checked on opening.
        collection: name of the collection.
        token: `user:password` or an API key, for servers that ask for one.
        index: "FLAT" (exact; the default on Lite), "HNSW" (the default on a server) or "AUTOINDEX" (on Zilliz Cloud).
        metric: "IP" or "COSINE"; the same thing for the unit vectors of `VisualizedBGEEmbedding`.
        timeout: seconds for connecting, and for each request.
        overwrite: drop an existing collection of that name, with all its rows, first.
        hybrid: True also indexes the words of each node (its text, and the texts in its metadata) by BM25, for hybrid
            search; a sparse model (`BGEM3SparseEmbedding`) does it by learned weights. A BM25 index that is there is
            kept up either way. A server must be Milvus 2.5 or later.

    Raises:
        StoreMismatchError: the collection holds vectors of another model, dimension, metric or index, or no index of
            words where one is asked for.
        StoreLockedError: another process has the Milvus Lite file open.
        StoreUnavailableError: the server does not answer within the timeout.
    """
    return ImageStore(
        uri,
        dimension=embed_model.dimension,
        model_id=embed_model.model_id,
        collection=collection,
        token=token,
        index=index,
        metric=metric,
        timeout=timeout,
        overwrite=overwrite,
        hybrid=hybrid,
    )


class ImageStore(MilvusVectorStore):
    """A `MilvusVectorStore` for pictures: ready after opening, safe to filter, quick to query; use `open_store`.

    Every method has an `a...` twin that runs it in a thread, so one store serves any number of event loops. One store
    may be used by many threads; writes to a Milvus Lite file take turns.
    """

    _connection: Connection = PrivateAttr()
    _model_id: str = PrivateAttr()
    _index_type: str = PrivateAttr(default="FLAT")
    _words: WordIndex | None = PrivateAttr(default=None)
    _last_delete: float = PrivateAttr(default=-_STRONG_AFTER_DELETE_SECONDS)

    def __init__(
        self,
        uri: str | Path,
        *,
        dimension: int,
        model_id: str,
        collection: str = "mm_retriever",
        token: str | None = None,
        index: str = "auto",
        metric: str = "IP",
        timeout: float = 30.0,
        overwrite: bool = False,
        hybrid: bool | SparseEmbedding = False,
    ) -> None:
        index, metric = _check_options(collection, dimension, index, metric)
        connection = Connection(uri, token=token, timeout=timeout)
        fields: dict[str, Any] = {
            "uri": connection.where,
            "collection_name": collection,
            "dim": dimension,
            "embedding_field": VECTOR_FIELD,
            "doc_id_field": DOC_ID_FIELD,
            "text_key": TEXT_FIELD,
            "similarity_metric": metric,
            "upsert_mode": True,
            "output_fields": list(NODE_FIELDS),
            "batch_size": _WRITE_ROWS,
            "hybrid_ranker": "RRFRanker",
            "use_async_client": False,
            **dict.fromkeys(_UNUSED_FIELDS),
        }
        # Not MilvusVectorStore's constructor: it would connect and create without timeouts, checks or our schema.
        super(MilvusVectorStore, self).__init__(**fields)
        self._connection = connection
        self._model_id = model_id
        self._milvusclient = connection.client
        self._async_milvusclient = None
        try:
            self._prepare(index, hybrid, overwrite=overwrite)
        except BaseException:
            self.close()
            raise

    @classmethod
    def class_name(cls) -> str:
        """Return the name under which LlamaIndex serialises the class."""
        return "ImageStore"

    @property
    def model_id(self) -> str:
        """The model whose vectors are in the collection."""
        return self._model_id

    @property
    def hybrid(self) -> bool:
        """Whether the collection has an index of words, so that it takes the query modes that need one."""
        return self._words is not None

    def close(self) -> None:
        """Let go of the connection; a Milvus Lite file is free for other processes when its last store is closed."""
        self._connection.close()

    def __enter__(self) -> ImageStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # ------------------------------------------------------------------------------------------ the collection

    def _prepare(self, index: str, hybrid: bool | SparseEmbedding, *, overwrite: bool) -> None:
        """Make the collection, or check that it is ours; then load it: only a loaded one can be searched."""
        with self._connection.write_lock, self._connection.request("opening the collection"):
            exists = self._ask(self.client.has_collection)
            if exists and overwrite:
                self._ask(self.client.drop_collection)
                exists = False
            if exists:
                self._check(hybrid)
            else:
                self._words = new_word_index(hybrid)
                self._create()
            if not self._ask(self.client.list_indexes, field_name=VECTOR_FIELD):
                self._create_index(index)
            self._create_words_index()
            self._check_index(index)
            self._ask(self.client.load_collection)
        self._collection_initialized = True

    def _create(self) -> None:
        lite = self._connection.lite_path is not None
        # A server keeps the description; Milvus Lite keeps properties, and neither is sure to keep the other.
        identity = {_MODEL_PROPERTY: self._model_id}
        if self._words is not None and self._words.model is not None:
            identity[_SPARSE_PROPERTY] = self._words.model.model_id
        description = "" if lite else json.dumps(identity)
        schema = self.client.create_schema(auto_id=False, enable_dynamic_field=True, description=description)
        schema.add_field(ID_FIELD, DataType.VARCHAR, is_primary=True, max_length=MAX_TEXT_BYTES)
        schema.add_field(DOC_ID_FIELD, DataType.VARCHAR, max_length=MAX_TEXT_BYTES)
        schema.add_field(TEXT_FIELD, DataType.VARCHAR, max_length=MAX_TEXT_BYTES)
        # The node has fields of its own: among the metadata it would be parsed for every row that a filter looks at.
        schema.add_field(CONTENT_FIELD, DataType.VARCHAR, max_length=MAX_TEXT_BYTES)
        schema.add_field(TYPE_FIELD, DataType.VARCHAR, max_length=MAX_TEXT_BYTES)
        schema.add_field(VECTOR_FIELD, DataType.FLOAT_VECTOR, dim=self._dimension)
        if self._words is not None:
            self._words.add_to(schema)
        properties = {"properties": identity} if lite else {}
        self._ask(self.client.create_collection, schema=schema, consistency_level="Session", **properties)

    def _create_index(self, index: str) -> None:
        if index == "auto":
            on_server = "HNSW" if self.client.is_self_hosted else "AUTOINDEX"
            index = "FLAT" if self._connection.lite_path else on_server
        build = {"params": {"M": 16, "efConstruction": 200}} if index == "HNSW" else {}
        params = self.client.prepare_index_params()
        params.add_index(
            VECTOR_FIELD, index_name=VECTOR_FIELD, index_type=index, metric_type=self.similarity_metric, **build
        )
        # sync: waiting takes half a second, and Milvus Lite prints that it cannot; loading waits all the same
        self._ask(self.client.create_index, index_params=params, sync=False)

    def _create_words_index(self) -> None:
        """Index the words, if the collection has any; again is nothing new."""
        field = self._words.vector_field if self._words is not None else ""
        if self._words is not None and not self._ask(self.client.list_indexes, field_name=field):
            params = self.client.prepare_index_params()
            params.add_index(
                field, index_name=field, index_type="SPARSE_INVERTED_INDEX", metric_type=self._words.metric
            )
            self._ask(self.client.create_index, index_params=params, sync=False)

    def _check(self, hybrid: bool | SparseEmbedding) -> None:
        description = self._ask(self.client.describe_collection)
        fields = {field["name"]: field for field in description["fields"]}
        missing = {ID_FIELD, DOC_ID_FIELD, TEXT_FIELD, VECTOR_FIELD} - fields.keys()
        if missing or not description.get("enable_dynamic_field"):
            lack = f"the fields {', '.join(sorted(missing))}" if missing else "dynamic fields"
            raise self._mismatch(f"was made by another program: it lacks {lack}")
        dimension = int(fields[VECTOR_FIELD]["params"]["dim"])
        if dimension != self._dimension:
            raise self._mismatch(f"holds vectors of {dimension} numbers, the model gives {self._dimension}")
        words = word_index_of(description, hybrid, _stored(description, _SPARSE_PROPERTY))
        if isinstance(words, str):
            raise self._mismatch(words)
        self._words = words
        stored = stored_model(description)
        if stored is None:
            logger.warning(
                "collection %r at %s does not say which model its vectors come from; it is taken to be %r",
                self.collection_name,
                self.uri,
                self._model_id,
            )
        elif stored != self._model_id:
            raise self._mismatch(f"holds vectors of the model {stored!r}, the model given is {self._model_id!r}")

    def _check_index(self, index: str) -> None:
        name = self._ask(self.client.list_indexes, field_name=VECTOR_FIELD)[0]
        found = self._ask(self.client.describe_index, index_name=name)
        metric, self._index_type = found.get("metric_type"), str(found.get("index_type"))
        if metric != self.similarity_metric:
            raise self._mismatch(f"measures with {metric}, {self.similarity_metric} is asked for")
        if index not in ("auto", self._index_type):
            raise self._mismatch(f"has a {self._index_type} index, {index} is asked for")

    def _mismatch(self, difference: str) -> StoreMismatchError:
        return StoreMismatchError(
            f"collection {self.collection_name!r} at {self.uri} {difference}. "
            "Give another collection name, or overwrite=True to drop its rows and start anew"
        )

    # ------------------------------------------------------------------------------------------ writing

    def add(self, nodes: Sequence[BaseNode], **add_kwargs: Any) -> list[str]:
        """Store nodes with their vectors and return their ids; a node whose id is there already replaces it.

        All nodes are checked before the first is written. Of two nodes with one id the later is kept.

        Raises:
            NodeError: a node cannot be stored; none was.
        """
        _refuse_options("add", add_kwargs)
        rows = {node.node_id: node_to_row(node, self._dimension) for node in nodes}
        # On Milvus Lite an upsert leaves columns of the old row that the new one lacks; its insert replaces rows whole.
        # On a server an insert leaves the old row there, and an upsert replaces it whole.
        write = self.client.insert if self._connection.lite_path else self.client.upsert
        kept = {node.node_id: node for node in nodes}
        for ids in _chunks(list(rows), self.batch_size):
            batch = [rows[one] for one in ids]
            if self._words is not None:
                words = self._words.columns([kept[one] for one in ids])
                batch = [{**row, **columns} for row, columns in zip(batch, words, strict=True)]
            with self._connection.write_lock, self._connection.request(f"storing {len(batch)} rows"):
                self._ask(write, data=batch)
        return [node.node_id for node in nodes]

    def delete(self, ref_doc_id: str, **delete_kwargs: Any) -> None:
        """Remove every node that was made from the document."""
        _refuse_options("delete", delete_kwargs)
        if not isinstance(ref_doc_id, str) or not ref_doc_id:
            raise QueryError(f"delete needs the id of a document, got {ref_doc_id!r}")
        self._delete_where(one_of(DOC_ID_FIELD, [ref_doc_id]))

    def delete_nodes(
        self,
        node_ids: Sequence[str] | None = None,
        filters: MetadataFilters | None = None,
        **delete_kwargs: Any,
    ) -> None:
        """Remove the nodes with these ids, or that match the filters, or (both given) that do both.

        Raises:
            FilterError: nothing is said about what to remove; `clear()` removes all.
        """
        _refuse_options("delete_nodes", delete_kwargs)
        expression = filter_expression(filters)
        if node_ids is None and not expression:
            raise FilterError("delete_nodes needs node_ids or filters; clear() removes everything")
        if node_ids is None:
            self._delete_where(expression)
        elif expression:
            self._delete_ids(list(self._columns(node_ids, (), expression)))
        else:
            self._delete_ids(node_ids)

    def _delete_where(self, expression: str) -> None:
        for page in self._scan((), expression):  # ids first: older servers delete by primary key alone
            self._delete_ids([row[ID_FIELD] for row in page])

    def _delete_ids(self, node_ids: Sequence[str]) -> None:
        for ids in _chunks(node_ids, _IDS_PER_REQUEST):
            with self._connection.write_lock, self._connection.request(f"removing {len(ids)} rows"):
                self._ask(self.client.delete, filter=one_of(ID_FIELD, ids))
        self._last_delete = time.monotonic()

    def clear(self) -> None:
        """Remove every row; the store stays open and ready."""
        with self._connection.write_lock, self._connection.request("clearing the collection"):
            self._ask(self.client.drop_collection)
            self._create()
            self._create_index(self._index_type)
            self._create_words_index()
            self._ask(self.client.load_collection)

    # ------------------------------------------------------------------------------------------ searching

    def query(self, query: VectorStoreQuery, **kwargs: Any) -> VectorStoreQueryResult:
        """Return the nearest nodes, best first; similarities are inner products (-1 to 1 for unit vectors).

        Takes the modes DEFAULT and MMR (options `mmr_threshold`, `mmr_prefetch_factor`, `mmr_prefetch_k`), and on a
        store opened with `hybrid`: TEXT_SEARCH or SPARSE (by the words of `query_str` alone; similarities are BM25
        scores or inner products, above 0), and HYBRID (by vector and by words, joined by reciprocal rank fusion;
        similarities are sums of 1 / (60 + rank); without words, by vector alone; `hybrid_top_k` and `sparse_top_k` as
        LlamaIndex knows them). Filters hold for all. An empty list of doc_ids matches nothing; an empty list of
        node_ids is what a VectorStoreIndex sends for no restriction.

        Raises:
            FilterError: a filter that cannot be expressed.
            QueryError: no vector, a wrong one, a top_k outside 1 to 16384, or a mode that the store does not have.
        """
        if query.mode not in _MODES:
            raise QueryError(
                f"query mode {_mode_name(query.mode)} is not one of {', '.join(mode.value for mode in _MODES)}"
            )
        mmr = query.mode == VectorStoreQueryMode.MMR
        _refuse_options("query", {key: value for key, value in kwargs.items() if not (mmr and key in _MMR_OPTIONS)})
        if query.embedding_field not in (None, VECTOR_FIELD):
            raise QueryError(f"embedding_field {query.embedding_field!r}: vectors are in {VECTOR_FIELD!r}")
        top_k = _checked_top_k(query.similarity_top_k)
        words = self._word_index(query.mode) if query.mode in _WORD_MODES else None
        by_words_alone = words is not None and query.mode != VectorStoreQueryMode.HYBRID
        vector = [] if by_words_alone else self._query_vector(query.query_embedding)
        expression = _restriction(query)
        if expression is None:
            return VectorStoreQueryResult(nodes=[], similarities=[], ids=[])
        if mmr:
            return self._diverse(query, vector, expression, **kwargs)
        if words is None:
            hits = self._search(vector, expression, top_k, NODE_FIELDS)
        elif by_words_alone:
            hits = self._word_search(words, query.query_str, expression, top_k)
        else:
            hits = self._fused_search(words, query, vector, expression, top_k)
        return VectorStoreQueryResult(
            nodes=[_hit_node(hit) for hit in hits],
            similarities=[float(hit["distance"]) for hit in hits],
            ids=[str(hit[ID_FIELD]) for hit in hits],
        )

    def _diverse(
        self,
        query: VectorStoreQuery,
        vector: list[float],
        expression: str,
        *,
        mmr_threshold: float | None = None,
        mmr_prefetch_factor: float = 4.0,
        mmr_prefetch_k: int | None = None,
    ) -> VectorStoreQueryResult:
        """Maximal marginal relevance: near the query, and not all alike; the one query that fetches vectors."""
        prefetch = mmr_prefetch_k or int(query.similarity_top_k * mmr_prefetch_factor)
        prefetch = min(MAX_TOP_K, max(query.similarity_top_k, prefetch))
        found = self._search(vector, expression, prefetch, (*NODE_FIELDS, VECTOR_FIELD))
        hits = {str(hit[ID_FIELD]): hit for hit in found}
        scores, ids = get_top_k_mmr_embeddings(
            query_embedding=vector,
            embeddings=[list(hit["entity"][VECTOR_FIELD]) for hit in found],
            similarity_top_k=query.similarity_top_k,
            embedding_ids=list(hits),
            mmr_threshold=query.mmr_threshold if mmr_threshold is None else mmr_threshold,
        )
        return VectorStoreQueryResult(nodes=[_hit_node(hits[one]) for one in ids], similarities=list(scores), ids=ids)

    def _search(
        self, vector: list[float], expression: str, limit: int, names: Sequence[str]
    ) -> list[Mapping[str, Any]]:
        with self._connection.request("searching"):
            found = self._read(
                self.client.search,
                data=[vector],
                filter=expression,
                limit=limit,
                output_fields=list(names),
                search_params=self._vector_params(limit),
                anns_field=VECTOR_FIELD,
                **self._strong_after_delete,
            )
        return list(found[0]) if found else []

    def _word_search(self, words: WordIndex, text: str | None, expression: str, limit: int) -> list[Mapping[str, Any]]:
        asked = words.asked(text)
        if asked is None:
            raise QueryError("a search by words without words: set query_str")
        with self._connection.request("searching words"):
            found = self._read(
                self.client.search,
                data=[asked],
                filter=expression,
                limit=limit,
                output_fields=list(NODE_FIELDS),
                search_params={"metric_type": words.metric},
                anns_field=words.vector_field,
                **self._strong_after_delete,
            )
        # Milvus Lite gives BM25 scores below 0, a server above
        return [{**hit, ID_FIELD: hit[ID_FIELD], "distance": abs(hit["distance"])} for hit in found[0]]

    def _fused_search(
        self, words: WordIndex, query: VectorStoreQuery, vector: list[float], expression: str, top_k: int
    ) -> list[Mapping[str, Any]]:
        """Reciprocal rank fusion of a search by vector and one by words, within the same restriction."""
        if query.alpha is not None:
            raise QueryError(
                f"alpha {query.alpha!r}: the two rankings are joined by rank and have no weights; leave it"
            )
        limit = _checked_top_k(query.hybrid_top_k or top_k)
        depth = min(MAX_TOP_K, max(_FUSED_ROWS, 4 * limit))
        halves = [AnnSearchRequest([vector], VECTOR_FIELD, self._vector_params(depth), depth, expr=expression)]
        asked = words.asked(query.query_str)
        if asked is not None:
            many = _checked_top_k(query.sparse_top_k or depth)
            params = {"metric_type": words.metric}
            halves.append(AnnSearchRequest([asked], words.vector_field, params, many, expr=expression))
        with self._connection.request("searching vectors and words"):
            found = self._read(
                self.client.hybrid_search,
                reqs=halves,
                ranker=RRFRanker(_RRF_K),
                limit=limit,
                output_fields=list(NODE_FIELDS),
                **self._strong_after_delete,
            )
        return list(found[0]) if found else []

    def _word_index(self, mode: VectorStoreQueryMode) -> WordIndex:
        if self._words is None:
            raise QueryError(
                f"query mode {_mode_name(mode)}: this collection has no index of words and searches by vector only "
                "(default, mmr); open_store(..., hybrid=True) makes a new one that has it"
            )
        return self._words

    def _vector_params(self, limit: int) -> dict[str, Any]:
        breadth = {"params": {"ef": min(32_768, max(256, 4 * limit))}} if self._index_type == "HNSW" else {}
        return {"metric_type": self.similarity_metric, **breadth}

    def _query_vector(self, embedding: Sequence[float] | None) -> list[float]:
        if embedding is None:
            raise QueryError("a query without a vector: set query_embedding")
        with np.errstate(over="ignore"):  # what does not fit becomes infinite, and is refused below
            vector = np.asarray(embedding, dtype=np.float32)
        if vector.shape != (self._dimension,):
            raise QueryError(f"a query vector of {vector.size} numbers; the collection holds {self._dimension}")
        if not np.isfinite(vector).all():
            raise QueryError("the query vector holds NaN or infinity")
        return [float(number) for number in vector]

    # ------------------------------------------------------------------------------------------ reading

    def get_nodes(
        self,
        node_ids: Sequence[str] | None = None,
        filters: MetadataFilters | None = None,
        **kwargs: Any,
    ) -> list[BaseNode]:
        """Return nodes without their vectors: those with these ids (in this order), or that match, or that do both.

        Raises:
            FilterError: neither ids nor filters are given, or a filter cannot be expressed.
        """
        _refuse_options("get_nodes", kwargs)
        expression = filter_expression(filters)
        if node_ids is None:
            if not expression:
                raise FilterError("get_nodes needs node_ids or filters; scan() goes through everything")
            return [row_to_node(row) for page in self._scan(NODE_FIELDS, expression) for row in page]
        rows = self._columns(node_ids, NODE_FIELDS, expression)
        return [row_to_node(rows[one]) for one in dict.fromkeys(node_ids) if one in rows]

    def columns(self, node_ids: Sequence[str], names: Sequence[str]) -> dict[str, dict[str, Any]]:
        """Return the named columns of the rows with these ids, by id; an id that is not stored is left out."""
        return self._columns(node_ids, names, "")

    def scan(self, names: Sequence[str] = (), filters: MetadataFilters | None = None) -> Iterator[list[dict[str, Any]]]:
        """Yield the rows that match (id and the named columns) in pages, by id; rows may be removed meanwhile."""
        return self._scan(names, filter_expression(filters))

    def count(self, filters: MetadataFilters | None = None) -> int:
        """Return how many rows there are, or how many match the filters."""
        expression = filter_expression(filters)
        if expression and self._connection.lite_path:  # Milvus Lite counts by fetching whole rows
            return sum(len(page) for page in self._scan((), expression))
        return int(self._fetch(expression, ["count(*)"])[0]["count(*)"])

    def _columns(self, node_ids: Sequence[str], names: Sequence[str], expression: str) -> dict[str, dict[str, Any]]:
        rows: dict[str, dict[str, Any]] = {}
        for ids in _chunks(node_ids, _IDS_PER_REQUEST):
            page = self._fetch(_all_of(one_of(ID_FIELD, ids), expression), names)
            rows.update((row[ID_FIELD], row) for row in page)
        return rows

    def _scan(self, names: Sequence[str], expression: str) -> Iterator[list[dict[str, Any]]]:
        # The flags of pymilvus' own iterator, which pastes the last id into its expression unquoted.
        in_order = {"limit": _PAGE_ROWS, "iterator": "True", "reduce_stop_for_best": "True"}
        after = ""
        while page := self._fetch(_all_of(expression, after), names, **in_order):
            yield page
            after = f"({ID_FIELD} > {quoted(page[-1][ID_FIELD])})"

    def _fetch(self, expression: str, names: Sequence[str], **options: Any) -> list[dict[str, Any]]:
        with self._connection.request("reading rows"):
            rows: list[dict[str, Any]] = self._read(
                self.client.query,
                filter=expression,
                output_fields=list(names) or [ID_FIELD],
                **self._strong,
                **options,
            )
        return rows

    def _read(self, call: Callable[..., Any], **options: Any) -> Any:
        """The answer to a read; a collection that a restarted server has no longer loaded is loaded first."""
        try:
            return self._ask(call, **options)
        except MilvusException as error:
            if error.code != _NOT_LOADED:
                raise
            self._ask(self.client.load_collection)
            return self._ask(call, **options)

    def _ask(self, call: Callable[..., Any], **options: Any) -> Any:
        return self._connection.ask(call, collection_name=self.collection_name, **options)

    @property
    def _strong(self) -> dict[str, str]:
        # Milvus Lite always reads what was written last, and knows nothing of levels
        return {} if self._connection.lite_path else {"consistency_level": "Strong"}

    @property
    def _strong_after_delete(self) -> dict[str, str]:
        # A server hides a row from weaker reads only some time after it was deleted; a strong read waits for that.
        deleted_lately = time.monotonic() - self._last_delete < _STRONG_AFTER_DELETE_SECONDS
        return self._strong if deleted_lately else {}

    @property
    def _dimension(self) -> int:
        assert self.dim is not None
        return self.dim

    # ------------------------------------------------------------------------------------------ asynchronous twins

    async def async_add(self, nodes: Sequence[BaseNode], **add_kwargs: Any) -> list[str]:
        """`add`, in a thread."""
        return await asyncio.to_thread(self.add, nodes, **add_kwargs)

    async def adelete(self, ref_doc_id: str, **delete_kwargs: Any) -> None:
        """`delete`, in a thread."""
        await asyncio.to_thread(self.delete, ref_doc_id, **delete_kwargs)

    async def adelete_nodes(
        self,
        node_ids: Sequence[str] | None = None,
        filters: MetadataFilters | None = None,
        **delete_kwargs: Any,
    ) -> None:
        """`delete_nodes`, in a thread."""
        await asyncio.to_thread(self.delete_nodes, node_ids, filters, **delete_kwargs)

    async def aclear(self) -> None:
        """`clear`, in a thread."""
        await asyncio.to_thread(self.clear)

    async def aquery(self, query: VectorStoreQuery, **kwargs: Any) -> VectorStoreQueryResult:
        """`query`, in a thread."""
        return await asyncio.to_thread(self.query, query, **kwargs)

    async def aget_nodes(
        self,
        node_ids: Sequence[str] | None = None,
        filters: MetadataFilters | None = None,
        **kwargs: Any,
    ) -> list[BaseNode]:
        """`get_nodes`, in a thread."""
        return await asyncio.to_thread(self.get_nodes, node_ids, filters, **kwargs)


def _check_options(collection: str, dimension: int, index: str, metric: str) -> tuple[str, str]:
    """Index and metric in Milvus' spelling. Milvus Lite would take any name, and then search by something else."""
    if not _COLLECTION_NAME.fullmatch(collection):
        raise StoreError(f"collection {collection!r}: use up to 255 ASCII letters, digits and '_', no digit first")
    if dimension < 1:
        raise StoreError(f"dimension {dimension!r}: a vector has at least one number")
    if index.lower() != "auto" and index.upper() not in INDEXES:
        raise StoreError(f"index {index!r} is not one of auto, {', '.join(INDEXES)}")
    if metric.upper() not in METRICS:
        hint = "; L2 ranks unit vectors in the same order" if metric.upper() == "L2" else ""
        raise StoreError(f"metric {metric!r} is not one of {', '.join(METRICS)}{hint}")
    return "auto" if index.lower() == "auto" else index.upper(), metric.upper()


def _checked_top_k(top_k: int) -> int:
    if isinstance(top_k, bool) or not isinstance(top_k, int) or not 1 <= top_k <= MAX_TOP_K:
        raise QueryError(f"top_k {top_k!r}: give a whole number from 1 to {MAX_TOP_K}")
    return top_k


def _refuse_options(method: str, options: Mapping[str, Any]) -> None:
    if options:
        names = ", ".join(map(repr, options))
        raise QueryError(f"{method}() takes no {names}: conditions are given as filters, never as expressions")


def _restriction(query: VectorStoreQuery) -> str | None:
    """The expression of all that limits the query; None where nothing can match."""
    expression = filter_expression(query.filters)
    if query.doc_ids is not None:
        if not query.doc_ids:
            return None
        expression = _all_of(expression, one_of(DOC_ID_FIELD, query.doc_ids))
    return _all_of(expression, one_of(ID_FIELD, query.node_ids)) if query.node_ids else expression


def _all_of(*expressions: str) -> str:
    parts = [expression for expression in expressions if expression]
    return joined(parts, "and") if parts else ""


def stored_model(description: Mapping[str, Any]) -> str | None:
    """The model name that `_create` left with the collection."""
    return _stored(description, _MODEL_PROPERTY)


def _stored(description: Mapping[str, Any], name: str) -> str | None:
    properties = description.get("properties") or {}
    if name in properties:
        return str(properties[name])
    try:
        return str(json.loads(description.get("description") or "")[name])
    except (ValueError, KeyError, TypeError):
        return None


def _mode_name(mode: VectorStoreQueryMode | str) -> str:
    return repr(mode.value if isinstance(mode, VectorStoreQueryMode) else mode)


def _hit_node(hit: Mapping[str, Any]) -> BaseNode:
    return row_to_node({**hit["entity"], ID_FIELD: hit[ID_FIELD]})


def _chunks(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
