"""The stem that a small tower may have instead of one patch convolution: it learns more from little data.

Not in the originals; an option of both towers' configurations for models that are trained from scratch. The bundled
ones do without.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import nn


def check_stem(stem: str, stem_channels: Sequence[int], patch_size: int) -> None:
    """Raises ValueError for a stem that there is not, or whose convolutions do not lead to the patch size."""
    if stem not in ("patch", "conv"):
        raise ValueError(f"stem {stem!r} is not one of 'patch', 'conv'")
    if stem == "conv" and 2 ** len(stem_channels) != patch_size:
        raise ValueError(f"stem_channels {stem_channels} do not halve down to patch_size {patch_size}")


def halvings(channels: Sequence[int]) -> nn.Sequential:
    """(B, 3, H, W) -> (B, channels[-1], h, w): stride-2 convolutions, one an entry of ``channels``."""
    return nn.Sequential(
        *(
            nn.Sequential(
                nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(after), nn.GELU()
            )
            for before, after in pairwise((3, *channels))
        )
    )
