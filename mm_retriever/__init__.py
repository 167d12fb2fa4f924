"""Search images by text, by image, or by both at once.

The public names are loaded when they are first used (PEP 562): ``import mm_retriever`` loads no torch,
transformers, pymilvus or llama_index, which together take about twenty seconds.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if "torch" not in sys.modules and not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
    # Torch's threads wait for each other hundreds of times in a pass, by default on a busy core for milliseconds, which
    # reading threads and other programs could use. So they sleep after microseconds.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

__version__ = "0.1.0"

if TYPE_CHECKING:
    from mm_retriever.bulk import ImportReport, ShardReport, embed_to_shards, embed_to_shards_on_ray, import_shards
    from mm_retriever.embedders.bge_m3 import BGEM3SparseEmbedding
    from mm_retriever.embedders.registry import load_embedder
    from mm_retriever.embedders.remote import RemoteEmbedding
    from mm_retriever.embedding import ComposedEmbedding, VisualizedBGEEmbedding
    from mm_retriever.engine import image_query_engine
    from mm_retriever.errors import MMRetrieverError
    from mm_retriever.images import ImagePolicy, load_image
    from mm_retriever.images.sheet import before_after, contact_sheet
    from mm_retriever.ingest import IngestReport, ReindexReport, ingest_images, prune_images, reindex, remove_images
    from mm_retriever.notebook import show
    from mm_retriever.phi3_vision.llm import Phi3VisionLLM
    from mm_retriever.rerank import (
        CrossEncoderRerank,
        Phi3VisionRerank,
        RemoteRerank,
        TextRerank,
        VisionLLMRerank,
        load_reranker,
    )
    from mm_retriever.retriever import ComposedRetriever
    from mm_retriever.search_tools import Conversation, ImageSearch
    from mm_retriever.store import ImageStore, open_store
    from mm_retriever.tools import ImageSearchToolSpec

_NAMES = {  # by module
    "bulk": "ImportReport ShardReport embed_to_shards embed_to_shards_on_ray import_shards",
    "embedders.bge_m3": "BGEM3SparseEmbedding",
    "embedders.registry": "load_embedder",
    "embedders.remote": "RemoteEmbedding",
    "embedding": "ComposedEmbedding VisualizedBGEEmbedding",
    "engine": "image_query_engine",
    "errors": "MMRetrieverError",
    "images": "ImagePolicy load_image",
    "images.sheet": "before_after contact_sheet",
    "ingest": "IngestReport ReindexReport ingest_images prune_images reindex remove_images",
    "notebook": "show",
    "phi3_vision.llm": "Phi3VisionLLM",
    "rerank": "CrossEncoderRerank Phi3VisionRerank RemoteRerank TextRerank VisionLLMRerank load_reranker",
    "retriever": "ComposedRetriever",
    "search_tools": "Conversation ImageSearch",
    "store": "ImageStore open_store",
    "tools": "ImageSearchToolSpec",
}
_HOME = {name: module for module, names in _NAMES.items() for name in names.split()}

__all__ = [
    "BGEM3SparseEmbedding",
    "ComposedEmbedding",
    "ComposedRetriever",
    "Conversation",
    "CrossEncoderRerank",
    "ImagePolicy",
    "ImageSearch",
    "ImageSearchToolSpec",
    "ImageStore",
    "ImportReport",
    "IngestReport",
    "MMRetrieverError",
    "Phi3VisionLLM",
    "Phi3VisionRerank",
    "ReindexReport",
    "RemoteEmbedding",
    "RemoteRerank",
    "ShardReport",
    "TextRerank",
    "VisionLLMRerank",
    "VisualizedBGEEmbedding",
    "before_after",
    "contact_sheet",
    "embed_to_shards",
    "embed_to_shards_on_ray",
    "image_query_engine",
    "import_shards",
    "ingest_images",
    "load_embedder",
    "load_image",
    "load_reranker",
    "open_store",
    "prune_images",
    "reindex",
    "remove_images",
    "show",
]


def __getattr__(name: str) -> Any:
    """The public object called `name`, imported on first use."""
    if name not in _HOME:
        raise AttributeError(f"module 'mm_retriever' has no attribute {name!r}")
    value = getattr(import_module(f"mm_retriever.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
