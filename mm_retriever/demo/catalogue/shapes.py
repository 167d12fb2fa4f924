"""Outlines of the sixteen kinds of product.

A shape is a list of parts from back to front, in unit coordinates (x to the right, y down, 0 to 1). A part knows its
material and how plump it looks, nothing of colours or patterns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

Point = tuple[float, float]
Outline = Sequence[Point]
RGB = tuple[int, int, int]
Material = Literal["texture", "trim"] | RGB
"""``texture`` shows the pattern, ``trim`` a darker shade of its ground; anything else is a fixed colour."""

DARK: RGB = (54, 54, 60)
METAL: RGB = (190, 192, 198)
PALE: RGB = (237, 235, 231)
PAPER: RGB = (250, 248, 241)
WOOD: RGB = (178, 130, 82)
LEATHER: RGB = (122, 78, 50)


@dataclass(frozen=True)
class Part:
    """Filled outlines, holes cut out of them and strokes, all of one material.

    Attributes:
        bevel: how far the rounding of the edge reaches inwards, as a share of the image.
        relief: how strongly it catches the light; 0 is flat.
    """

    material: Material
    outlines: Sequence[Outline] = ()
    holes: Sequence[Outline] = ()
    strokes: Sequence[tuple[Outline, float]] = field(default=())
    bevel: float = 0.06
    relief: float = 1.0


class Chance:
    """The generator's uniform draw, and nothing more: what a shape may vary."""

    def __init__(self, rng: np.random.Generator) -> None:
        self._rng = rng

    def __call__(self, low: float, high: float) -> float:
        """A number from ``low`` to ``high``."""
        return float(self._rng.uniform(low, high))


def ellipse(x0: float, y0: float, x1: float, y1: float) -> Outline:
    """Outline of the ellipse in a box."""
    cx, cy, rx, ry = (x0 + x1) / 2, (y0 + y1) / 2, (x1 - x0) / 2, (y1 - y0) / 2
    return [(cx + rx * math.cos(t), cy + ry * math.sin(t)) for t in np.linspace(0, 2 * math.pi, 48, endpoint=False)]


def rounded(x0: float, y0: float, x1: float, y1: float, radius: float) -> Outline:
    """Outline of a box with round corners."""
    right, left, low, high = x1 - radius, x0 + radius, y1 - radius, y0 + radius
    corners = ((right, high, -90), (right, low, 0), (left, low, 90), (left, high, 180))
    return [
        (cx + radius * math.cos(math.radians(start + turn)), cy + radius * math.sin(math.radians(start + turn)))
        for cx, cy, start in corners
        for turn in range(0, 91, 15)
    ]


def curve(points: Outline, *, closed: bool = True, steps: int = 9) -> Outline:
    """Catmull-Rom spline through the points."""
    count = len(points)
    result: list[Point] = []
    for i in range(count if closed else count - 1):
        if closed:
            p0, p1, p2, p3 = (np.array(points[(i + j) % count]) for j in (-1, 0, 1, 2))
        else:
            p0, p1, p2, p3 = (np.array(points[min(max(i + j, 0), count - 1)]) for j in (-1, 0, 1, 2))
        for t in np.linspace(0, 1, steps, endpoint=False):
            x, y = 0.5 * (
                2 * p1 + (p2 - p0) * t + (2 * p0 - 5 * p1 + 4 * p2 - p3) * t**2 + (3 * (p1 - p2) + p3 - p0) * t**3
            )
            result.append((float(x), float(y)))
    if not closed:
        result.append(points[-1])
    return result


def _sagging(x0: float, x1: float, y: float, sag: float, steps: int = 12) -> list[Point]:
    """A line from x0 to x1 that hangs down in the middle: the front rim of something round."""
    return [(x0 + (x1 - x0) * i / steps, y + sag * math.sin(math.pi * i / steps)) for i in range(steps + 1)]


# ---------------------------------------------------------------------- products


def _phone_case(u: Chance) -> list[Part]:
    w, lens = u(0.215, 0.25), u(0.12, 0.17)
    x0 = 0.5 - w
    return [
        Part("trim", [rounded(0.5 + w - 0.006, 0.3, 0.5 + w + 0.014, 0.4, 0.008)], bevel=0.01),
        Part("texture", [rounded(x0, 0.06, 0.5 + w, 0.94, 0.075)], bevel=0.035),
        Part(DARK, [rounded(x0 + 0.035, 0.095, x0 + 0.155, 0.115 + lens, 0.04)], bevel=0.02),
        Part(
            (18, 20, 28),
            [ellipse(x0 + 0.065, y - 0.005, x0 + 0.125, y + 0.055) for y in (0.125, 0.195)],
            bevel=0.01,
        ),
    ]


def _mug(u: Chance) -> list[Part]:
    h = u(0.3, 0.36)
    top, bottom = 0.5 - h, 0.5 + h
    return [
        Part(
            "texture",
            [ellipse(0.6, 0.5 - h * 0.62, 0.92, 0.5 + h * 0.62)],
            [ellipse(0.675, 0.5 - h * 0.38, 0.845, 0.5 + h * 0.38)],
            bevel=0.03,
        ),
        Part("texture", [[(0.14, top), *_sagging(0.14, 0.72, bottom, 0.05), (0.72, top)]], bevel=0.16, relief=1.25),
        Part(PALE, [ellipse(0.14, top - 0.06, 0.72, top + 0.06)], bevel=0.01),
        Part((98, 68, 50), [ellipse(0.165, top - 0.042, 0.695, top + 0.045)], bevel=0.02),
    ]


def _t_shirt(u: Chance) -> list[Part]:
    hem = u(0.86, 0.92)
    collar = curve([(0.36, 0.13), (0.42, 0.2), (0.5, 0.222), (0.58, 0.2), (0.64, 0.13)], closed=False)
    body = [
        (0.74, 0.155), (0.95, 0.37), (0.81, 0.485), (0.735, 0.41), (0.745, hem),
        (0.255, hem), (0.265, 0.41), (0.19, 0.485), (0.05, 0.37), (0.26, 0.155),
    ]  # fmt: skip
    return [
        Part((96, 96, 102), [[(0.37, 0.13), (0.63, 0.13), (0.6, 0.2), (0.4, 0.2)]], bevel=0.02),
        Part("texture", [[*collar, *body]], bevel=0.07),
        Part("trim", strokes=[(collar, 0.022)], bevel=0.01),
    ]


def _tote_bag(u: Chance) -> list[Part]:
    h = u(0.30, 0.36)
    handle = curve([(0.34, 0.42), (0.36, 0.2), (0.5, 0.42 - h), (0.64, 0.2), (0.66, 0.42)], closed=False)
    return [
        Part(LEATHER, strokes=[(handle, 0.035)], bevel=0.02),
        Part("texture", [[(0.18, 0.36), (0.82, 0.36), (0.86, 0.93), (0.14, 0.93)]], bevel=0.06),
        Part("trim", strokes=[([(0.18, 0.392), (0.82, 0.392)], 0.012)], bevel=0.005),
    ]


def _cushion(u: Chance) -> list[Part]:
    dent = u(0.02, 0.045)
    a, b, m = 0.1, 0.9, 0.5
    edge = [
        (a, a + 0.01), (a + 0.05, a + 0.005), (0.3, a + dent), (m, a + dent), (0.7, a + dent), (b - 0.05, a + 0.005),
        (b, a + 0.01), (b - 0.005, a + 0.05), (b - dent, 0.3), (b - dent, m), (b - dent, 0.7), (b - 0.005, b - 0.05),
        (b, b - 0.01), (b - 0.05, b - 0.005), (0.7, b - dent), (m, b - dent), (0.3, b - dent), (a + 0.05, b - 0.005),
        (a, b - 0.01), (a + 0.005, b - 0.05), (a + dent, 0.7), (a + dent, m), (a + dent, 0.3), (a + 0.005, a + 0.05),
    ]  # fmt: skip
    seam = curve(edge)
    return [
        Part("texture", [seam], bevel=0.22, relief=1.1),
        Part("trim", strokes=[([*seam, seam[0]], 0.013)], bevel=0.006),
    ]


def _sneaker(u: Chance) -> list[Part]:
    collar = u(0.25, 0.29)
    upper = [
        (0.07, collar + 0.03), (0.2, collar), (0.35, collar + 0.03), (0.46, 0.4), (0.62, 0.5), (0.84, 0.55),
        (0.95, 0.66), (0.93, 0.75), (0.5, 0.76), (0.09, 0.76), (0.06, 0.6), (0.09, 0.45),
    ]  # fmt: skip
    sole = [
        (0.04, 0.71), (0.3, 0.73), (0.6, 0.73), (0.96, 0.71), (0.96, 0.8), (0.86, 0.84), (0.4, 0.83), (0.1, 0.84),
        (0.03, 0.8),
    ]  # fmt: skip
    laces = [(0.38 + i * 0.068, 0.375 + i * 0.046) for i in range(4)]
    return [
        Part("texture", [curve(upper)], bevel=0.1, relief=1.15),
        Part(PALE, [curve(sole)], bevel=0.03),
        Part(PALE, [curve([(0.84, 0.56), (0.93, 0.62), (0.955, 0.715), (0.84, 0.72), (0.815, 0.64)])], bevel=0.04),
        Part(
            (250, 250, 250),
            strokes=[([(x - 0.05, y + 0.07), (x + 0.035, y - 0.01)], 0.02) for x, y in laces],
            bevel=0.01,
        ),
        Part(DARK, [ellipse(0.09, collar - 0.005, 0.35, collar + 0.06)], bevel=0.01),
    ]


def _watch(u: Chance) -> list[Part]:
    marks, hands = [], []
    for i in range(12):
        angle, inner = i * math.pi / 6, 0.115 if i % 3 == 0 else 0.13
        marks.append(
            (
                [(0.5 + r * math.sin(angle), 0.5 - r * math.cos(angle)) for r in (inner, 0.148)],
                0.014 if i % 3 == 0 else 0.008,
            )
        )
    for reach, width in ((0.085, 0.022), (0.125, 0.014)):
        angle = u(0, 2 * math.pi)
        hands.append(([(0.5, 0.5), (0.5 + reach * math.sin(angle), 0.5 - reach * math.cos(angle))], width))
    return [
        Part("texture", [[(0.345, 0.02), (0.655, 0.02), (0.675, 0.42), (0.325, 0.42)]], bevel=0.05),
        Part("texture", [[(0.325, 0.58), (0.675, 0.58), (0.655, 0.98), (0.345, 0.98)]], bevel=0.05),
        Part(METAL, [rounded(0.7, 0.465, 0.755, 0.535, 0.015)], bevel=0.02),
        Part(METAL, [ellipse(0.28, 0.28, 0.72, 0.72)], bevel=0.04),
        Part((250, 250, 248), [ellipse(0.325, 0.325, 0.675, 0.675)], bevel=0.005, relief=0.5),
        Part(DARK, strokes=[*marks, *hands], bevel=0.001, relief=0),
    ]


def _umbrella(u: Chance) -> list[Part]:
    rise = u(0.42, 0.48)
    dome = [(0.04 + 0.92 * (1 - math.cos(t)) / 2, 0.56 - rise * math.sin(t)) for t in np.linspace(0, math.pi, 30)]
    scallops = [
        (0.96 - 0.184 * (i + t / math.pi), 0.56 - 0.055 * math.sin(t))
        for i in range(5)
        for t in np.linspace(0, math.pi, 9)[:-1]
    ]
    ribs = [
        curve([(0.5, 0.57 - rise), (0.5 + (x - 0.5) * 0.72, 0.29), (x, 0.555)], closed=False)
        for x in (0.224, 0.408, 0.592, 0.776)
    ]
    hook = curve([(0.5, 0.8), (0.505, 0.89), (0.56, 0.92), (0.615, 0.89), (0.62, 0.84)], closed=False)
    return [
        Part(METAL, strokes=[([(0.5, 0.1), (0.5, 0.82)], 0.022)], bevel=0.01),
        Part(WOOD, strokes=[(hook, 0.034)], bevel=0.02),
        Part(DARK, strokes=[([(0.5, 0.52 - rise), (0.5, 0.6 - rise)], 0.018)], bevel=0.01),
        Part("texture", [[*dome, *scallops]], bevel=0.16, relief=1.15),
        Part("trim", strokes=[(rib, 0.007) for rib in ribs], bevel=0.001, relief=0),
    ]


def _notebook(u: Chance) -> list[Part]:
    x1, holes = u(0.8, 0.86), [0.14 + i * 0.088 for i in range(9)]
    return [
        Part(PAPER, [rounded(0.21, 0.1, x1 + 0.03, 0.93, 0.02)], bevel=0.01),
        Part("texture", [rounded(0.17, 0.07, x1, 0.91, 0.03)], bevel=0.025),
        Part(
            "trim", [[(0.17, 0.1), (0.185, 0.07), (0.25, 0.07), (0.25, 0.91), (0.185, 0.91), (0.17, 0.88)]], bevel=0.02
        ),
        Part((32, 32, 34), [ellipse(0.2, y - 0.012, 0.227, y + 0.014) for y in holes], bevel=0.003, relief=0),
        Part(METAL, strokes=[([(0.12, y), (0.215, y)], 0.016) for y in holes], bevel=0.01),
    ]


def _cap(u: Chance) -> list[Part]:
    crown = u(0.17, 0.21)
    dome = [
        (0.07, 0.68), (0.09, 0.46), (0.22, 0.27), (0.41, crown), (0.61, 0.25), (0.74, 0.41), (0.77, 0.61),
        (0.5, 0.69), (0.28, 0.72),
    ]  # fmt: skip
    peak = [(0.5, 0.59), (0.72, 0.56), (0.91, 0.61), (0.985, 0.71), (0.92, 0.73), (0.7, 0.68), (0.48, 0.7)]
    seams = ([(0.42, crown), (0.28, 0.4), (0.26, 0.71)], [(0.42, crown), (0.56, 0.38), (0.6, 0.665)])
    return [
        Part("texture", [curve(dome)], bevel=0.16, relief=1.15),
        Part("trim", [curve(peak)], bevel=0.03),
        Part("trim", [ellipse(0.39, crown - 0.02, 0.45, crown + 0.02)], bevel=0.02),
        Part("trim", strokes=[(curve(seam, closed=False), 0.007) for seam in seams], bevel=0.001, relief=0),
    ]


def _dress(u: Chance) -> list[Part]:
    w = u(0.31, 0.38)
    neck = curve([(0.37, 0.17), (0.5, 0.215), (0.63, 0.17)], closed=False)
    hem = curve(
        [(0.5 + w, 0.92), (0.5 + w / 2, 0.955), (0.5, 0.935), (0.5 - w / 2, 0.955), (0.5 - w, 0.92)], closed=False
    )
    return [
        Part("texture", strokes=[([(x, 0.22), (x + (0.5 - x) * 0.1, 0.04)], 0.026) for x in (0.4, 0.6)], bevel=0.01),
        Part("texture", [[*neck, (0.66, 0.27), (0.62, 0.43), *hem, (0.38, 0.43), (0.34, 0.27)]], bevel=0.07),
        Part("trim", [[(0.375, 0.415), (0.625, 0.415), (0.635, 0.46), (0.365, 0.46)]], bevel=0.02),
    ]


def _sock(u: Chance) -> list[Part]:
    toe = u(0.86, 0.92)
    leg = [
        (0.27, 0.06), (0.61, 0.06), (0.61, 0.3), (0.61, 0.52), (0.71, 0.63), (toe, 0.74), (toe + 0.01, 0.88),
        (0.7, 0.93), (0.5, 0.87), (0.32, 0.73), (0.26, 0.52), (0.27, 0.28),
    ]  # fmt: skip
    return [
        Part("texture", [curve(leg)], bevel=0.12, relief=1.15),
        Part("trim", [rounded(0.25, 0.05, 0.63, 0.15, 0.02)], bevel=0.03),
        Part(
            "trim",
            [curve([(toe - 0.09, 0.675), (toe, 0.74), (toe + 0.02, 0.86), (toe - 0.06, 0.92), (toe - 0.11, 0.84)])],
            bevel=0.05,
        ),
    ]


def _backpack(u: Chance) -> list[Part]:
    pocket = u(0.56, 0.6)
    loop = curve([(0.42, 0.14), (0.44, 0.05), (0.56, 0.05), (0.58, 0.14)], closed=False)
    zips = [
        ([(0.28, pocket + 0.05), (0.72, pocket + 0.05)], 0.014),
        (curve([(0.22, 0.44), (0.5, 0.4), (0.78, 0.44)], closed=False), 0.014),
    ]
    return [
        Part(DARK, strokes=[(loop, 0.03)], bevel=0.02),
        Part("texture", [rounded(0.1, 0.5, 0.24, 0.82, 0.05), rounded(0.76, 0.5, 0.9, 0.82, 0.05)], bevel=0.04),
        Part("texture", [rounded(0.17, 0.1, 0.83, 0.94, 0.17)], bevel=0.12, relief=1.15),
        Part("texture", [rounded(0.25, pocket, 0.75, 0.88, 0.06)], bevel=0.05),
        Part(DARK, strokes=zips, bevel=0.004),
        Part(METAL, [rounded(0.48, pocket + 0.05, 0.52, pocket + 0.13, 0.01)], bevel=0.01),
    ]


def _lamp(u: Chance) -> list[Part]:
    w = u(0.15, 0.2)
    shade = [(0.5 - w, 0.06), (0.5 + w, 0.06), *reversed(_sagging(0.1, 0.9, 0.59, 0.035))]
    return [
        Part(WOOD, strokes=[([(0.5, 0.57), (0.5, 0.87)], 0.05)], bevel=0.03),
        Part(WOOD, [ellipse(0.31, 0.85, 0.69, 0.95)], bevel=0.04),
        Part(WOOD, [ellipse(0.42, 0.64, 0.58, 0.82)], bevel=0.06, relief=1.2),
        Part("texture", [shade], bevel=0.14, relief=1.15),
    ]


def _bottle(u: Chance) -> list[Part]:
    w = u(0.2, 0.235)
    left = [(0.5 - w, 0.5), (0.505 - w, 0.33), (0.41, 0.235)]
    right = [(0.59, 0.235), (0.495 + w, 0.33), (0.5 + w, 0.5)]
    body = [
        (0.43, 0.16), (0.57, 0.16), *right, (0.5 + w, 0.86), (0.46 + w, 0.95), (0.54 - w, 0.95), (0.5 - w, 0.86), *left,
    ]  # fmt: skip
    return [
        Part("texture", [curve(body)], bevel=0.14, relief=1.3),
        Part(DARK, [rounded(0.42, 0.04, 0.58, 0.17, 0.02)], bevel=0.04),
        Part(METAL, [rounded(0.41, 0.15, 0.59, 0.19, 0.01)], bevel=0.02),
    ]


def _tie(u: Chance) -> list[Part]:
    w = u(0.185, 0.225)
    return [
        Part("texture", [[(0.42, 0.16), (0.58, 0.16), (0.5 + w, 0.8), (0.5, 0.98), (0.5 - w, 0.8)]], bevel=0.05),
        Part("texture", [[(0.37, 0.02), (0.63, 0.02), (0.59, 0.19), (0.41, 0.19)]], bevel=0.06, relief=1.3),
    ]


PRODUCTS: dict[str, Callable[[Chance], list[Part]]] = {
    "phone case": _phone_case,
    "mug": _mug,
    "t-shirt": _t_shirt,
    "tote bag": _tote_bag,
    "cushion": _cushion,
    "sneaker": _sneaker,
    "watch": _watch,
    "umbrella": _umbrella,
    "notebook": _notebook,
    "cap": _cap,
    "dress": _dress,
    "sock": _sock,
    "backpack": _backpack,
    "lamp": _lamp,
    "water bottle": _bottle,
    "tie": _tie,
}
HANDED = frozenset({"mug", "sneaker", "cap", "sock"})
"""Kinds with a left and a right: drawn either way round."""
