"""Outlines of what a theme image shows: the animal that wears a pattern, a ball, a piece of cloth."""

from __future__ import annotations

from mm_retriever.demo.catalogue.shapes import PALE, RGB, Chance, Part, Point, curve, ellipse


def _eyes(x: float, y: float, iris: RGB) -> list[Part]:
    """Two eyes, mirrored about the middle."""
    sides = (0.5 - x, 0.5 + x)
    return [
        Part(iris, [ellipse(s - 0.048, y - 0.042, s + 0.048, y + 0.042) for s in sides], bevel=0.02),
        Part((14, 14, 14), [ellipse(s - 0.022, y - 0.036, s + 0.022, y + 0.036) for s in sides], bevel=0.004),
    ]


def _cat(u: Chance) -> list[Part]:
    """Head of a leopard or tiger."""
    w = u(0.31, 0.36)
    face = [
        (0.5, 0.13), (0.5 + w, 0.25), (0.55 + w, 0.5), (0.5 + 0.72 * w, 0.78), (0.5, 0.9), (0.5 - 0.72 * w, 0.78),
        (0.45 - w, 0.5), (0.5 - w, 0.25),
    ]  # fmt: skip
    ears = [(0.5 + side * (w - 0.07), 0.22) for side in (-1, 1)]
    return [
        Part("texture", [ellipse(x - 0.13, y - 0.13, x + 0.13, y + 0.13) for x, y in ears], bevel=0.05),
        Part((92, 66, 52), [ellipse(x - 0.075, y - 0.075, x + 0.075, y + 0.075) for x, y in ears], bevel=0.03),
        Part("texture", [curve(face)], bevel=0.2, relief=1.1),
        Part(PALE, [ellipse(0.34, 0.64, 0.52, 0.85), ellipse(0.48, 0.64, 0.66, 0.85)], bevel=0.08),
        *_eyes(0.17, 0.45, (226, 188, 70)),
        Part((78, 46, 44), [curve([(0.43, 0.62), (0.5, 0.605), (0.57, 0.62), (0.5, 0.71)])], bevel=0.03),
        Part((66, 44, 42), strokes=[([(0.5, 0.69), (0.5, 0.77)], 0.012)], bevel=0.001, relief=0),
    ]


def _long_face(u: Chance, *, ears_out: bool) -> list[Part]:
    """Long head on a neck: a zebra's with upright ears and a dark muzzle, a giraffe's with flat ears and horns."""
    w = u(0.2, 0.235)
    neck = [(0.3, 1.02), (0.34, 0.62), (0.4, 0.4), (0.6, 0.4), (0.66, 0.62), (0.7, 1.02)]
    face = [
        (0.5, 0.16), (0.5 + 0.8 * w, 0.22), (0.5 + w, 0.38), (0.5 + 0.72 * w, 0.62), (0.5 + 0.66 * w, 0.84),
        (0.5, 0.92), (0.5 - 0.66 * w, 0.84), (0.5 - 0.72 * w, 0.62), (0.5 - w, 0.38), (0.5 - 0.8 * w, 0.22),
    ]  # fmt: skip
    muzzle = [
        (0.5, 0.72),
        (0.5 + 0.66 * w, 0.76),
        (0.5 + 0.62 * w, 0.87),
        (0.5, 0.94),
        (0.5 - 0.62 * w, 0.87),
        (0.5 - 0.66 * w, 0.76),
    ]
    ears, crown = [], []
    for side in (-1, 1):
        if ears_out:
            tip, base = (0.5 + side * (w + 0.24), 0.26), (0.5 + side * (w - 0.04), 0.29)
            ears.append(curve([base, (0.5 + side * (w + 0.1), 0.2), tip, (0.5 + side * (w + 0.1), 0.33)]))
            crown.append(([(0.5 + side * 0.08, 0.2), (0.5 + side * 0.11, 0.05)], 0.04))
        else:
            ears.append(
                curve(
                    [
                        (0.5 + side * 0.09, 0.2),
                        (0.5 + side * 0.1, 0.06),
                        (0.5 + side * 0.22, 0.01),
                        (0.5 + side * 0.21, 0.2),
                    ]
                )
            )
            crown.append(([(0.5 + side * 0.02, 0.24), (0.5 + side * 0.02, 0.05)], 0.06))
    return [
        Part("texture", [curve(neck)], bevel=0.1),
        Part("texture", ears, bevel=0.03),
        Part((112, 72, 40) if ears_out else (38, 34, 34), strokes=crown, bevel=0.02),
        Part("texture", [curve(face)], bevel=0.14, relief=1.1),
        Part((206, 176, 132) if ears_out else (48, 44, 46), [curve(muzzle)], bevel=0.06),
        Part((26, 22, 22), [ellipse(x - 0.022, 0.8, x + 0.022, 0.845) for x in (0.44, 0.56)], bevel=0.003),
        Part(
            (30, 24, 22),
            [ellipse(0.5 + s * w * 0.78 - 0.035, 0.38, 0.5 + s * w * 0.78 + 0.035, 0.45) for s in (-1, 1)],
            bevel=0.02,
        ),
    ]


def animal(pattern: str, u: Chance) -> list[Part] | None:
    """The animal that wears a pattern, or None where no animal does."""
    if pattern in ("leopard", "tiger"):
        return _cat(u)
    if pattern in ("zebra", "giraffe"):
        return _long_face(u, ears_out=pattern == "giraffe")
    return None


def ball(u: Chance) -> list[Part]:
    """A ball covered with the pattern."""
    r = u(0.37, 0.42)
    return [Part("texture", [ellipse(0.5 - r, 0.5 - r, 0.5 + r, 0.5 + r)], bevel=0.3, relief=1.3)]


def swatch(u: Chance) -> list[Part]:
    """A piece of cloth cut out with pinking shears."""
    a, teeth = u(0.07, 0.1), 22
    step = (1 - 2 * a) / teeth
    edge = [(a + step * i, a + (0.018 if i % 2 else 0)) for i in range(teeth)]
    outline: list[Point] = []
    for _ in range(4):
        outline += edge
        edge = [(1 - y, x) for x, y in edge]  # the next side: a quarter turn
    return [Part("texture", [outline], bevel=0.02, relief=0.7)]
