"""The published and bundled rerankers, by family; read without loading any of them."""

from __future__ import annotations

from pathlib import Path

from mm_retriever.checkpoint import ModelEntry, Models

_UPR = "ranks by how likely the wanted image's description is under each candidate"

PHI3_VISION: Models = {
    "tiny": ModelEntry(
        folder=Path(__file__).parent.parent / "phi3_vision" / "tiny",
        licence="MIT",
        note="comes with the package; drawn products only",
        parameters=1_840_256,
        languages="English",
        figures=("Recall@1 .976 retrieved, .983 reranked, 1,746 drawn compositions never trained on (README)",),
    ),
    "microsoft/Phi-3.5-vision-instruct": ModelEntry(
        repo="microsoft/Phi-3.5-vision-instruct",
        licence="MIT",
        note=f"photographs; {_UPR}",
        parameters=4_146_621_440,
        languages="English",
    ),
    "microsoft/Phi-3-vision-128k-instruct": ModelEntry(
        repo="microsoft/Phi-3-vision-128k-instruct",
        licence="MIT",
        note="its predecessor",
        parameters=4_146_621_440,
        languages="English",
    ),
}

CROSS_ENCODER: Models = {
    "BAAI/bge-reranker-v2-m3": ModelEntry(
        repo="BAAI/bge-reranker-v2-m3",
        licence="Apache-2.0",
        note="texts only: it sees no image",
        parameters=567_755_777,
        languages="100 languages",
        composed="no",
        needs="hybrid",
    ),
}

NAMES: tuple[str, ...] = (*PHI3_VISION, *CROSS_ENCODER)
"""What the shell completes; a test holds it against the registry."""
