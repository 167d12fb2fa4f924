"""BGE-VL: CLIP trained on synthetic triplets for composed image retrieval (MegaPairs, arXiv:2412.14475)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mm_retriever.checkpoint import ModelEntry, ModelFiles, Models, read_json

if TYPE_CHECKING:
    from mm_retriever.embedders.bge_vl.encoder import BGEVLEncoder

__all__ = ["MODELS", "convert", "load", "recognises"]

_PROTOCOL = "zero-shot, the query image left out of the ranking (MegaPairs, arXiv:2412.14475)"

MODELS: Models = {
    "BAAI/BGE-VL-base": ModelEntry(
        repo="BAAI/BGE-VL-base",
        tokenizer_repo="openai/clip-vit-base-patch16",
        licence="MIT",
        note="finds what a text asks to change in an image; 299 MB, at most 77 tokens of text",
        dimension=512,
        parameters=149_620_737,
        languages="English",
        figures=(f"CIRCO mAP@5 34.3, CIRR R@1 36.1, FashionIQ R@10 31.9: {_PROTOCOL}",),
    ),
    "BAAI/BGE-VL-large": ModelEntry(
        repo="BAAI/BGE-VL-large",
        tokenizer_repo="openai/clip-vit-large-patch14",
        licence="MIT",
        note="finds what a text asks to change in an image; 855 MB, at most 77 tokens of text",
        dimension=768,
        parameters=427_616_513,
        languages="English",
        figures=(f"CIRCO mAP@5 39.2, CIRR R@1 38.0, FashionIQ R@10 34.6: {_PROTOCOL}",),
    ),
}
"""As published: ``model.safetensors`` in half precision, ``config.json``, ``tokenizer.json``."""

FAMILY_KEY = "composed_as"
_MARKS = ("mmret", "bge-vl", "bge_vl")


def recognises(files: ModelFiles) -> bool:
    """Whether a CLIP is a BGE-VL: by its config, which names the authors' code or our conversion, or by its name.

    The tensors cannot tell, because they are those of any CLIP.
    """
    if files.config is None:
        return False
    config = read_json(files.config)
    if config.get("model_type") != "clip":
        return False
    folders = [Path(files.name).expanduser().resolve().name, files.weights.resolve().parent.name]
    names = [config.get("_name_or_path"), config.get("auto_map"), *folders]
    return config.get(FAMILY_KEY) == "bge-vl" or any(mark in str(names).lower() for mark in _MARKS)


def load(files: ModelFiles, **options: Any) -> BGEVLEncoder:
    """The model of these files; see `Family`."""
    from mm_retriever.embedders.bge_vl.encoder import load_files

    return load_files(files, **options)


def convert(files: ModelFiles, out: str | os.PathLike[str], **options: Any) -> Path:
    """See `Family`."""
    from mm_retriever.embedders.bge_vl.encoder import convert_files

    return convert_files(files, out, **options)
