"""Visualized BGE: a text, an image, or both into one vector (VISTA, arXiv:2406.04292)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mm_retriever.checkpoint import TORCH_SUFFIXES, ModelEntry, ModelFiles, Models, read_json

if TYPE_CHECKING:
    from mm_retriever.embedders.visualized_bge.encoder import VisualizedBGEEncoder

DEFAULT_MODEL = "BAAI/bge-visualized-base-en-v1.5"
MULTILINGUAL = "BAAI/bge-visualized-m3"

MODELS: Models = {
    "tiny": ModelEntry(
        folder=Path(__file__).parent / "tiny",
        licence="MIT",
        note="comes with the package; drawn products only",
        dimension=128,
        parameters=1_558_736,
        languages="228 English words of a drawn catalogue",
    ),
    DEFAULT_MODEL: ModelEntry(
        repo="BAAI/bge-visualized",
        file="Visualized_base_en_v1.5.pth",
        tokenizer_repo="BAAI/bge-base-en-v1.5",
        size=392_860_018,
        sha256="07e58cf70ee6962530490ef1ac5b632e7e0153ba8c7ed49d55e0f41ec97bf6a6",
        licence="MIT",
        note="the default",
        dimension=768,
        parameters=195_350_016,
        languages="English",
        figures=(
            "CIRR R@5 22.5: zero-shot, all images of the corpus as candidates, the query image among them "
            "(VISTA, arXiv:2406.04292)",
        ),
    ),
    MULTILINGUAL: ModelEntry(
        repo="BAAI/bge-visualized",
        file="Visualized_m3.pth",
        tokenizer_repo="BAAI/bge-m3",
        licence="MIT",
        note="the multilingual one",
        dimension=1024,
        parameters=871_070_656,
        languages="more than 100 languages",
    ),
}


def recognises(files: ModelFiles) -> bool:
    """Whether the files are of this family: by their config, or one official .pth file, which has none."""
    if files.config is None:
        return files.weights.suffix in TORCH_SUFFIXES
    return read_json(files.config).get("model_type") == "visualized_bge"


def load(files: ModelFiles, **options: Any) -> VisualizedBGEEncoder:
    """The model of these files; see `Family`."""
    from mm_retriever.embedders.visualized_bge.encoder import VisualizedBGEEncoder, load_files

    model, processor = load_files(files, **options)
    return VisualizedBGEEncoder(model, processor, name=files.name)


def convert(files: ModelFiles, out: str | os.PathLike[str], **options: Any) -> Path:
    """See `Family`."""
    from mm_retriever.embedders.visualized_bge.encoder import convert_files

    return convert_files(files, out, **options)
