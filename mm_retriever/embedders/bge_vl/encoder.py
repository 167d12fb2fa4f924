"""`BGEVLEncoder`: a BGE-VL as an `Embedder`. A pair is the sum of text and image features, which are not normalised.

Source: ``modeling_MMRet_CLIP.py`` of github.com/VectorSpaceLab/MegaPairs at ad99aca2 (MIT). The model is transformers'
``CLIPModel`` key for key, so none of that code runs. Rewritten; checked against its outputs stage by stage. Where the
original crashes on a text of more than 77 tokens, the end token stays and the rest is cut off: the log says so once.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

from mm_retriever.checkpoint import ModelFiles, read_json, read_state_dict
from mm_retriever.embedders.bge_vl import FAMILY_KEY
from mm_retriever.embedders.clip import (
    TOKENIZER_REPO,
    ClipEncoder,
    clip_config,
    clip_tokenizer,
    config_content,
    convert_clip,
    filled,
)
from mm_retriever.embedders.embedder import Content
from mm_retriever.embedders.folder import find_tokenizer, original_fingerprint
from mm_retriever.errors import CheckpointError
from mm_retriever.images.square import CLIP_MEAN, CLIP_STD, middle_square

FAMILY = "bge-vl"
DEAD_KEYS = re.compile(r"(text|vision)_model\.embeddings\.position_ids")  # in files of older transformers

# parity: transformers' CLIPImageProcessor scales in float64 and normalises in float32
_SCALED = (np.arange(256) * (1 / 255)).astype(np.float32)
_NORMALISED = (_SCALED[:, None] - np.asarray(CLIP_MEAN, np.float32)) / np.asarray(CLIP_STD, np.float32)  # (256, 3)


class BGEVLEncoder(ClipEncoder):
    """Texts, images and pairs; an image with the text "" is the image alone."""

    def prepare(self, image: Image.Image) -> NDArray[np.uint8]:
        """(H, W, 3): the square that the model sees."""
        return np.asarray(middle_square(image.convert("RGB"), self.side, lambda excess: excess // 2))

    def pixel_values(self, images: Sequence[NDArray[np.uint8]]) -> Tensor:
        """(B, 3, H, W) float32 of prepared images."""
        pixels = np.stack(images)  # (B, H, W, 3)
        return torch.from_numpy(np.stack([_NORMALISED[pixels[..., channel], channel] for channel in range(3)], axis=1))

    def texts_and_images(self, contents: Sequence[Content]) -> tuple[list[str | None], list[NDArray[np.uint8] | None]]:
        """A text beside an image counts unless it is empty."""
        texts = [content.text if content.text or content.image is None else None for content in contents]
        return texts, [content.image for content in contents]

    def compose(self, text_features: Tensor, image_features: Tensor) -> Tensor:
        """(B, D): the sum."""
        return text_features + image_features

    def config(self) -> dict[str, Any]:
        """The content of `config.json` in a folder of this package."""
        return _folder_config(self.clip.config)


def _folder_config(config: CLIPConfig) -> dict[str, Any]:
    marks = {"architectures": ["CLIPModel"], "model_type": "clip", FAMILY_KEY: FAMILY}
    return {**config_content(config), **marks}


def load_files(
    files: ModelFiles,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
) -> BGEVLEncoder:
    """The model of these files, ready for inference."""
    content, config, state = _read(files)
    model = filled(lambda: CLIPModel(config), state, files, device=device, dtype=dtype)
    path = find_tokenizer(files, tokenizer, TOKENIZER_REPO)
    return BGEVLEncoder(
        model,
        clip_tokenizer(path, config),
        name=files.name,
        family=FAMILY,
        fingerprint=original_fingerprint(state, content),
    )


def convert_files(
    files: ModelFiles,
    out: str | os.PathLike[str],
    *,
    tokenizer: str | os.PathLike[str] | None = None,
    dtype: torch.dtype | str | None = None,
) -> Path:
    """Write the files of a model as a folder and return it; without ``dtype`` the floats keep their format."""
    content, config, state = _read(files)
    written = {**_folder_config(config), "rounded": content.get("rounded")}
    original = original_fingerprint(state, content)
    return convert_clip(
        lambda: CLIPModel(config), state, files, out, written, original=original, tokenizer=tokenizer, dtype=dtype
    )


def _read(files: ModelFiles) -> tuple[dict[str, Any], CLIPConfig, dict[str, Tensor]]:
    if files.config is None:
        raise CheckpointError(f"{files.weights} has no config.json beside it, which a BGE-VL needs")
    content = read_json(files.config)
    state = {key: tensor for key, tensor in read_state_dict(files.weights).items() if not DEAD_KEYS.fullmatch(key)}
    return content, clip_config(content, files.config), state
