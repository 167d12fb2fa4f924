"""Ranking by Phi-3 Vision on this machine, as a family of `mm_retriever.rerank.registry`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mm_retriever.rerank.published import PHI3_VISION

if TYPE_CHECKING:
    from mm_retriever.rerank.reranker import Reranker

MODELS = PHI3_VISION
TINY_FUSION = 0.3
"""Weight of the retrieval score beside the small reranker's, chosen on seen compositions (its model card)."""


def recognises(name: str, config: Mapping[str, Any], base_url: str | None) -> bool:
    """Whether a model is Phi-3 Vision."""
    return base_url is None and (name in MODELS or config.get("model_type") == "phi3_v")


def load(name: str, **options: Any) -> Reranker:
    """Return the reranker; options are those of `Phi3VisionRerank`. The small model is fused with the retrieval."""
    from mm_retriever.rerank.phi3_vision.reranker import Phi3VisionRerank

    return Phi3VisionRerank(name, **({"fusion_weight": TINY_FUSION} if name == "tiny" else {}) | options)
