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
        figures=("Recall@1 .976 retrieved, .983 reranked, 1,746 drawn compositions never trained on (own benchmark)",),
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

_EXTRA = "sentence-transformers"
_TEXTS = "texts only: ranks images by their captions"
_BOTH = "texts and images, queries of both"
_OWN_CODE = "runs code of its repository, which trust_remote_code=True allows"

CROSS_ENCODER: Models = {
    entry.repo: entry
    for entry in (
        ModelEntry(
            repo="BAAI/bge-reranker-v2-m3",
            licence="Apache-2.0",
            note=_TEXTS,
            parameters=567_755_777,
            languages="100 languages",
            composed="no",
            needs=_EXTRA,
        ),
        ModelEntry(
            repo="Qwen/Qwen3-VL-Reranker-2B",
            licence="Apache-2.0",
            note=_BOTH,
            parameters=2_100_000_000,
            languages="more than 30 languages",
            figures=("MMEB-V2 image retrieval 73.8, of the 100 best of its embedder with 74.8 (model card)",),
            needs=_EXTRA,
        ),
        ModelEntry(
            repo="Qwen/Qwen3-VL-Reranker-8B",
            licence="Apache-2.0",
            note=_BOTH,
            parameters=8_800_000_000,
            languages="more than 30 languages",
            figures=("MMEB-V2 image retrieval 80.7, of the 100 best of the 2B embedder with 74.8 (model card)",),
            needs=_EXTRA,
        ),
        ModelEntry(
            repo="jinaai/jina-reranker-m0",
            licence="CC-BY-NC-4.0",
            note=f"{_BOTH}; not for commercial use; {_OWN_CODE}",
            parameters=2_400_000_000,
            languages="29 languages",
            needs=_EXTRA,
        ),
        ModelEntry(
            repo="nvidia/llama-nemotron-rerank-vl-1b-v2",
            licence="NVIDIA's own: see its card",
            note=f"{_BOTH}; {_OWN_CODE}",
            parameters=1_700_000_000,
            languages="see its card",
            needs=_EXTRA,
        ),
    )
}

NAMES: tuple[str, ...] = (*PHI3_VISION, *CROSS_ENCODER)
"""What the shell completes; a test holds it against the registry."""
