"""Colours: which pattern comes in which, and the palettes that paint them. Knows nothing of shapes."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float32]
RGB = tuple[int, int, int]

NATURAL = "natural"
PAINTS: dict[str, RGB] = {
    "red": (204, 38, 44),
    "orange": (240, 128, 30),
    "yellow": (246, 208, 52),
    "green": (44, 148, 80),
    "blue": (44, 92, 192),
    "purple": (122, 62, 160),
    "pink": (244, 150, 186),
    "black": (42, 42, 46),
    "white": (240, 240, 238),
}
COLOURS: tuple[str, ...] = (NATURAL, *PAINTS)
"""Every colour; ``natural`` is the colour of things that have their own: tigers, marble, bricks."""

_PAINTED = ("plain", "polka dots", "stripes", "plaid", "checkerboard", "chevron", "waves", "flowers", "stars", "hearts")
_FUR = ("leopard", "zebra")
_MATERIAL = ("tiger", "giraffe", "camouflage", "marble", "watermelon", "bricks")
PATTERNS: tuple[str, ...] = (*_PAINTED, *_FUR, *_MATERIAL)

_WHITE: RGB = (249, 247, 242)
_INK: RGB = (46, 44, 50)
_SILVER: RGB = (150, 154, 164)
_HALF_AND_HALF = frozenset({"stripes", "plaid", "checkerboard", "chevron", "waves"})

_NATURAL_PALETTES: dict[str, tuple[RGB, RGB, RGB]] = {  # ground, figure, accent
    "leopard": ((224, 178, 110), (50, 32, 22), (178, 116, 58)),
    "zebra": ((245, 243, 237), (28, 26, 26), (28, 26, 26)),
    "tiger": ((232, 130, 38), (30, 22, 18), (250, 230, 198)),
    "giraffe": ((242, 220, 172), (160, 94, 42), (130, 72, 32)),
    "camouflage": ((124, 130, 78), (62, 78, 46), (154, 130, 88)),
    "marble": ((238, 236, 234), (104, 106, 120), (202, 166, 104)),
    "watermelon": ((230, 60, 74), (36, 24, 26), (52, 134, 66)),
    "bricks": ((174, 74, 54), (216, 208, 198), (134, 50, 40)),
}


def colours_of(pattern: str) -> tuple[str, ...]:
    """Colours that a pattern comes in.

    A zebra comes in neither white nor black: both would look like the natural one.
    """
    if pattern in _PAINTED:
        return tuple(PAINTS)
    if pattern == "leopard":
        return COLOURS
    if pattern == "zebra":
        return tuple(colour for colour in COLOURS if colour not in ("white", "black"))
    if pattern in _MATERIAL:
        return (NATURAL,)
    raise ValueError(f"no pattern {pattern!r}; known: {', '.join(PATTERNS)}")


def palette(pattern: str, colour: str) -> FloatArray:
    """Mean colours of ground, figure and accent as (3, 3) RGB, 0 to 255."""
    if colour not in colours_of(pattern):
        raise ValueError(f"no {colour!r} {pattern!r}; it comes in: {', '.join(colours_of(pattern))}")
    if colour == NATURAL:
        return np.array(_NATURAL_PALETTES[pattern], np.float32)
    ground = PAINTS[colour]
    deep = (int(ground[0] * 0.45), int(ground[1] * 0.45), int(ground[2] * 0.45))
    figure, accent = _WHITE, deep
    if pattern in _FUR:
        figure, accent = (28, 24, 26), (int(ground[0] * 0.7), int(ground[1] * 0.7), int(ground[2] * 0.7))
        if colour == "black":
            figure, accent = (176, 176, 182), (92, 92, 98)
    elif colour == "white":
        # Where figure and ground take equal shares, ink on white would look like white on black.
        figure, accent = (_SILVER, (206, 208, 214)) if pattern in _HALF_AND_HALF else (_INK, _SILVER)
    elif colour == "black":
        accent = (120, 120, 128)
    if pattern == "flowers":
        accent = (250, 206, 60) if colour not in ("yellow", "orange") else (150, 60, 30)
    return np.array((ground, figure, accent), np.float32)
