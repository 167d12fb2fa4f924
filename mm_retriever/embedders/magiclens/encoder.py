"""`MagicLensEncoder`: a MagicLens as an `Embedder`. An image alone is an image with the empty text.

Source: ``data_utils.py`` and ``inference.py`` of github.com/google-deepmind/magiclens at 5135f58b (Apache-2.0). Where
the original crashes on a text of more than 77 tokens, the end token stays and the rest is cut off: the log says so
once.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor, nn

from mm_retriever.checkpoint import ModelFiles, read_json, read_state_dict
from mm_retriever.embedders.clip import (
    TOKENIZER_REPO,
    ClipEncoder,
    check_sizes,
    clip_config,
    clip_tokenizer,
    config_content,
    convert_clip,
    filled,
)
from mm_retriever.embedders.embedder import Content
from mm_retriever.embedders.folder import find_tokenizer, original_fingerprint
from mm_retriever.embedders.magiclens.flax_file import from_flax, read_flax_file
from mm_retriever.embedders.magiclens.model import MagicLens, MagicLensConfig, config_of_shapes
from mm_retriever.errors import CheckpointError, QueryError, reason_of
from mm_retriever.images.square import CLIP_MEAN, CLIP_STD

FAMILY = "magiclens"
_SIZES = ("num_layers", "num_heads", "ff_hidden_size")


class MagicLensEncoder(ClipEncoder):
    """Images, and images with a text.

    Args:
        model: ready for inference.
        tokenizer: from `clip_tokenizer`.
        name: for people.
        fingerprint: of the weights, before any rounding.
    """

    def __init__(self, model: MagicLens, tokenizer: Tokenizer, *, name: str, fingerprint: str) -> None:
        self.model = model
        heads = model.contrastive_multimodal_pooler.pool_attn.heads
        super().__init__(
            model.clip, tokenizer, name=name, family=FAMILY, fingerprint=fingerprint, facts=[{"num_heads": heads}]
        )

    def prepare(self, image: Image.Image) -> NDArray[np.float32]:
        """(H, W, 3) in 0..1: the whole image squashed to the square that the model sees, by its own maximum.

        Floats, because the model was made for values that lie between those of 8 bits.
        """
        # Pillow's bilinear filter widens where it shrinks, as jax.image.resize(antialias=True) does
        channels = image.convert("RGB").split()
        most = max(cast(tuple[int, int], channel.getextrema())[1] for channel in channels)
        size = (self.side, self.side)
        squares = [np.asarray(channel.convert("F").resize(size, Image.Resampling.BILINEAR)) for channel in channels]
        return np.stack(squares, axis=-1).astype(np.float32, copy=False) / np.float32(most or 1)

    def pixel_values(self, images: Sequence[NDArray[np.float32]]) -> Tensor:
        """(B, 3, H, W) float32 of what `prepare` made of images."""
        values = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
        mean, std = (torch.tensor(channel).view(3, 1, 1) for channel in (CLIP_MEAN, CLIP_STD))
        return (values - mean) / std

    def texts_and_images(
        self, contents: Sequence[Content]
    ) -> tuple[list[str | None], list[NDArray[np.float32] | None]]:
        """An image alone is an image with the empty text.

        Raises:
            QueryError: a content without an image.
        """
        if any(content.image is None for content in contents):
            raise QueryError(
                f"{self.name} embeds images, and images with a text, but no text alone: give an image with it, or "
                "index with a model that embeds texts too, such as BAAI/BGE-VL-base"
            )
        return [content.text for content in contents], [content.image for content in contents]

    def compose(self, text_features: Tensor, image_features: Tensor) -> Tensor:
        """(B, D), by the layers above CLIP."""
        return self.model.compose(image_features, text_features)

    def config(self) -> dict[str, Any]:
        """What `config.json` of a folder of ours says."""
        return _folder_config(self.model.config)

    @property
    def network(self) -> nn.Module:
        """CLIP and the layers above it."""
        return self.model

    def _text_mask(self, input_ids: Tensor) -> Tensor:
        return input_ids > 0  # parity: 0 is padding to the original, though it is "!" to the tokenizer


def load_files(
    files: ModelFiles,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
) -> MagicLensEncoder:
    """The model of these files, ready for inference."""
    content, config, state = _read(files)
    model = filled(lambda: MagicLens(config), state, files, device=device, dtype=dtype)
    path = find_tokenizer(files, tokenizer, TOKENIZER_REPO)
    original = original_fingerprint(state, content)
    return MagicLensEncoder(model, clip_tokenizer(path, config.clip), name=files.name, fingerprint=original)


def convert_files(
    files: ModelFiles,
    out: str | os.PathLike[str],
    *,
    tokenizer: str | os.PathLike[str] | None = None,
    dtype: torch.dtype | str | None = None,
) -> Path:
    """Writes the files of a model as a folder and returns it; the floats keep their format without ``dtype``."""
    content, config, state = _read(files)
    original = original_fingerprint(state, content)
    return convert_clip(
        lambda: MagicLens(config),
        state,
        files,
        out,
        _folder_config(config),
        original=original,
        tokenizer=tokenizer,
        dtype=dtype,
    )


def _folder_config(config: MagicLensConfig) -> dict[str, Any]:
    sizes = {name: getattr(config, name) for name in _SIZES}
    return {**config_content(config.clip), "model_type": FAMILY, **sizes}


def _read(files: ModelFiles) -> tuple[dict[str, Any], MagicLensConfig, dict[str, Tensor]]:
    source = files.config or files.weights
    try:
        if files.weights.suffix == ".pkl":
            arrays = read_flax_file(files.weights)
            content = config_of_shapes({path: tuple(array.shape) for path, array in arrays.items()})
            state = from_flax(arrays)
        elif files.config is None:
            raise CheckpointError(f"{files.weights} has no config.json beside it, which a converted MagicLens has")
        else:
            content, state = read_json(files.config), read_state_dict(files.weights)
        sizes = {name: content[name] for name in _SIZES}
        check_sizes(sizes)
    except KeyError as error:
        raise CheckpointError(f"{source} does not describe a MagicLens: it has no {error}") from error
    except (TypeError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{source} does not describe a MagicLens: {reason_of(error)}") from error
    config = MagicLensConfig(clip=clip_config(content, source), **sizes)
    if config.dimension % config.num_heads:
        raise CheckpointError(f"{source}: {config.num_heads} heads do not divide the vector's {config.dimension}")
    return content, config, state
