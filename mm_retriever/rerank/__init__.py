"""Rerankers for LlamaIndex; `load_reranker` returns one by name.

`Phi3VisionRerank` runs on this machine, `VisionLLMRerank` asks any LLM that takes images, `RemoteRerank` a reranking
model on a server, `CrossEncoderRerank` scores pairs by a model of sentence-transformers, and `ScorerRerank` ranks by
your own `Scorer`. All are node postprocessors and return new nodes. Facts about the ranking are in their metadata,
hidden from embeddings and prompts:

    retrieval_score     the score of the retrieval
    retrieval_rank      the rank in the retrieval, from 1
    rerank_rank         the new rank, from 1
    rerank_model_score  the model's own score: log-likelihood, log-probability, log-odds or log of fused ranks
    rerank_reason       why the node fits, in the model's words
    rerank_caption      the model's caption of the query image
    rerank_wanted       the model's understanding of the query
    rerank_note         why the node is last, or was not judged
    rerank_repairs      what had to be repaired in the model's answer
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mm_retriever.rerank.cross_encoder import CrossEncoderRerank, TextRerank
    from mm_retriever.rerank.phi3_vision.reranker import Phi3VisionRerank
    from mm_retriever.rerank.registry import load_reranker
    from mm_retriever.rerank.remote import CHAT_TEMPLATE, RemoteRerank
    from mm_retriever.rerank.reranker import Reranking, ScorerRerank
    from mm_retriever.rerank.scorer import METADATA_KEYS, Candidate, Meter, Query, Scorer, Usage
    from mm_retriever.rerank.vision_llm import VisionLLMRerank

_NAMES = {  # by module: a remote reranker must not load torch
    "cross_encoder": "CrossEncoderRerank TextRerank",
    "phi3_vision.reranker": "Phi3VisionRerank",
    "registry": "load_reranker",
    "remote": "CHAT_TEMPLATE RemoteRerank",
    "reranker": "Reranking ScorerRerank",
    "scorer": "Candidate METADATA_KEYS Meter Query Scorer Usage",
    "vision_llm": "VisionLLMRerank",
}
_HOME = {name: module for module, names in _NAMES.items() for name in names.split()}

__all__ = [
    "CHAT_TEMPLATE",
    "METADATA_KEYS",
    "Candidate",
    "CrossEncoderRerank",
    "Meter",
    "Phi3VisionRerank",
    "Query",
    "RemoteRerank",
    "Reranking",
    "Scorer",
    "ScorerRerank",
    "TextRerank",
    "Usage",
    "VisionLLMRerank",
    "load_reranker",
]


def __getattr__(name: str) -> Any:
    """The public object called `name`, imported on first use."""
    if name not in _HOME:
        raise AttributeError(f"module 'mm_retriever.rerank' has no attribute {name!r}")
    value = getattr(import_module(f"mm_retriever.rerank.{_HOME[name]}"), name)
    globals()[name] = value
    return value
