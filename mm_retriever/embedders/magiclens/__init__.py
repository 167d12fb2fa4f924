"""MagicLens: an image and an open-ended instruction into one vector (arXiv:2403.19651)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mm_retriever.checkpoint import ModelEntry, ModelFiles, Models, read_json
from mm_retriever.errors import ModelNotFoundError

if TYPE_CHECKING:
    from mm_retriever.embedders.magiclens.encoder import MagicLensEncoder

__all__ = ["MODELS", "convert", "load", "recognises"]

BUCKET = "gs://gresearch/magiclens/models"
_PROTOCOL = "zero-shot, standard protocols; CIRCO with these very weights (README of google-deepmind/magiclens)"

MODELS: Models = {
    "magiclens-base": ModelEntry(
        file="magic_lens_clip_base.pkl",
        tokenizer_repo="openai/clip-vit-base-patch16",
        licence="Apache-2.0 (code), CC-BY 4.0",
        note="open-ended instructions about an image; no text alone; no hub has its file: loading says where it is",
        dimension=512,
        parameters=166_433_025,
        languages="English",
        figures=(f"CIRCO mAP@5 22.3, CIRR R@1 27.0: {_PROTOCOL}",),
    ),
    "magiclens-large": ModelEntry(
        file="magic_lens_clip_large.pkl",
        tokenizer_repo="openai/clip-vit-large-patch14",
        licence="Apache-2.0 (code), CC-BY 4.0",
        note="open-ended instructions about an image; no text alone; no hub has its file: loading says where it is",
        dimension=768,
        parameters=465_417_665,
        languages="English",
        figures=(f"CIRCO mAP@5 29.5, CIRR R@1 30.1: {_PROTOCOL}",),
    ),
}
"""Published in a storage bucket, which no model hub mirrors: a user fetches the file, and gives its path."""


def recognises(files: ModelFiles) -> bool:
    """Whether the files are of this family: by our config, or one official .pkl file, which has none."""
    if files.weights.suffix == ".pkl":
        return True
    return files.config is not None and read_json(files.config).get("model_type") == "magiclens"


def load(files: ModelFiles, **options: Any) -> MagicLensEncoder:
    """The model of these files; see `Family`.

    Raises:
        ModelNotFoundError: the file of a published name is to be fetched first; says how.
    """
    from mm_retriever.embedders.magiclens.encoder import load_files

    return load_files(_with_weights(files), **options)


def convert(files: ModelFiles, out: str | os.PathLike[str], **options: Any) -> Path:
    """See `Family`."""
    from mm_retriever.embedders.magiclens.encoder import convert_files

    return convert_files(_with_weights(files), out, **options)


def _with_weights(files: ModelFiles) -> ModelFiles:
    if files.weights == Path():
        file = MODELS[files.name].file
        raise ModelNotFoundError(
            f"{files.name!r} is on no model hub: fetch its file (gsutil cp {BUCKET}/{file} .), then give the path of "
            f"{file} as the model, or convert it once (mm-retriever convert {file} FOLDER) and give the folder"
        )
    return files
