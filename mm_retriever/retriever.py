"""`ComposedRetriever`: text, a picture, or a picture and what should be different about it, to the nearest pictures.

Owns how a query becomes one vector and which results are left out. Knows nothing of models and of Milvus.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import Iterator
from typing import Any, Literal, Protocol

from llama_index.core.base.base_retriever import BaseRetriever
from llama_index.core.callbacks import CallbackManager
from llama_index.core.schema import BaseNode, ImageNode, NodeWithScore, QueryBundle
from llama_index.core.vector_stores.types import MetadataFilters, VectorStoreQuery, VectorStoreQueryMode

from mm_retriever.errors import ImageLoadError, QueryError, StoreMismatchError
from mm_retriever.image import DEFAULT_POLICY, ImageSource, read_image_bytes
from mm_retriever.store import MAX_TOP_K, ImageStore, filter_expression, same_model


class QueryEmbedding(Protocol):
    """What a retriever asks of a model; `VisualizedBGEEmbedding` has it."""

    @property
    def model_id(self) -> str:
        """The name that the store checked on opening."""
        ...

    def get_query_embedding(self, query: str) -> list[float]:
        """Return the vector of a text."""
        ...

    def get_agg_embedding_from_queries(self, queries: list[str]) -> list[float]:
        """Return the mean of the vectors of several texts."""
        ...

    def get_image_embedding(self, img_file_path: Any) -> list[float]:
        """Return the vector of a picture."""
        ...

    def get_composed_embedding(self, text: str, image: ImageSource) -> list[float]:
        """Return the vector of a picture and a text together."""
        ...


class ComposedRetriever(BaseRetriever):
    """Retrieves by text, by picture, or by both at once.

    `retrieve` takes a text or a `QueryBundle(query_str, image_path=...)`; a bundle whose `embedding` is set is searched
    by that. It returns `NodeWithScore`s, best first: `ImageNode`s where pictures were stored, and `score` their inner
    product with the query, from -1 to 1 and higher for nearer (the cosine, as the vectors have length 1).

    Args:
        store: from `open_store`.
        embed_model: the model that the store was opened for.
        top_k: how many results, 1 to 16384.
        filters: only what matches these.
        min_score: only what scores at least this.
        mode: "default" searches by vector; "hybrid" also by the words of the query, in a store opened with `hybrid`.
            `score` is then the sum of 1 / (60 + rank) over both rankings.
        exclude_query_image: leave out the query picture itself, by its path and by its contents wherever copies of it
            lie: a composed query otherwise finds it first. The places it frees go to the next results.
        callback_manager: as LlamaIndex knows it.

    Raises:
        QueryError: nothing to search for, or a number out of range.
        FilterError: filters that cannot be expressed.
    """

    def __init__(
        self,
        store: ImageStore,
        embed_model: QueryEmbedding,
        *,
        top_k: int = 9,
        filters: MetadataFilters | None = None,
        min_score: float | None = None,
        mode: Literal["default", "hybrid"] = "default",
        exclude_query_image: bool = False,
        callback_manager: CallbackManager | None = None,
    ) -> None:
        if isinstance(top_k, bool) or not isinstance(top_k, int) or not 1 <= top_k <= MAX_TOP_K:
            raise QueryError(f"top_k {top_k!r}: give a whole number from 1 to {MAX_TOP_K}")
        if min_score is not None and min_score != min_score:
            raise QueryError("min_score is NaN: give a number, usually from -1 to 1")
        if mode not in ("default", "hybrid"):
            raise QueryError(f"mode {mode!r} is not one of 'default', 'hybrid'")
        if mode == "hybrid" and not store.hybrid:
            raise QueryError("mode 'hybrid' needs a store with an index of words: open_store(..., hybrid=True)")
        if mode == "hybrid" and min_score is not None:
            raise QueryError("min_score goes with mode 'default': hybrid scores say ranks, not how near a picture is")
        if not same_model(store.model_id, embed_model.model_id):
            raise StoreMismatchError(
                f"the store was opened for {store.model_id!r}, the model given is {embed_model.model_id!r}"
            )
        filter_expression(filters)  # what cannot be expressed is refused here, not at the first query
        super().__init__(callback_manager=callback_manager)
        self._store = store
        self._embed_model = embed_model
        self._top_k = top_k
        self._filters = filters
        self._min_score = min_score
        self._mode = VectorStoreQueryMode(mode)
        self._exclude_query_image = exclude_query_image

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        vector = self._vector(query_bundle)
        if self._exclude_query_image and query_bundle.image_path:
            return self._others(query_bundle, vector, query_bundle.image_path)
        return list(self._search(query_bundle, vector, self._top_k))

    async def _aretrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        return await asyncio.to_thread(self._retrieve, query_bundle)

    def _vector(self, query: QueryBundle) -> list[float]:
        if query.embedding is not None:
            return query.embedding
        text = query.query_str if query.query_str and query.query_str.strip() else ""
        if query.image_path:
            if text:
                return self._embed_model.get_composed_embedding(text, query.image_path)
            return self._embed_model.get_image_embedding(query.image_path)
        if query.custom_embedding_strs:
            return self._embed_model.get_agg_embedding_from_queries(query.custom_embedding_strs)
        if text:
            return self._embed_model.get_query_embedding(text)
        raise QueryError("nothing to search for: give a text, QueryBundle(query_str, image_path=...), or both")

    def _search(self, query: QueryBundle, vector: list[float], top_k: int) -> Iterator[NodeWithScore]:
        found = self._store.query(
            VectorStoreQuery(
                query_str=query.query_str,
                query_embedding=vector,
                similarity_top_k=top_k,
                filters=self._filters,
                mode=self._mode,
            )
        )
        for node, score in zip(found.nodes or (), found.similarities or (), strict=True):
            if self._min_score is None or score >= self._min_score:
                yield NodeWithScore(node=node, score=score)

    def _others(self, query: QueryBundle, vector: list[float], image: str) -> list[NodeWithScore]:
        """The nearest that are not the query picture; more are fetched for as long as copies of it take up places."""
        places, digest = _identity(image, getattr(self._embed_model, "image_policy", DEFAULT_POLICY))
        limit = min(self._top_k + 1, MAX_TOP_K)
        while True:
            found = list(self._search(query, vector, limit))
            others = [one for one in found if not _is_picture(one.node, places, digest)]
            if len(others) >= self._top_k or len(found) < limit or limit == MAX_TOP_K:
                return others[: self._top_k]
            limit = min(4 * limit, MAX_TOP_K)


def _identity(image: str, policy: Any) -> tuple[set[str], str | None]:
    """Names and digest of the file of a picture, as ingestion stores them."""
    try:
        digest = hashlib.sha256(read_image_bytes(image, policy=policy)).hexdigest()
    except ImageLoadError:  # the bundle brought its vector along; the file need not be here
        digest = None
    return {image, os.path.abspath(image), os.path.realpath(image)}, digest  # noqa: PTH100 - may be no path at all


def _is_picture(node: BaseNode, places: set[str], digest: str | None) -> bool:
    if digest is not None and node.metadata.get("digest") == digest:
        return True
    return isinstance(node, ImageNode) and (node.image_path in places or node.image_url in places)
