"""LlamaIndex's queries as searches of a `Collection`.

Owns the query modes and options, and how a query is checked and answered.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any

import numpy as np
from llama_index.core.indices.query.embedding_utils import get_top_k_mmr_embeddings
from llama_index.core.schema import BaseNode
from llama_index.core.vector_stores.types import VectorStoreQuery, VectorStoreQueryMode, VectorStoreQueryResult

from mm_retriever.errors import QueryError
from mm_retriever.store.collection import Collection, Hit
from mm_retriever.store.filters import all_of, one_of
from mm_retriever.store.rows import damaged_rows, row_to_node, vector_is_damaged
from mm_retriever.store.schema import DOC_ID_FIELD, ID_FIELD, NODE_FIELDS, VECTOR_FIELD
from mm_retriever.store.words import WordIndex

logger = logging.getLogger(__name__)

MAX_TOP_K = 16_384
"""The most rows that one Milvus request returns."""

_FUSED_ROWS = 128
"""The least depth of each half of a hybrid search: the best of one half may be far below top_k in the other."""

WORD_MODES = (VectorStoreQueryMode.HYBRID, VectorStoreQueryMode.TEXT_SEARCH, VectorStoreQueryMode.SPARSE)
_MODES = (VectorStoreQueryMode.DEFAULT, VectorStoreQueryMode.MMR, *WORD_MODES)
_MMR_OPTIONS = ("mmr_threshold", "mmr_prefetch_factor", "mmr_prefetch_k")


def refuse_options(method: str, options: Mapping[str, Any]) -> None:
    """Refuse keyword arguments that a method of the store does not know."""
    if options:
        names = ", ".join(map(repr, options))
        raise QueryError(f"{method}() takes no {names}: conditions are given as filters, never as expressions")


def answer(
    collection: Collection, query: VectorStoreQuery, expression: str, options: Mapping[str, Any]
) -> VectorStoreQueryResult:
    """Return what `ImageStore.query` returns.

    Args:
        collection: to search.
        query: of LlamaIndex.
        expression: of the query's filters.
        options: keyword arguments of the call, for MMR.
    """
    if query.mode not in _MODES:
        raise QueryError(
            f"query mode {_mode_name(query.mode)} is not one of {', '.join(mode.value for mode in _MODES)}"
        )
    mmr = query.mode == VectorStoreQueryMode.MMR
    refuse_options("query", {key: value for key, value in options.items() if not (mmr and key in _MMR_OPTIONS)})
    if query.embedding_field not in (None, VECTOR_FIELD):
        raise QueryError(f"embedding_field {query.embedding_field!r}: vectors are in {VECTOR_FIELD!r}")
    top_k = checked_top_k(query.similarity_top_k)
    words = _word_index(collection, query.mode) if query.mode in WORD_MODES else None
    by_words_alone = words is not None and query.mode != VectorStoreQueryMode.HYBRID
    vector = [] if by_words_alone else _query_vector(query.query_embedding, collection.dimension)
    if query.doc_ids is not None:
        if not query.doc_ids:
            return VectorStoreQueryResult(nodes=[], similarities=[], ids=[])
        expression = all_of(expression, one_of(DOC_ID_FIELD, query.doc_ids))
    if query.node_ids:
        expression = all_of(expression, one_of(ID_FIELD, query.node_ids))
    if mmr:
        return _diverse(collection, query, vector, expression, **options)
    if words is None:
        hits = collection.search(vector, expression, top_k, NODE_FIELDS)
    elif by_words_alone:
        terms = words.query_terms(query.query_str)
        if terms is None:
            raise QueryError("a search by words without words: set query_str")
        hits = collection.word_search(words, terms, expression, top_k, NODE_FIELDS)
    else:
        hits = _fused(collection, words, query, vector, expression, top_k)
    return VectorStoreQueryResult(
        nodes=[_hit_node(hit) for hit in hits],
        similarities=[float(hit["distance"]) for hit in hits],
        ids=[str(hit[ID_FIELD]) for hit in hits],
    )


def log_unserved(collection: Collection, query: VectorStoreQuery, logged: set[str]) -> None:
    """Log once that the full-text index hardly finds words in the script of a query."""
    words, topic = collection.words, "words that the analyzer does not serve"
    if words is None or query.mode not in WORD_MODES or topic in logged or not words.unserved(query.query_str):
        return
    logged.add(topic)
    logger.warning(
        "collection %r finds words by the analyzer 'standard', which finds those of languages without spaces, like %r, "
        "only where they stand alone; a new collection (hybrid=True) finds them",
        collection.name,
        (query.query_str or "")[:60],
    )


def _diverse(
    collection: Collection,
    query: VectorStoreQuery,
    vector: list[float],
    expression: str,
    *,
    mmr_threshold: float | None = None,
    mmr_prefetch_factor: float = 4.0,
    mmr_prefetch_k: int | None = None,
) -> VectorStoreQueryResult:
    """Maximal marginal relevance: results near the query and unlike each other. The only query that fetches vectors."""
    prefetch = mmr_prefetch_k or int(query.similarity_top_k * mmr_prefetch_factor)
    prefetch = min(MAX_TOP_K, max(query.similarity_top_k, prefetch))
    near = collection.search(vector, expression, prefetch, (*NODE_FIELDS, VECTOR_FIELD))
    if damaged := [str(hit[ID_FIELD]) for hit in near if vector_is_damaged(hit["entity"])]:
        raise damaged_rows(damaged)
    hits = {str(hit[ID_FIELD]): hit for hit in near}
    scores, ids = get_top_k_mmr_embeddings(
        query_embedding=vector,
        embeddings=[list(hit["entity"][VECTOR_FIELD]) for hit in near],
        similarity_top_k=query.similarity_top_k,
        embedding_ids=list(hits),
        mmr_threshold=query.mmr_threshold if mmr_threshold is None else mmr_threshold,
    )
    return VectorStoreQueryResult(nodes=[_hit_node(hits[id_]) for id_ in ids], similarities=list(scores), ids=ids)


def _fused(
    collection: Collection,
    words: WordIndex,
    query: VectorStoreQuery,
    vector: list[float],
    expression: str,
    top_k: int,
) -> list[Hit]:
    """The fusion of a vector search and a full-text search under the same filters."""
    if query.alpha is not None:
        raise QueryError(f"alpha {query.alpha!r}: the two rankings are joined by rank and have no weights; leave it")
    limit = checked_top_k(query.hybrid_top_k or top_k)
    depth = min(MAX_TOP_K, max(_FUSED_ROWS, 4 * limit))
    terms = words.query_terms(query.query_str)
    by_words = None if terms is None else (words, terms, checked_top_k(query.sparse_top_k or depth))
    return collection.fused_search((vector, depth), by_words, expression, limit, NODE_FIELDS)


def _word_index(collection: Collection, mode: VectorStoreQueryMode) -> WordIndex:
    if collection.words is None:
        raise QueryError(
            f"query mode {_mode_name(mode)}: this collection has no index of words and searches by vector only "
            "(default, mmr); open_store(..., hybrid=True) makes a new one that has it"
        )
    return collection.words


def _query_vector(embedding: Sequence[float] | None, dimension: int) -> list[float]:
    if embedding is None:
        raise QueryError("a query without a vector: set query_embedding")
    with np.errstate(over="ignore"):  # what does not fit becomes infinite, and is refused below
        vector = np.asarray(embedding, dtype=np.float32)
    if vector.shape != (dimension,):
        raise QueryError(f"a query vector of {vector.size} numbers; the collection holds {dimension}")
    if not np.isfinite(vector).all():
        raise QueryError("the query vector holds NaN or infinity")
    numbers: list[float] = vector.tolist()
    return numbers


def checked_top_k(top_k: object) -> int:
    """Return the number of results to fetch; whole numbers of numpy are accepted.

    Raises:
        QueryError: it is not a whole number, or out of range.
    """
    if isinstance(top_k, bool) or not isinstance(top_k, Integral) or not 1 <= int(top_k) <= MAX_TOP_K:
        raise QueryError(f"top_k {top_k!r}: give a whole number from 1 to {MAX_TOP_K}")
    return int(top_k)


def _mode_name(mode: VectorStoreQueryMode | str) -> str:
    return repr(mode.value if isinstance(mode, VectorStoreQueryMode) else mode)


def _hit_node(hit: Hit) -> BaseNode:
    columns = {name: value for name, value in hit["entity"].items() if name != VECTOR_FIELD}
    return row_to_node({**columns, ID_FIELD: hit[ID_FIELD]})
