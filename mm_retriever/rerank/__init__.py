"""Rerankers for LlamaIndex: `Phi3VisionRerank` on this machine, `VisionLLMRerank` through any LLM that takes pictures.

`TextRerank` is for candidates that are all texts. All are node postprocessors and return new nodes. Facts about the
ranking are in their metadata, hidden from embeddings and prompts:

    retrieval_score     the score the node came with
    retrieval_rank      its place before, from 1
    rerank_rank         its place now, from 1
    rerank_model_score  what the model alone gave it: log-likelihood, log-probability, log-odds or log of fused ranks
    rerank_reason       why it fits, in the model's words
    rerank_caption      what the model sees in the query picture
    rerank_wanted       what it takes the query to want
    rerank_note         why the node is last, or was not judged
    rerank_repairs      what had to be mended in the model's answer
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mm_retriever.rerank.candidates import METADATA_KEYS
    from mm_retriever.rerank.cross_encoder import TextRerank
    from mm_retriever.rerank.phi3_vision.reranker import Phi3VisionRerank
    from mm_retriever.rerank.reranker import Reranking, Usage
    from mm_retriever.rerank.vision_llm import VisionLLMRerank

_HOME = {  # a remote reranker must not load torch
    "METADATA_KEYS": "candidates",
    "Phi3VisionRerank": "phi3_vision.reranker",
    "Reranking": "reranker",
    "TextRerank": "cross_encoder",
    "Usage": "reranker",
    "VisionLLMRerank": "vision_llm",
}

__all__ = ["METADATA_KEYS", "Phi3VisionRerank", "Reranking", "TextRerank", "Usage", "VisionLLMRerank"]


def __getattr__(name: str) -> Any:
    """The public object called `name`, imported on first use."""
    if name not in _HOME:
        raise AttributeError(f"module 'mm_retriever.rerank' has no attribute {name!r}")
    value = getattr(import_module(f"mm_retriever.rerank.{_HOME[name]}"), name)
    globals()[name] = value
    return value
