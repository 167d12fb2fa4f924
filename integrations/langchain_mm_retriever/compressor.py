"""`RerankCompressor`: a LangChain document compressor over any reranker of mm_retriever or LlamaIndex."""

from __future__ import annotations

from collections.abc import Sequence

from langchain_core.callbacks import Callbacks
from langchain_core.documents import BaseDocumentCompressor, Document
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.schema import QueryBundle
from pydantic import ConfigDict

from langchain_mm_retriever.documents import ComposedQuery, read_query, to_document, to_node
from mm_retriever.images import DEFAULT_POLICY, portable_image
from mm_retriever.rerank.reranker import Reranker


class RerankCompressor(BaseDocumentCompressor):
    """Reranks documents by what their images show; the best come first, as many as the reranker keeps.

    The query is a text or `{"text": ..., "image": ...}`, as the retriever takes it, so that both can stand in one
    `ContextualCompressionRetriever`. Score, reason and notes of the reranker are in the metadata of new documents.

    Args:
        reranker: `Phi3VisionRerank`, `VisionLLMRerank`, or another node postprocessor of LlamaIndex.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True)

    reranker: BaseNodePostprocessor

    def compress_documents(
        self, documents: Sequence[Document], query: ComposedQuery, callbacks: Callbacks | None = None
    ) -> list[Document]:
        """Return the best documents, best first.

        Raises:
            QueryError: neither a text nor an image to rank by.
            RerankError: no ranking could be obtained.
        """
        text, image = read_query(query)
        policy = self.reranker.image_policy if isinstance(self.reranker, Reranker) else DEFAULT_POLICY
        bundle = QueryBundle(text, image_path=None if image is None else portable_image(image, policy=policy))
        given = [to_node(document) for document in documents]
        words = {node.node.node_id: document.page_content for node, document in zip(given, documents, strict=True)}
        ranked = []
        for node in self.reranker.postprocess_nodes(given, query_bundle=bundle):
            document = to_document(node, with_score=True)
            if not node.node.get_content():  # an image is called as it was
                document.page_content = words.get(node.node.node_id, document.page_content)
            ranked.append(document)
        return ranked
