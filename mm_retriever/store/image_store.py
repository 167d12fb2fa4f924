"""`open_store` and `ImageStore`: a LlamaIndex vector store on one Milvus collection.

Owns how LlamaIndex's nodes, queries and filters become rows, searches and expressions of a `Collection`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

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

from mm_retriever.errors import CopyError, FilterError, QueryError, StoreError
from mm_retriever.store.checksums import damaged_rows, vector_is_damaged
from mm_retriever.store.collection import (
    WRITE_ROWS,
    Collection,
    Hit,
    Row,
    check_options,
    chunks,
    stored_identity,
    without_checksums,
)
from mm_retriever.store.columns import Columns
from mm_retriever.store.connection import Connection, check_exists
from mm_retriever.store.filters import (
    CONTENT_FIELD,
    DOC_ID_FIELD,
    ID_FIELD,
    TEXT_FIELD,
    VECTOR_FIELD,
    all_of,
    filter_expression,
    joined,
    one_of,
)
from mm_retriever.store.identity import StoredIdentity
from mm_retriever.store.pixels import embedded_by_pixels
from mm_retriever.store.rows import NODE_FIELDS, node_to_row, row_to_node, storable_node, unfiltered_keys
from mm_retriever.store.values import plain_metadata
from mm_retriever.store.verification import Verification, verify_collection
from mm_retriever.store.words import SparseEmbedding, WordIndex

if TYPE_CHECKING:
    from mm_retriever.embedding import ComposedEmbedding

logger = logging.getLogger(__name__)

MAX_TOP_K = 16_384
"""The most rows that one Milvus request returns."""

_FUSED_ROWS = 128
"""Each half of a hybrid search looks at least so deep: what one ranks first, the other may rank far below top_k."""
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


def open_store(
    uri: str | Path,
    embed_model: ComposedEmbedding | StoredIdentity,
    *,
    collection: str = "mm_retriever",
    token: str | None = None,
    index: str = "auto",
    metric: str = "IP",
    timeout: float = 30.0,
    overwrite: bool = False,
    hybrid: bool | SparseEmbedding = False,
    analyzer: str | None = None,
    create: bool = True,
) -> ImageStore:
    """Return a store that is ready to be written and searched; the collection is made if it is not there.

    Args:
        uri: a Milvus Lite file (a path that ends in `.db`; parents are made), or the URI of a Milvus server or of
            Zilliz Cloud (`http://`, `https://`, `tcp://`, `unix:`).
        embed_model: gives the dimension and the name that are kept with the collection and checked on opening. A
            `VisualizedBGEEmbedding` also embeds images that a `VectorStoreIndex` adds under vectors of their words.
        collection: name of the collection.
        token: `user:password` or an API key, for servers that ask for one.
        index: "FLAT" (exact; the default on Lite), "HNSW" (the default on a server) or "AUTOINDEX" (on Zilliz Cloud).
        metric: "IP" or "COSINE"; the same thing for the unit vectors of `VisualizedBGEEmbedding`.
        timeout: seconds for connecting, and for each request.
        overwrite: drop an existing collection of that name, with all its rows, first.
        hybrid: True also indexes the words of each node (its text, and the texts in its metadata) by BM25, for hybrid
            search; a sparse model (`BGEM3SparseEmbedding`) does it by learned weights. A BM25 index that is there is
            kept up either way. A server must be Milvus 2.5 or later.
        create: False refuses a file or collection that is not there, and lists those that are: for searching, where a
            mistyped name must not become an empty collection.
        analyzer: how BM25 finds words, kept with the collection. "mixed", that of new collections, serves any language,
            also those without spaces between words (Chinese, Japanese, Thai). "standard" serves languages with spaces;
            collections of earlier versions have it, and a search by words that it cannot serve is logged.

    Raises:
        StoreError: there is no such file or collection, and `create` is False.
        StoreMismatchError: the collection holds vectors of another model, dimension, metric or index, or no index of
            words where one is asked for.
        StoreLockedError: another user's or another container's process has the Milvus Lite file open.
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
        analyzer=analyzer,
        create=create,
        model_note=str(getattr(embed_model, "model_note", "")),
        embed_model=embed_model,
    )


def open_stored(
    uri: str | Path,
    *,
    collection: str = "mm_retriever",
    token: str | None = None,
    timeout: float = 30.0,
) -> ImageStore:
    """Return an existing store without a model: to count, read and remove rows, not to add any.

    Raises:
        StoreError: there is no such file or collection; lists those that are. The others are those of `open_store`.
    """
    check_exists(uri)
    connection = Connection(uri, token=token, timeout=timeout)
    try:
        stored = stored_identity(connection, collection)
    finally:
        connection.close()
    return open_store(
        uri,
        stored,
        collection=collection,
        token=token,
        metric=stored.metric,
        timeout=timeout,
        hybrid=_NoWords(stored.sparse_model) if stored.sparse_model else False,
        create=False,
    )


class _NoWords:
    """Stands for the sparse model of a collection that is opened without its models."""

    def __init__(self, model_id: str) -> None:
        self.model_id = model_id

    def encode_documents(self, texts: Sequence[str]) -> list[dict[int, float]]:
        raise QueryError(f"this store was opened without its sparse model {self.model_id!r}: open_store(..., hybrid=)")

    encode_queries = encode_documents


class ImageStore(MilvusVectorStore):
    """A `MilvusVectorStore` for pictures: ready after opening, safe to filter, quick to query; use `open_store`.

    Every method has an `a...` twin that runs it in a thread, so one store serves any number of event loops. One store
    may be used by many threads; what they ask of a Milvus Lite file takes turns. A pickle or copy opens the collection
    again (a Milvus Lite file in the same process only); one that was opened with a token is not pickled.
    """

    _collection: Collection = PrivateAttr()
    _columns: Columns = PrivateAttr()
    _unserved_said: bool = PrivateAttr(default=False)
    _checked: set[tuple[str, str, str]] = PrivateAttr(default_factory=set)
    _embed_model: Any = PrivateAttr(default=None)
    _opening: dict[str, Any] = PrivateAttr(default_factory=dict)
    _said: set[str] = PrivateAttr(default_factory=set)

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
        analyzer: str | None = None,
        create: bool = True,
        model_note: str = "",
        embed_model: Any = None,
    ) -> None:
        check_options(collection, dimension, index, metric)
        if not create:
            check_exists(uri)
        connection = Connection(uri, token=token, timeout=timeout)
        fields: dict[str, Any] = {
            "uri": connection.where,
            "collection_name": collection,
            "dim": dimension,
            "embedding_field": VECTOR_FIELD,
            "doc_id_field": DOC_ID_FIELD,
            "text_key": TEXT_FIELD,
            "similarity_metric": metric.upper(),
            "upsert_mode": True,
            "output_fields": list(NODE_FIELDS),
            "batch_size": WRITE_ROWS,
            "hybrid_ranker": "RRFRanker",
            "use_async_client": False,
            **dict.fromkeys(_UNUSED_FIELDS),
        }
        # Not MilvusVectorStore's constructor: it would connect and create without timeouts, checks or our schema.
        super(MilvusVectorStore, self).__init__(**fields)
        self._collection = Collection(
            connection,
            collection,
            dimension=dimension,
            model_id=model_id,
            index=index,
            metric=metric,
            model_note=model_note,
        )
        self._columns = Columns(lambda expression, limit: self._collection.some([CONTENT_FIELD], expression, limit))
        self._embed_model = embed_model
        self._opening = {"uri": connection.lite_path or str(uri), "dimension": dimension, "model_id": model_id}
        self._opening |= {"collection": collection, "token": token, "index": index, "metric": metric}
        self._opening |= {"timeout": timeout, "hybrid": hybrid, "model_note": model_note}
        self._milvusclient = connection.client
        self._async_milvusclient = None
        try:
            self._collection.open(hybrid, overwrite=overwrite, create=create, analyzer=analyzer)
        except BaseException:
            self.close()
            raise
        self._collection_initialized = True

    @classmethod
    def class_name(cls) -> str:
        """Return the name under which LlamaIndex serialises the class."""
        return "ImageStore"

    @property
    def model_id(self) -> str:
        """The model whose vectors are in the collection."""
        return self._collection.model_id

    @property
    def index_type(self) -> str:
        """What the vectors are indexed by: "FLAT", "HNSW" or "AUTOINDEX"."""
        return self._collection.index_type

    @property
    def hybrid(self) -> bool:
        """Whether the collection has an index of words, so that it takes the query modes that need one."""
        return self._collection.words is not None

    @property
    def analyzer(self) -> str | None:
        """How the index of words finds them: "mixed" or "standard"; None without BM25."""
        words = self._collection.words
        return None if words is None or words.model is not None else words.analyzer

    def close(self) -> None:
        """Let go of the connection; a Milvus Lite file is free for other processes when its last store is closed."""
        self._collection.connection.close()

    def __enter__(self) -> ImageStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def aclient(self) -> Any:
        """There is none: asynchronous methods run the synchronous ones in threads.

        Raises:
            StoreError: always.
        """
        raise StoreError(
            "an ImageStore has no asynchronous client: await its methods (aquery, async_add, adelete, ...), "
            "or use store.client in a thread"
        )

    # ------------------------------------------------------------------------------------------ pickles and copies

    def __reduce__(self) -> tuple[Any, ...]:
        if self._opening["token"] or self.uri != self._opening["uri"]:
            raise CopyError(
                f"the store at {self.uri} was opened with a token or password, and a pickle is no place for one: "
                "open it again in the other process"
            )
        return _opened_again, (type(self), self._opening, self._embed_model)

    def __copy__(self) -> ImageStore:
        return _opened_again(type(self), self._opening, self._embed_model)

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> ImageStore:
        return self.__copy__()

    def to_dict(self, **kwargs: Any) -> dict[str, Any]:
        """What opens the same collection again with `from_dict`, as JSON holds it; a token is left out."""
        described = {name: value for name, value in self._opening.items() if name != "token"}
        if not isinstance(described["hybrid"], bool):
            described["hybrid"] = described["hybrid"].model_id
        return plain_metadata({**super().to_dict(**kwargs), **described, "uri": self.uri})

    @classmethod
    def from_dict(cls, data: dict[str, Any], **kwargs: Any) -> ImageStore:
        """Open the collection that `to_dict` described; keyword arguments (`token`, `embed_model`) add to it.

        Raises:
            StoreError: it is not there. Others are those of `open_store`.
        """
        known = ("uri", "dimension", "model_id", "collection", "index", "metric", "timeout", "hybrid", "model_note")
        if missing := [name for name in known[:4] if name not in data]:
            raise StoreError(f"this dict does not describe an ImageStore: it lacks {', '.join(missing)}")
        opening = {name: data[name] for name in known if name in data} | kwargs
        if isinstance(opening.get("hybrid"), str):
            raise StoreError(f"this store has words by the model {opening['hybrid']!r}: give it as hybrid=")
        embed_model = opening.pop("embed_model", None)
        return _opened_again(cls, opening, embed_model)

    # ------------------------------------------------------------------------------------------ writing

    def add(self, nodes: Sequence[BaseNode], **add_kwargs: Any) -> list[str]:
        """Store nodes with their vectors and return their ids; a node whose id is there already replaces it.

        Once it returns, the rows of a Milvus Lite file are on the disk and survive a power cut; a server keeps them by
        its own rules. All nodes are checked before the first is written. Of two nodes with one id the later is kept. An
        image node under the vector of its words, which is what a `VectorStoreIndex` gives it, is embedded by its pixels
        with the `embed_model` of `open_store`. Metadata come back as JSON holds them (see `plain_value`); a value that
        no filter can name or compare is in the node only, which is logged once for each key.

        Raises:
            NodeError: a node cannot be stored; none was.
        """
        _refuse_options("add", add_kwargs)
        stored = embedded_by_pixels(nodes, self._embed_model)
        self.write(stored)
        return [node.node_id for node in stored]

    def write(self, nodes: Sequence[BaseNode]) -> None:
        """As `add`, for image nodes whose vectors are known to be those of their pixels.

        Raises:
            NodeError: a node cannot be stored; none was.
        """
        kept = {node.node_id: storable_node(node) for node in nodes}
        rows = {id_: node_to_row(node, self._collection.dimension) for id_, node in kept.items()}
        self._say_unfiltered(kept.values())
        words = self._collection.words
        for ids in chunks(list(rows), self.batch_size):
            batch = [rows[one] for one in ids]
            if words is not None:
                columns = words.columns([kept[one] for one in ids])
                batch = [{**row, **more} for row, more in zip(batch, columns, strict=True)]
            self._collection.write(batch)
            self._columns.written(batch)

    def _say_unfiltered(self, nodes: Iterable[BaseNode]) -> None:
        keys = {key for node in nodes for key in unfiltered_keys(node.metadata)} - self._said
        if keys:
            self._said |= keys
            some = ", ".join(map(repr, sorted(keys)[:9]))
            logger.warning(
                "metadata that filters cannot name or compare stay in the nodes only: %s (reserved or unusual keys, "
                "nested values, lists of anything but text and numbers)",
                some if len(keys) <= 9 else f"{some} and {len(keys) - 9} more",
            )

    def delete(self, ref_doc_id: str, **delete_kwargs: Any) -> None:
        """Remove every node that was made from the document; an image from no document is its own, by its id."""
        _refuse_options("delete", delete_kwargs)
        if not isinstance(ref_doc_id, str) or not ref_doc_id:
            raise QueryError(f"delete needs the id of a document, got {ref_doc_id!r}")
        mine, by_id = one_of(DOC_ID_FIELD, [ref_doc_id]), one_of(ID_FIELD, [ref_doc_id])
        # a node without a document is its own; earlier versions left the id of its document empty
        self._collection.delete_where(joined([mine, all_of(by_id, one_of(DOC_ID_FIELD, [""]))], "or"))

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
        expression = self._expression(filters)
        if node_ids is None and not expression:
            raise FilterError("delete_nodes needs node_ids or filters; clear() removes everything")
        if node_ids is None:
            self._collection.delete_where(expression)
        elif expression:
            self._collection.delete_ids(list(self._collection.columns(node_ids, (), expression)))
        else:
            self._collection.delete_ids(node_ids)

    def clear(self) -> None:
        """Remove every row; the store stays open and ready."""
        self._collection.clear()
        self._columns.forget()

    # ------------------------------------------------------------------------------------------ searching

    def query(self, query: VectorStoreQuery, **kwargs: Any) -> VectorStoreQueryResult:
        """Return the nearest nodes, best first; similarities are inner products (-1 to 1 for unit vectors).

        Takes the modes DEFAULT and MMR (options `mmr_threshold`, `mmr_prefetch_factor`, `mmr_prefetch_k`), and on a
        store opened with `hybrid`: TEXT_SEARCH or SPARSE (by the words of `query_str` alone; similarities are BM25
        scores or inner products, above 0), and HYBRID (by vector and by words, joined by reciprocal rank fusion;
        similarities are sums of 1 / (60 + rank); without words, by vector alone; `hybrid_top_k` and `sparse_top_k` as
        LlamaIndex knows them). Filters hold for all. An empty list of doc_ids matches nothing; an empty list of
        node_ids is what a VectorStoreIndex sends for no restriction.

        A filter that no row can meet as it is written is answered, and logged; see `filter_problems`.

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
        if words is not None and words.unserved(query.query_str) and not self._unserved_said:
            self._unserved_said = True
            logger.warning(
                "collection %r finds words by the analyzer 'standard', which finds those of languages without spaces, "
                "like %r, only where they stand alone; a new collection (hybrid=True) finds them",
                self.collection_name,
                (query.query_str or "")[:60],
            )
        by_words_alone = words is not None and query.mode != VectorStoreQueryMode.HYBRID
        vector = [] if by_words_alone else self._query_vector(query.query_embedding)
        expression = _restriction(query, self._expression(query.filters))
        if expression is None:
            return VectorStoreQueryResult(nodes=[], similarities=[], ids=[])
        if mmr:
            return self._diverse(query, vector, expression, **kwargs)
        if words is None:
            hits = self._collection.search(vector, expression, top_k, NODE_FIELDS)
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
        found = self._collection.search(vector, expression, prefetch, (*NODE_FIELDS, VECTOR_FIELD))
        if damaged := [str(hit[ID_FIELD]) for hit in found if vector_is_damaged(hit["entity"])]:
            raise damaged_rows(damaged)
        hits = {str(hit[ID_FIELD]): hit for hit in found}
        scores, ids = get_top_k_mmr_embeddings(
            query_embedding=vector,
            embeddings=[list(hit["entity"][VECTOR_FIELD]) for hit in found],
            similarity_top_k=query.similarity_top_k,
            embedding_ids=list(hits),
            mmr_threshold=query.mmr_threshold if mmr_threshold is None else mmr_threshold,
        )
        return VectorStoreQueryResult(nodes=[_hit_node(hits[one]) for one in ids], similarities=list(scores), ids=ids)

    def _word_search(self, words: WordIndex, text: str | None, expression: str, limit: int) -> list[Hit]:
        asked = words.asked(text)
        if asked is None:
            raise QueryError("a search by words without words: set query_str")
        return self._collection.word_search(words, asked, expression, limit, NODE_FIELDS)

    def _fused_search(
        self, words: WordIndex, query: VectorStoreQuery, vector: list[float], expression: str, top_k: int
    ) -> list[Hit]:
        """By vector and by words, within the same restriction."""
        if query.alpha is not None:
            raise QueryError(
                f"alpha {query.alpha!r}: the two rankings are joined by rank and have no weights; leave it"
            )
        limit = _checked_top_k(query.hybrid_top_k or top_k)
        depth = min(MAX_TOP_K, max(_FUSED_ROWS, 4 * limit))
        asked = words.asked(query.query_str)
        by_words = None if asked is None else (words, asked, _checked_top_k(query.sparse_top_k or depth))
        return self._collection.fused_search((vector, depth), by_words, expression, limit, NODE_FIELDS)

    def _word_index(self, mode: VectorStoreQueryMode) -> WordIndex:
        if self._collection.words is None:
            raise QueryError(
                f"query mode {_mode_name(mode)}: this collection has no index of words and searches by vector only "
                "(default, mmr); open_store(..., hybrid=True) makes a new one that has it"
            )
        return self._collection.words

    def _query_vector(self, embedding: Sequence[float] | None) -> list[float]:
        if embedding is None:
            raise QueryError("a query without a vector: set query_embedding")
        with np.errstate(over="ignore"):  # what does not fit becomes infinite, and is refused below
            vector = np.asarray(embedding, dtype=np.float32)
        if vector.shape != (self._collection.dimension,):
            raise QueryError(
                f"a query vector of {vector.size} numbers; the collection holds {self._collection.dimension}"
            )
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

        Filters without a condition, `MetadataFilters(filters=[])`, match everything.

        Raises:
            FilterError: neither ids nor filters are given, or a filter cannot be expressed.
        """
        _refuse_options("get_nodes", kwargs)
        expression = self._expression(filters)
        if node_ids is None:
            if filters is None:
                raise FilterError("get_nodes needs node_ids or filters; MetadataFilters(filters=[]) gives all nodes")
            return [row_to_node(row) for page in self._collection.scan(NODE_FIELDS, expression) for row in page]
        rows = self._collection.columns(node_ids, NODE_FIELDS, expression)
        return [row_to_node(rows[one]) for one in dict.fromkeys(node_ids) if one in rows]

    def columns(self, node_ids: Sequence[str], names: Sequence[str]) -> dict[str, Row]:
        """Return the named columns of the rows with these ids, by id; an id that is not stored is left out."""
        return self._collection.columns(node_ids, names)

    def scan(self, names: Sequence[str] = (), filters: MetadataFilters | None = None) -> Iterator[list[Row]]:
        """Yield the rows that match (id and the named columns) in pages, by id; rows may be removed meanwhile."""
        pages = self._collection.scan(names, self._expression(filters))
        return (list(without_checksums(page, names)) for page in pages)

    def count(self, filters: MetadataFilters | None = None) -> int:
        """Return how many rows there are, or how many match the filters."""
        return self._collection.count(self._expression(filters))

    def filter_problems(self, filters: MetadataFilters | None) -> list[str]:
        """Return what filters say that the stored metadata do not bear out, a sentence each.

        A column that no row has, an order comparison with values of another type, a list operator on a column without
        lists: Milvus answers them with nothing, or with everything. The command line and the tools of agents refuse
        such filters; every other method of the store answers them and logs a warning.

        Raises:
            FilterError: a filter that cannot be expressed.
        """
        filter_expression(filters)
        return self._columns.problems(filters)

    def _expression(self, filters: MetadataFilters | None) -> str:
        """The expression of filters; what is wrong with them is logged once for each column and operator."""
        expression = filter_expression(filters)
        if expression and filters is not None:
            conditions = set(_conditions(filters))
            if conditions - self._checked:
                for problem in self._columns.problems(filters):
                    logger.warning("filter on collection %r: %s", self.collection_name, problem)
                if self._columns.names:
                    self._checked |= conditions
        return expression

    def verify(self) -> Verification:
        """Return whether every row, and every file of a Milvus Lite store, still is what was stored; reads it all."""
        return verify_collection(self._collection)

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


def _opened_again(kind: type[ImageStore], opening: dict[str, Any], embed_model: Any) -> ImageStore:
    """The store of a pickle or dict; what is gone since then must not become an empty collection."""
    return kind(**opening, create=False, embed_model=embed_model)


def _checked_top_k(top_k: int) -> int:
    if isinstance(top_k, bool) or not isinstance(top_k, int) or not 1 <= top_k <= MAX_TOP_K:
        raise QueryError(f"top_k {top_k!r}: give a whole number from 1 to {MAX_TOP_K}")
    return top_k


def _refuse_options(method: str, options: Mapping[str, Any]) -> None:
    if options:
        names = ", ".join(map(repr, options))
        raise QueryError(f"{method}() takes no {names}: conditions are given as filters, never as expressions")


def _restriction(query: VectorStoreQuery, expression: str) -> str | None:
    """The expression of all that limits the query; None where nothing can match.

    Args:
        query: what is asked.
        expression: of its filters.
    """
    if query.doc_ids is not None:
        if not query.doc_ids:
            return None
        expression = all_of(expression, one_of(DOC_ID_FIELD, query.doc_ids))
    return all_of(expression, one_of(ID_FIELD, query.node_ids)) if query.node_ids else expression


def _conditions(filters: MetadataFilters) -> Iterator[tuple[str, str, str]]:
    """Column, operator and type of value of each condition of filters that can be expressed."""
    for item in filters.filters:
        if isinstance(item, MetadataFilters):
            yield from _conditions(item)
        else:
            yield item.key, str(item.operator), type(item.value).__name__


def _mode_name(mode: VectorStoreQueryMode | str) -> str:
    return repr(mode.value if isinstance(mode, VectorStoreQueryMode) else mode)


def _hit_node(hit: Hit) -> BaseNode:
    return row_to_node({**hit["entity"], ID_FIELD: hit[ID_FIELD]})
