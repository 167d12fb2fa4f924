"""`open_store` and `ImageStore`: a LlamaIndex vector store on one Milvus collection.

Owns how LlamaIndex's nodes and filters become rows and expressions of a `Collection`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_index.core.bridge.pydantic import PrivateAttr
from llama_index.core.schema import BaseNode, ImageNode, TextNode
from llama_index.core.vector_stores.types import MetadataFilters, VectorStoreQuery, VectorStoreQueryResult
from llama_index.vector_stores.milvus import MilvusVectorStore

from mm_retriever.errors import CopyError, FilterError, QueryError, StoreError
from mm_retriever.store.collection import Collection, Row
from mm_retriever.store.columns import Columns
from mm_retriever.store.connection import Connection, check_exists, is_server
from mm_retriever.store.filters import all_of, filter_expression, id_list, joined, one_of
from mm_retriever.store.inspection import Verification, store_html, verify_collection
from mm_retriever.store.pixels import embedded_by_pixels
from mm_retriever.store.queries import answer, log_unserved, refuse_options
from mm_retriever.store.rows import chunks, log_unfiltered, row_to_node, storable_node, stored_row, without_checksums
from mm_retriever.store.schema import (
    CONTENT_FIELD,
    DOC_ID_FIELD,
    ID_FIELD,
    NODE_FIELDS,
    VECTOR_FIELD,
    check_options,
    milvus_fields,
    model_facts,
)
from mm_retriever.store.values import plain_metadata
from mm_retriever.store.words import SparseEmbedding, sparse_option
from mm_retriever.threads import InThreads, in_thread

if TYPE_CHECKING:
    from mm_retriever.embedding import ComposedEmbedding

logger = logging.getLogger(__name__)


def open_store(
    uri: str | Path,
    embed_model: ComposedEmbedding,
    *,
    collection: str = "mm_retriever",
    token: str | None = None,
    index: str = "auto",
    metric: str = "auto",
    timeout: float = 30.0,
    overwrite: bool = False,
    hybrid: bool | SparseEmbedding = False,
    analyzer: str | None = None,
    create: bool = True,
    rows: int | None = None,
) -> ImageStore:
    """Return a store that is ready to be written and searched; a missing collection is created.

    Args:
        uri: a Milvus Lite file (a path that ends in `.db`; parents are made), or the URI of a Milvus server or of
            Zilliz Cloud (`http://`, `https://`, `tcp://`, `unix:`).
        embed_model: its `dimension`, `model_id` and `model_note` are kept with the collection and checked on opening.
            It also embeds images that a `VectorStoreIndex` adds under vectors of their text.
        collection: name of the collection.
        token: `user:password` or an API key, for servers that ask for one.
        index: one of `store.schema.INDEXES`; "auto" chooses by place and `rows`: "FLAT" is exact, the default on Lite.
        metric: "IP" or "COSINE", the same for unit vectors; "auto" is that of an existing collection, else IP.
        timeout: seconds for connecting, and for each request.
        overwrite: first drop an existing collection of that name, with all its rows.
        hybrid: True also indexes the words of each node (its text, and the texts in its metadata) by BM25, for hybrid
            search; a sparse model (`BGEM3SparseEmbedding`) does it by learned weights. An existing BM25 index is kept
            up either way. A server must be Milvus 2.5 or later.
        create: False refuses a missing file or collection, and lists those that exist: a mistyped name makes none.
        analyzer: how BM25 finds words, kept with the collection. "mixed", that of new collections, serves any language,
            also those without spaces between words (Chinese, Japanese, Thai). "standard" serves languages with spaces;
            collections of earlier versions have it, and a search by words that it cannot serve is logged.
        rows: how many a new collection is made for; default: not known, and taken to be few.

    Raises:
        StoreError: there is no such file or collection, and `create` is False.
        StoreMismatchError: the collection holds vectors of another model, dimension, metric or index, or no index of
            words where one is asked for.
        StoreLockedError: another user's or another container's process has the Milvus Lite file open.
        StoreUnavailableError: the server does not answer within the timeout.
    """
    return ImageStore(
        uri,
        **model_facts(embed_model),
        collection=collection,
        token=token,
        index=index,
        metric=metric,
        timeout=timeout,
        overwrite=overwrite,
        hybrid=hybrid,
        analyzer=analyzer,
        create=create,
        rows=rows,
        embed_model=embed_model,
    )


def open_stored(
    uri: str | Path, *, collection: str = "mm_retriever", token: str | None = None, timeout: float = 30.0
) -> ImageStore:
    """Return an existing store without a model: to count, read and remove rows, not to add any.

    Raises:
        StoreError: there is no such file or collection; lists those that exist. Others are those of `open_store`.
    """
    return ImageStore(uri, collection=collection, token=token, timeout=timeout, hybrid=None, create=False)


class ImageStore(MilvusVectorStore):
    """A `MilvusVectorStore` for images: ready after opening, safe to filter, quick to query; see `open_store`.

    The constructor takes the options of `open_store`. Of `MilvusVectorStore`'s own it takes `collection_name`, `dim`,
    `similarity_metric`, `enable_sparse`, `sparse_embedding_function` and `batch_size`, and refuses others unless they
    change nothing. `dimension`, `model_id` and `metric` default to those of the existing collection.

    Every method has an `a...` twin that runs it in a thread, so one store serves any number of event loops. One store
    may be used by many threads; a Milvus Lite file answers one request at a time. A pickle or copy opens the collection
    again (a Milvus Lite file in the same process only); a store that was opened with a token is not pickled.
    """

    _collection: Collection = PrivateAttr()
    _columns: Columns = PrivateAttr()
    _embed_model: Any = PrivateAttr(default=None)
    _opening: dict[str, Any] = PrivateAttr(default_factory=dict)
    _logged: set[str] = PrivateAttr(default_factory=set)

    def __init__(
        self,
        uri: str | Path,
        token: str | None = None,
        *,
        dimension: int | None = None,
        model_id: str = "",
        collection: str = "mm_retriever",
        index: str = "auto",
        metric: str | None = "auto",
        timeout: float = 30.0,
        overwrite: bool = False,
        hybrid: bool | SparseEmbedding | None = False,
        analyzer: str | None = None,
        create: bool = True,
        rows: int | None = None,
        model_note: str = "",
        embed_model: Any = None,
        **llamaindex: Any,
    ) -> None:
        collection = llamaindex.pop("collection_name", collection)
        dimension = llamaindex.pop("dim", dimension)
        metric = llamaindex.pop("similarity_metric", metric)
        metric = None if (metric or "auto").lower() == "auto" else metric
        hybrid = sparse_option(llamaindex, hybrid)
        check_options(collection, dimension, index, metric, lite=not is_server(uri))
        fields = milvus_fields(llamaindex)
        if not create:
            check_exists(uri)
        connection = Connection(uri, token=token, timeout=timeout)
        vectors: dict[str, Any] = {"dimension": dimension, "model_id": model_id, "model_note": model_note}
        vectors |= {"index": index, "metric": metric}
        opened = Collection(connection, collection, rows=rows, **vectors)
        try:
            opened.open(hybrid, overwrite=overwrite, create=create, analyzer=analyzer)
            fields |= {"uri": connection.where, "collection_name": collection, "dim": opened.dimension}
            fields |= {"similarity_metric": opened.metric, "enable_sparse": opened.words is not None}
            # Not MilvusVectorStore's constructor: it would connect and create without timeouts, checks or our schema.
            super(MilvusVectorStore, self).__init__(**fields)
        except BaseException:
            connection.close()
            raise
        self._collection = opened
        self._columns = Columns(lambda where, most: opened.some([CONTENT_FIELD], where, most), opened.declared)
        self._embed_model = embed_model
        self._opening = {"uri": connection.lite_path or str(uri), "collection": collection, "token": token}
        self._opening |= {"timeout": timeout, "hybrid": hybrid, **vectors}

    @classmethod
    def class_name(cls) -> str:
        """Return the name under which LlamaIndex serialises the class."""
        return "ImageStore"

    @property
    def model_id(self) -> str:
        """The model whose vectors are in the collection; "" if it is not known."""
        return self._collection.model_id

    @property
    def index_type(self) -> str:
        """What the vectors are indexed by: one of `store.schema.INDEXES`."""
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

    @property
    def client(self) -> Any:
        """Pymilvus' client of this store's connection."""
        return self._collection.connection.client

    @property
    def aclient(self) -> Any:
        """Pymilvus' client with methods to be awaited: each runs the synchronous one in a thread."""
        return InThreads(self.client)

    def close(self) -> None:
        """Let go of the connection; a Milvus Lite file is free for other processes when its last store is closed."""
        self._collection.connection.close()

    def __enter__(self) -> ImageStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    _repr_html_ = store_html

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
        """Return what `from_dict` opens the same collection with, as JSON takes it; a token is left out."""
        described = {name: value for name, value in self._opening.items() if name != "token"}
        if not isinstance(described["hybrid"], bool | None):
            described["hybrid"] = described["hybrid"].model_id
        return plain_metadata({**super().to_dict(**kwargs), **described, "uri": self.uri})

    @classmethod
    def from_dict(cls, data: dict[str, Any], **kwargs: Any) -> ImageStore:
        """Open the collection that `to_dict` described; keyword arguments (`token`, `embed_model`) add to it.

        Raises:
            StoreError: it is missing. Others are those of `open_store`.
        """
        known = ("uri", "dimension", "model_id", "collection", "index", "metric", "timeout", "hybrid", "model_note")
        if missing := [name for name in known[:4] if name not in data]:
            raise StoreError(f"this dict does not describe an ImageStore: it lacks {', '.join(missing)}")
        opening = {name: data[name] for name in known if name in data} | kwargs
        if isinstance(opening.get("hybrid"), str):
            raise StoreError(f"this store has words by the model {opening['hybrid']!r}: give it as hybrid=")
        return _opened_again(cls, opening, opening.pop("embed_model", None))

    def add(self, nodes: Sequence[BaseNode], **add_kwargs: Any) -> list[str]:
        """Store nodes with their vectors and return their ids; a node replaces the stored one of its id.

        Once it returns, the rows of a Milvus Lite file are on the disk and survive a power cut; a server keeps them by
        its own rules. All nodes are checked before the first is written. Of two nodes with one id the later is kept.
        Metadata come back as JSON takes them (see `plain_value`); a value that no filter can name or compare is kept in
        the node only, which is logged once for each key.

        A `VectorStoreIndex` gives an image node the vector of its text. Such a node is embedded by its pixels with the
        `embed_model` of `open_store`. Whether a vector is of the text is known where that model computed it; otherwise
        the text is embedded and compared. `write` skips this check.

        Raises:
            NodeError: a node cannot be stored; no node was.
        """
        refuse_options("add", add_kwargs)
        self._write(stored := embedded_by_pixels(nodes, self._embed_model))
        return [node.node_id for node in stored]

    def write(self, nodes: Sequence[BaseNode]) -> None:
        """As `add`, for image nodes whose vectors are known to be those of their pixels.

        Raises:
            NodeError: a node cannot be stored; no node was.
        """
        self._write([storable_node(node) for node in nodes])

    def _write(self, nodes: Sequence[ImageNode | TextNode]) -> None:
        kept = {node.node_id: node for node in nodes}
        rows = {id_: stored_row(node, self._collection.dimension) for id_, node in kept.items()}
        log_unfiltered(kept.values(), self._logged)
        words = self._collection.words
        for ids in chunks(list(rows), self.batch_size):
            batch = [rows[id_] for id_ in ids]
            if words is not None:
                columns = words.columns([kept[id_] for id_ in ids])
                batch = [{**row, **more} for row, more in zip(batch, columns, strict=True)]
            self._collection.write(batch)
            self._columns.written(batch)

    def flush(self) -> None:
        """Make rows that were just stored in a Milvus Lite file fast to search; servers do so themselves."""
        if self._collection.connection.lite_path is not None:
            self._collection.flush()

    def delete(self, ref_doc_id: str, **delete_kwargs: Any) -> None:
        """Remove every node that was made from the document; an image without a document is removed by its own id."""
        refuse_options("delete", delete_kwargs)
        if not isinstance(ref_doc_id, str) or not ref_doc_id:
            raise QueryError(f"delete needs the id of a document, got {ref_doc_id!r}")
        of_document, by_id = one_of(DOC_ID_FIELD, [ref_doc_id]), one_of(ID_FIELD, [ref_doc_id])
        # a node without a document is its own; earlier versions left the id of its document empty
        self._collection.delete_where(joined([of_document, all_of(by_id, one_of(DOC_ID_FIELD, [""]))], "or"))

    def delete_nodes(
        self, node_ids: Sequence[str] | None = None, filters: MetadataFilters | None = None, **delete_kwargs: Any
    ) -> None:
        """Remove the nodes with these ids, those that match the filters or, given both, those that meet both.

        Raises:
            FilterError: neither is given; `clear()` removes all.
        """
        refuse_options("delete_nodes", delete_kwargs)
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
        return self.search(query, filter_expression(query.filters), **kwargs)

    def search(self, query: VectorStoreQuery, expression: str, **kwargs: Any) -> VectorStoreQueryResult:
        """As `query`, for a caller who has translated its filters already (`filter_expression`)."""
        self._log_problems(query.filters)
        log_unserved(self._collection, query, self._logged)
        return answer(self._collection, query, expression, kwargs)

    def get_nodes(
        self,
        node_ids: Sequence[str] | None = None,
        filters: MetadataFilters | None = None,
        *,
        with_vectors: bool = False,
        **kwargs: Any,
    ) -> list[BaseNode]:
        """Return the nodes with these ids (in this order), those that match the filters or, given both, that meet both.

        Args:
            node_ids: an id that is not stored is left out.
            filters: without a condition, `MetadataFilters(filters=[])`, they match everything.
            with_vectors: also fetch each node's vector, as its `embedding`.
            kwargs: refused.

        Raises:
            FilterError: neither ids nor filters are given, or a filter cannot be expressed.
            StoreDamagedError: a row, or a vector that is asked for, is not what was stored.
        """
        refuse_options("get_nodes", kwargs)
        names = (*NODE_FIELDS, VECTOR_FIELD) if with_vectors else NODE_FIELDS
        expression = self._expression(filters)
        if node_ids is None:
            if filters is None:
                raise FilterError("get_nodes needs node_ids or filters; MetadataFilters(filters=[]) gives all nodes")
            return [row_to_node(row) for page in self._collection.scan(names, expression) for row in page]
        rows = self._collection.columns(ids := id_list(node_ids), names, expression)
        return [row_to_node(rows[id_]) for id_ in dict.fromkeys(ids) if id_ in rows]

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
        """Return the conditions that no stored metadata can meet, a sentence each.

        These are a column that no row has, a comparison with values of another type, and a list operator on a
        column without lists. Milvus answers them with nothing, or with everything. The command line and the tools of
        agents refuse them; the store's methods answer them and log a warning. `query` refuses what cannot be expressed.
        """
        return self._columns.problems(filters)

    def _expression(self, filters: MetadataFilters | None) -> str:
        expression = filter_expression(filters)
        self._log_problems(filters)
        return expression

    def _log_problems(self, filters: MetadataFilters | None) -> None:
        """Log what is wrong with filters, once for each column and operator; refuse those on declared columns."""
        if filters is not None and filters.filters:
            self._columns.check(filters)
            for problem in self._columns.new_problems(filters):
                logger.warning("filter on collection %r: %s", self.collection_name, problem)

    def verify(self) -> Verification:
        """Return whether every row, and every file of a Milvus Lite store, still is what was stored; reads it all."""
        return verify_collection(self._collection)

    async_add = in_thread(add)  # type: ignore[arg-type]
    adelete = in_thread(delete)  # type: ignore[arg-type]
    adelete_nodes = in_thread(delete_nodes)  # type: ignore[arg-type]
    aclear = in_thread(clear)  # type: ignore[arg-type]
    aquery = in_thread(query)  # type: ignore[arg-type]
    aget_nodes = in_thread(get_nodes)  # type: ignore[arg-type]


def _opened_again(kind: type[ImageStore], opening: dict[str, Any], embed_model: Any) -> ImageStore:
    """The store of a pickle or dict; a collection that was removed since then is not created anew."""
    return kind(**opening, create=False, embed_model=embed_model)
