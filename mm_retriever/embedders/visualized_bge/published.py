"""The published and bundled Visualized BGE models, by name."""

from __future__ import annotations

from pathlib import Path

from mm_retriever.checkpoint import ModelEntry, Models

DEFAULT_MODEL = "BAAI/bge-visualized-base-en-v1.5"
MULTILINGUAL = "BAAI/bge-visualized-m3"

MODELS: Models = {
    "tiny": ModelEntry(
        folder=Path(__file__).parent / "tiny", licence="MIT", note="comes with the package; drawn products only"
    ),
    DEFAULT_MODEL: ModelEntry(
        repo="BAAI/bge-visualized",
        file="Visualized_base_en_v1.5.pth",
        tokenizer_repo="BAAI/bge-base-en-v1.5",
        size=392_860_018,
        sha256="07e58cf70ee6962530490ef1ac5b632e7e0153ba8c7ed49d55e0f41ec97bf6a6",
        licence="MIT",
        note="English",
    ),
    MULTILINGUAL: ModelEntry(
        repo="BAAI/bge-visualized",
        file="Visualized_m3.pth",
        tokenizer_repo="BAAI/bge-m3",
        licence="MIT",
        note="a hundred languages",
    ),
}
