"""Image search in LangChain: embeddings, vector store, retriever, document compressor and tools over mm_retriever.

Adapters only: each hands over to the class of mm_retriever that does the work, and gives its answer in LangChain's
types. The store is mm_retriever's own; langchain-milvus needs another pymilvus.
"""

from mm_retriever.errors import MissingExtraError

try:
    import langchain_core  # noqa: F401 - says now, and by name, what is missing
except ImportError as error:
    raise MissingExtraError.of(error, "langchain-core", "langchain") from error

from langchain_mm_retriever.compressor import RerankCompressor
from langchain_mm_retriever.embeddings import VisualizedBGEEmbeddings
from langchain_mm_retriever.retriever import ComposedImageRetriever
from langchain_mm_retriever.tools import image_search_tools
from langchain_mm_retriever.vectorstore import ImageVectorStore

__all__ = [
    "ComposedImageRetriever",
    "ImageVectorStore",
    "RerankCompressor",
    "VisualizedBGEEmbeddings",
    "image_search_tools",
]
