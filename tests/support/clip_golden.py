"""Weights that are a function of their own name, for the goldens of BGE-VL and MagicLens.

The outputs come from the authors' code on the same weights: ``modeling_MMRet_CLIP.py`` of VectorSpaceLab/MegaPairs at
ad99aca2 (torch 2.13.0, transformers 4.45.2), and google-deepmind/magiclens at 5135f58b with scenic's CLIP (jax 0.10.2,
flax 0.12.8), both in float32 on a CPU.
"""

from __future__ import annotations

import json
import math
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

DATA = Path(__file__).parents[1] / "data"
IMAGES = DATA / "visualized_bge"


def golden(family: str, name: str) -> dict[str, NDArray[Any]]:
    with np.load(DATA / family / f"{name}.npz") as outputs:
        return dict(outputs)


def distance(ours: Any, theirs: Any) -> float:
    return float(np.abs(np.asarray(ours, dtype=np.float64) - np.asarray(theirs, dtype=np.float64)).max())


def clip_weight(name: str, shape: tuple[int, ...]) -> Tensor:
    """A tensor of BGE-VL by its name in the state dict."""
    if name == "logit_scale":
        return torch.zeros(shape)
    z = _seeded(name, shape)
    if name.endswith(("class_embedding", "position_embedding.weight", "token_embedding.weight")):
        z = z * np.float32(0.02)
    elif len(shape) >= 2:
        z = z / np.float32(math.sqrt(math.prod(shape[1:])))
    else:
        z = np.float32(1) + np.float32(0.1) * z if name.endswith("weight") else z * np.float32(0.02)
    return torch.from_numpy(np.asarray(z, dtype=np.float32))


def flax_weight(path: str, shape: tuple[int, ...]) -> Tensor:
    """An array of MagicLens by its path in the checkpoint."""
    leaf = path.rpartition("/")[2]
    if leaf == "logit_scale":
        return torch.zeros(shape)
    z = _seeded(path, shape)
    if leaf in ("class_embedding", "positional_embedding", "embedding"):
        z = z * np.float32(0.02)
    elif len(shape) >= 2:
        z = z / np.float32(math.sqrt(_fan_in(path, leaf, shape)))
    elif leaf in ("scale", "per_dim_scale"):
        one = np.float32(leaf == "per_dim_scale" or "clip" in path)  # MagicLens' own LayerNorm adds the 1 itself
        z = one + np.float32(0.1) * z
    else:
        z = z * np.float32(0.02)
    return torch.from_numpy(np.asarray(z, dtype=np.float32))


def flax_arrays(name: str) -> dict[str, Tensor]:
    shapes = json.loads((DATA / "magiclens" / f"{name}_param_shapes.json").read_text())
    return {path: flax_weight(path, tuple(shape)) for path, shape in shapes.items()}


def _fan_in(path: str, leaf: str, shape: tuple[int, ...]) -> int:
    if "/attn/out/" in path:
        return math.prod(shape[:2])
    if "/attn/" in path:
        return shape[0]
    if leaf == "w" and len(shape) == 3:
        return math.prod(shape[1:]) if "/post/" in path else shape[0]
    return math.prod(shape[:-1])


def _seeded(name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
    seeded = np.random.RandomState(zlib.crc32(name.encode()) & 0xFFFFFFFF)
    return np.asarray(seeded.standard_normal(shape)).astype(np.float32)
