"""`VisualizedBGEEmbeddings`: texts and images to vectors, for anything in LangChain that takes embeddings."""

from __future__ import annotations

import os
from collections.abc import Sequence

from langchain_core.embeddings import Embeddings
from langchain_core.runnables import run_in_executor

from mm_retriever.embedding import DEFAULT_MODEL, ComposedEmbedding
from mm_retriever.errors import QueryError
from mm_retriever.images import ImageSource


class VisualizedBGEEmbeddings(Embeddings):
    """Visualized BGE as LangChain's embeddings: texts, images and pairs of both in one space, vectors of length 1.

    Args:
        model: a published name, "tiny", a folder, or a loaded `ComposedEmbedding`, which has all the options.
        device: "cpu", "cuda", ...; default: the fastest there is, or where the loaded model is.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | ComposedEmbedding = DEFAULT_MODEL,
        *,
        device: str | None = None,
    ) -> None:
        self.embed_model: ComposedEmbedding = (
            model if isinstance(model, ComposedEmbedding) else ComposedEmbedding(model, device=device)
        )

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """One vector for each text."""
        return self.embed_model.get_text_embedding_batch(list(texts))

    def embed_query(self, text: str) -> list[float]:
        """The vector of a query."""
        return self.embed_model.get_query_embedding(text)

    def embed_image(self, uris: Sequence[ImageSource]) -> list[list[float]]:
        """One vector for each image: paths, bytes, PIL images, ...; name and form as LangChain's stores call it.

        Raises:
            ImageLoadError: names the first image that cannot or must not be read.
        """
        if isinstance(uris, str | bytes | os.PathLike):
            raise QueryError(f"embed_image({str(uris)[:60]!r}): give a list of images, [{str(uris)[:60]!r}]")
        return self.embed_model.get_image_embedding_batch(list(uris))

    def embed_composed(self, texts: Sequence[str], images: Sequence[ImageSource]) -> list[list[float]]:
        """One vector for each pair of a text and an image ("the same in red" and a shoe)."""
        return self.embed_model.get_composed_embedding_batch(texts, images)

    async def aembed_image(self, uris: Sequence[ImageSource]) -> list[list[float]]:
        """As `embed_image`; the event loop stays free."""
        return await run_in_executor(None, self.embed_image, uris)

    async def aembed_composed(self, texts: Sequence[str], images: Sequence[ImageSource]) -> list[list[float]]:
        """As `embed_composed`; the event loop stays free."""
        return await run_in_executor(None, self.embed_composed, texts, images)
