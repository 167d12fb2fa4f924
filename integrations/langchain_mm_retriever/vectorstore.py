"""`ImageVectorStore`: a LangChain vector store over an `ImageStore`."""

from __future__ import annotations

import math
import uuid
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from langchain_core.vectorstores import VectorStore
from llama_index.core.schema import BaseNode, ImageNode, NodeWithScore
from llama_index.core.vector_stores.types import VectorStoreQuery, VectorStoreQueryMode

from langchain_mm_retriever.documents import ComposedQuery, Filters, read_filters, read_query, to_document, to_node
from langchain_mm_retriever.embeddings import VisualizedBGEEmbeddings
from mm_retriever.embedding import ComposedEmbedding
from mm_retriever.errors import QueryError
from mm_retriever.store import ImageStore, open_store


class ImageVectorStore(VectorStore):
    """Texts and images in one collection of Milvus, searched by text, by image, or by both.

        vectors = ImageVectorStore(open_store("photos.db", model), model)
        vectors.add_documents([Document("", metadata={"image_path": "leopard.jpg"})])
        vectors.similarity_search({"text": "phone case with this", "image": "leopard.jpg"}, k=3)

    A document whose metadata have `image_path` or `image_url` is that image; any other is its text. Rows that
    `ingest_images` stored are there too. Scores are inner products, from -1 to 1 and higher for nearer.

    Args:
        store: from `open_store`; or an `ImageStore` of the embeddings' dimension, for other embeddings of LangChain.
        embeddings: the model that the store was opened for. One that is not ours embeds texts alone.
    """

    def __init__(self, store: ImageStore, embeddings: Embeddings | ComposedEmbedding) -> None:
        self.store = store
        self._embeddings = (
            VisualizedBGEEmbeddings(embeddings) if isinstance(embeddings, ComposedEmbedding) else embeddings
        )

    @property
    def embeddings(self) -> Embeddings:
        """The model, as LangChain knows it."""
        return self._embeddings

    @classmethod
    def from_texts(
        cls,
        texts: list[str],
        embedding: Embeddings | ComposedEmbedding,
        metadatas: list[dict[str, Any]] | None = None,
        *,
        ids: list[str] | None = None,
        uri: str | Path = "mm_retriever.db",
        collection: str = "langchain",
        token: str | None = None,
        **kwargs: Any,
    ) -> ImageVectorStore:
        """Open the collection of a place, which is made if it is missing, and add texts.

        Args:
            texts: one for each document.
            embedding: the model.
            metadatas: of each text.
            ids: of each text; one that is there already is replaced.
            uri: as of `open_store`.
            collection: its name.
            token: as of `open_store`.
            kwargs: further options of `open_store`.
        """
        if isinstance(embedding, ComposedEmbedding):
            embedding = VisualizedBGEEmbeddings(embedding)
        if isinstance(embedding, VisualizedBGEEmbeddings):
            store = open_store(uri, embedding.embed_model, collection=collection, token=token, **kwargs)
        else:
            dimension = len(embedding.embed_query("dimension"))
            store = ImageStore(uri, token, dimension=dimension, collection=collection, **kwargs)
        vectors = cls(store, embedding)
        vectors.add_texts(texts, metadatas, ids=ids)
        return vectors

    # ------------------------------------------------------------------------------------------ writing

    def add_texts(
        self,
        texts: Iterable[str],
        metadatas: list[dict[str, Any]] | None = None,
        *,
        ids: list[str] | None = None,
        **kwargs: Any,
    ) -> list[str]:
        """Embed and store texts, and return their ids."""
        if isinstance(texts, str):
            raise QueryError(f"add_texts({texts[:60]!r}): give a list of texts, [{texts[:60]!r}]")
        given = list(texts)
        facts = [metadata or {} for metadata in metadatas or [{} for _ in given]]
        if len(facts) != len(given):
            raise QueryError(f"{len(facts)} metadatas and {len(given)} texts: give one for each")
        documents = [Document(text, metadata=metadata) for text, metadata in zip(given, facts, strict=True)]
        return self.add_documents(documents, ids=ids, **kwargs)

    def add_documents(
        self,
        documents: list[Document],
        *,
        ids: Sequence[str | None] | None = None,
        batch_size: int | None = None,
        **kwargs: Any,
    ) -> list[str]:
        """Embed and store documents, and return their ids; one whose id is there already replaces it.

        Args:
            documents: texts and images.
            ids: of each; None: its own, or a new one.
            batch_size: given by LangChain's indexing; model and store have batches of their own, so it changes nothing.
            kwargs: refused.

        Raises:
            QueryError: an argument that is not known, or an image and a model of texts alone.
            ImageLoadError: names the first image that cannot or must not be read.
        """
        _refuse("add_documents", kwargs)
        documents, ids = list(documents), None if ids is None else list(ids)
        if ids is not None and len(ids) != len(documents):
            raise QueryError(f"{len(ids)} ids and {len(documents)} documents: give one id for each")
        nodes: list[BaseNode] = []
        for place, document in enumerate(documents):
            named = None if ids is None else ids[place]
            own = (document.id or uuid.uuid4()) if named in (None, "") else named
            nodes.append(to_node(document.model_copy(update={"id": str(own)})).node)
        for node, vector in zip(nodes, self._vectors_of(nodes), strict=True):
            node.embedding = vector
        self.store.add(nodes)
        return [node.node_id for node in nodes]

    def _vectors_of(self, nodes: Sequence[BaseNode]) -> list[list[float]]:
        if isinstance(self._embeddings, VisualizedBGEEmbeddings):
            return self._embeddings.embed_model.embed_nodes(nodes)
        for node in nodes:
            if isinstance(node, ImageNode):
                raise QueryError(
                    f"the document {node.node_id!r} is an image, which {type(self._embeddings).__name__} cannot embed: "
                    "use VisualizedBGEEmbeddings"
                )
        return [_of_length_1(vector) for vector in self._embeddings.embed_documents([n.get_content() for n in nodes])]

    def delete(self, ids: list[str] | None = None, **kwargs: Any) -> bool:
        """Remove the documents with these ids, or all for None; ids that are not stored are passed over."""
        _refuse("delete", kwargs)
        if ids is None:
            self.store.clear()
        else:
            self.store.delete_nodes(_texts(ids))
        return True

    # ------------------------------------------------------------------------------------------ reading

    def get_by_ids(self, ids: Sequence[str], /) -> list[Document]:
        """Return the documents with these ids, in this order; an id that is not stored is left out."""
        return [to_document(NodeWithScore(node=node)) for node in self.store.get_nodes(_texts(ids))]

    def similarity_search(self, query: ComposedQuery, k: int = 4, **kwargs: Any) -> list[Document]:
        """Return the nearest documents, best first.

        Args:
            query: a text, `{"text": ..., "image": ...}`, a message, or content blocks.
            k: how many.
            kwargs: `filters` (see `Filters`).
        """
        return [document for document, _ in self.similarity_search_with_score(query, k, **kwargs)]

    def similarity_search_with_score(
        self, query: ComposedQuery, k: int = 4, **kwargs: Any
    ) -> list[tuple[Document, float]]:
        """As `similarity_search`, each with its score."""
        return self._nearest(self._query_vector(query), k, **kwargs)

    def similarity_search_by_vector(self, embedding: list[float], k: int = 4, **kwargs: Any) -> list[Document]:
        """As `similarity_search`, by a vector."""
        return [document for document, _ in self._nearest(embedding, k, **kwargs)]

    def max_marginal_relevance_search(
        self, query: ComposedQuery, k: int = 4, fetch_k: int = 20, lambda_mult: float = 0.5, **kwargs: Any
    ) -> list[Document]:
        """Return documents near the query and not all alike.

        Args:
            query: as of `similarity_search`.
            k: how many.
            fetch_k: how many of the nearest they are chosen from.
            lambda_mult: 1 for nearness alone, 0 for variety alone.
            kwargs: `filters`.
        """
        return self.max_marginal_relevance_search_by_vector(
            self._query_vector(query), k, fetch_k, lambda_mult, **kwargs
        )

    def max_marginal_relevance_search_by_vector(
        self, embedding: list[float], k: int = 4, fetch_k: int = 20, lambda_mult: float = 0.5, **kwargs: Any
    ) -> list[Document]:
        """As `max_marginal_relevance_search`, by a vector."""
        options = {"mmr_threshold": lambda_mult, "mmr_prefetch_k": max(fetch_k, k)}
        return [document for document, _ in self._nearest(embedding, k, mmr=options, **kwargs)]

    def _query_vector(self, query: ComposedQuery) -> list[float]:
        text, image = read_query(query)
        if isinstance(self._embeddings, VisualizedBGEEmbeddings):
            return self._embeddings.embed_model.get_query_bundle(text, image).embedding or []
        if image is not None:
            raise QueryError(f"{type(self._embeddings).__name__} cannot embed an image: use VisualizedBGEEmbeddings")
        return _of_length_1(self._embeddings.embed_query(text))

    def _nearest(
        self,
        vector: list[float],
        k: int,
        *,
        filters: Filters | None = None,
        filter: Filters | None = None,  # noqa: A002 - the name that most stores of LangChain have for it
        mmr: dict[str, Any] | None = None,
        **unknown: Any,
    ) -> list[tuple[Document, float]]:
        _refuse("a search", unknown)
        if filters is not None and filter is not None:
            raise QueryError("filters and filter as well: give one of them")
        query = VectorStoreQuery(
            query_embedding=vector,
            similarity_top_k=k,
            filters=read_filters(filter if filters is None else filters, self.store),
            mode=VectorStoreQueryMode.MMR if mmr else VectorStoreQueryMode.DEFAULT,
        )
        result = self.store.query(query, **(mmr or {}))
        return [
            (to_document(NodeWithScore(node=node)), score)
            for node, score in zip(result.nodes or (), result.similarities or (), strict=True)
        ]

    def _select_relevance_score_fn(self) -> Callable[[float], float]:
        """From 0 to 1, as LangChain wants it."""
        return lambda score: (1 + score) / 2


def _texts(ids: Sequence[Any]) -> Sequence[str]:
    """Ids as the store has them: callers count, or have UUIDs."""
    return ids if isinstance(ids, str) else [str(id_) for id_ in ids]


def _of_length_1(vector: Sequence[float]) -> list[float]:
    """A vector of other embeddings, which may be of any length: the long ones would be nearest to everything."""
    length = math.hypot(*vector)
    return [number / length for number in vector] if length else list(vector)


def _refuse(method: str, unknown: dict[str, Any]) -> None:
    if unknown:
        raise QueryError(f"{method} takes no {', '.join(map(repr, unknown))}")
