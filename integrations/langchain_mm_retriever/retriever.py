"""`ComposedImageRetriever`: a LangChain retriever over `ComposedRetriever`."""

from __future__ import annotations

from typing import Any, Literal

from langchain_core.callbacks import CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables import run_in_executor
from pydantic import ConfigDict

from langchain_mm_retriever.documents import ComposedQuery, Filters, read_filters, read_query, to_document
from langchain_mm_retriever.embeddings import VisualizedBGEEmbeddings
from mm_retriever.embedding import ComposedEmbedding
from mm_retriever.errors import QueryError
from mm_retriever.images import ImageSource
from mm_retriever.retriever import ComposedRetriever
from mm_retriever.store import ImageStore


class ComposedImageRetriever(BaseRetriever):
    """Retrieves by text, by image, or by both at once.

        retriever.invoke("a red mug")
        retriever.invoke("phone case with this", image="leopard.jpg", k=3)
        retriever.invoke({"text": "phone case with this", "image": "leopard.jpg"})  # the form for chains

    Documents come best first: `page_content` is the text that is stored with an image, or what the image is called, and
    the metadata have `image_path` (or `image_url`) and all that is stored. A message, or its content blocks, is a query
    too.

    Args:
        store: from `open_store`.
        embeddings: the model that the store was opened for.
        k: how many documents; also an argument of `invoke`.
        filters: only what matches these: LlamaIndex's filters, or a mapping such as `{"price": {"$lt": 20}}`; also an
            argument of `invoke`.
        min_score: only what scores at least this.
        mode: "hybrid" searches by the words too, in a store opened with `hybrid`.
        with_score: put `relevance_score` into the metadata. Documents of several queries are then not told to be the
            same, which is how `MultiQueryRetriever` and others leave out doubles.
        exclude_query_image: leave out the query image itself.
        group_by: a metadata column such as "item": only the best image of each item, as `ComposedRetriever` does it.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid")

    store: ImageStore
    embeddings: ComposedEmbedding | VisualizedBGEEmbeddings
    k: int = 9
    filters: Filters | None = None
    min_score: float | None = None
    mode: Literal["default", "hybrid"] = "default"
    with_score: bool = False
    exclude_query_image: bool = False
    group_by: str | None = None

    def _get_relevant_documents(
        self,
        query: ComposedQuery,
        *,
        run_manager: CallbackManagerForRetrieverRun,
        image: ImageSource | None = None,
        k: int | None = None,
        filters: Filters | None = None,
        **unknown: Any,
    ) -> list[Document]:
        if unknown:
            raise QueryError(f"invoke() takes no {', '.join(map(repr, unknown))}: give image, k or filters")
        text, image = read_query(query, image)
        adapter = self.embeddings
        model = adapter.embed_model if isinstance(adapter, VisualizedBGEEmbeddings) else adapter
        retriever = ComposedRetriever(
            self.store,
            model,
            top_k=self.k if k is None else k,
            filters=read_filters(self.filters if filters is None else filters, self.store),
            min_score=self.min_score,
            mode=self.mode,
            exclude_query_image=self.exclude_query_image,
            group_by=self.group_by,
        )
        return [
            to_document(node, with_score=self.with_score)
            for node in retriever.retrieve(model.get_query_bundle(text, image))
        ]

    async def _aget_relevant_documents(
        self, query: ComposedQuery, *, run_manager: Any, **kwargs: Any
    ) -> list[Document]:
        """In a thread: what is computed must not hold up the event loop."""
        return await run_in_executor(
            None, self._get_relevant_documents, query, run_manager=run_manager.get_sync(), **kwargs
        )
