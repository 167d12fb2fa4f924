"""Any embedding model of sentence-transformers: Qwen3-VL-Embedding, SigLIP2, CLIP, and similar models.

Vectors are those of ``SentenceTransformer.encode_query`` and ``encode_document``, with length 1. For a model that
embeds images and texts only separately, an image with a text is their weighted sum. The library gets images as pixels
and texts under the key "text", so that a text that looks like a URL or a path is embedded as text.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mm_retriever.checkpoint import ModelEntry, ModelFiles, Models, read_json
from mm_retriever.embedders.sentence_files import (
    MODULES,
    library_kind,
    load_model,
    model_folder,
    model_tensors,
    why_not,
)
from mm_retriever.errors import CheckpointError, MMRetrieverError, QueryError, shown

if TYPE_CHECKING:
    import torch

    from mm_retriever.embedders.sentence_encoder import SentenceTransformersEncoder

_EXTRA = "sentence-transformers"
_QWEN_LANGUAGES = "more than 30 languages"
_SUM = "an image with a text is the weighted sum of both"


def _qwen(repo: str, dimension: int, parameters: int, mmeb: float) -> ModelEntry:
    return ModelEntry(
        repo=repo,
        licence="Apache-2.0",
        note="instructions for queries and documents; any shorter dimension",
        dimension=dimension,
        parameters=parameters,
        languages=_QWEN_LANGUAGES,
        figures=(f"MMEB-V2 image {mmeb} (model card)",),
        needs=_EXTRA,
    )


def _pair(repo: str, dimension: int, parameters: int, languages: str, licence: str) -> ModelEntry:
    return ModelEntry(
        repo=repo,
        licence=licence,
        note=_SUM,
        dimension=dimension,
        parameters=parameters,
        languages=languages,
        composed="sum",
        needs=_EXTRA,
    )


MODELS: Models = {
    entry.repo: entry
    for entry in (
        _qwen("Qwen/Qwen3-VL-Embedding-2B", 2048, 2_100_000_000, 75.0),
        _qwen("Qwen/Qwen3-VL-Embedding-8B", 4096, 8_100_000_000, 80.1),
        _pair("google/siglip2-base-patch16-224", 768, 375_000_000, "109 languages", "Apache-2.0"),
        _pair("google/siglip2-so400m-patch14-384", 1152, 1_136_000_000, "109 languages", "Apache-2.0"),
        _pair("openai/clip-vit-large-patch14", 768, 428_000_000, "English", "MIT"),
    )
}

_TWO_TOWERS = frozenset(("clip", "siglip", "siglip2"))
"""Types of models that are embedders without a list of modules: text and image features in one space."""


def recognises(files: ModelFiles) -> bool:
    """Whether the files are an embedder of sentence-transformers, or a model that it can use as one."""
    folder = model_folder(files)
    if kind := library_kind(folder):
        return kind == "SentenceTransformer"
    return _type(files) in {*_TWO_TOWERS, "qwen3_vl"}


def load(
    files: ModelFiles,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    dimension: int | None = None,
    query_instruction: str | None = None,
    document_instruction: str | None = None,
    text_weight: float = 0.5,
    trust_remote_code: bool = False,
) -> SentenceTransformersEncoder:
    """Return the model of these files as an `Embedder`.

    Args:
        files: from `locate`.
        device: default: CUDA, else MPS, else the CPU.
        dtype: of the computation; default float32.
        dimension: of the vectors; a shorter one than the model's keeps the first numbers, for models that were trained
            for it (Matryoshka); default: the model's.
        query_instruction: the instruction for queries; default: the model's own.
        document_instruction: the instruction for stored contents; default: the model's own.
        text_weight: weight of the text, from 0 to 1, if an image with a text is the sum of both.
        trust_remote_code: run the Python files of the model's repository.

    Raises:
        CheckpointError: the files are damaged, unsafe, of another model, or need code that is not trusted.
        MissingExtraError: sentence-transformers is not installed.
        QueryError: an option that is out of range.
    """
    from mm_retriever.checkpoint import fingerprint
    from mm_retriever.devices import as_device, as_dtype

    if not isinstance(text_weight, int | float) or not 0 <= text_weight <= 1:
        raise QueryError(f"text_weight={shown(text_weight)}: a number from 0 (the image alone) to 1 (the text alone)")
    folder = model_folder(files)
    if not (folder / MODULES).is_file() and not _two_towers(files):
        raise CheckpointError(
            f"{files.name!r} has no {MODULES}, which says how its vectors are made of what the model computes: take a "
            "revision of the repository that has one, or all of its files"
        )
    weights = fingerprint(model_tensors(files))
    prompts: Mapping[str, str | None] = {"query": query_instruction, "document": document_instruction}
    model = load_model(
        "SentenceTransformer",
        files,
        device=as_device(device),
        dtype=as_dtype(dtype),
        trust_remote_code=trust_remote_code is True,
        prompts={name: prompt for name, prompt in prompts.items() if prompt is not None},
    )
    from mm_retriever.embedders.sentence_encoder import SentenceTransformersEncoder

    options: dict[str, Any] = {"weights": weights, "dimension": dimension, "text_weight": float(text_weight)}
    try:
        return SentenceTransformersEncoder(model, name=os.fspath(files.name), **options)
    except MMRetrieverError:
        raise
    except Exception as error:  # of a processor that does not fit the model
        raise CheckpointError(why_not(files.name, error)) from error


def _two_towers(files: ModelFiles) -> bool:
    return _type(files) in _TWO_TOWERS


def _type(files: ModelFiles) -> str:
    return "" if files.config is None else str(read_json(files.config).get("model_type"))
