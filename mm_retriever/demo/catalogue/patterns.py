"""Patterns: flat weight maps, drawn once and cached.

A pattern is a pair of weight maps ``(figure, accent)``: a texel shows the ground colour where both are 0, the
figure colour where the first is 1 and the accent colour where the second is 1. Colouring is therefore linear,
which lets the training scripts paint thousands of images from a few maps. Knows nothing of colours or products.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from mm_retriever.demo.catalogue.colours import PATTERNS, FloatArray

TEXELS_PER_IMAGE = 320  # a pattern map's scale: so many texels across one image at zoom 1
MAP_SIZE = 640  # texels; leaves room for a rotated window of a zoomed-out image

# ---------------------------------------------------------------------- building blocks


@lru_cache(maxsize=1)
def _texels() -> tuple[FloatArray, FloatArray]:
    """Row and column of every texel of a map."""
    rows, columns = np.mgrid[0:MAP_SIZE, 0:MAP_SIZE].astype(np.float32)
    return rows, columns


def _edge(distance: NDArray[np.floating], width: float = 1.5) -> FloatArray:
    """0 outside, 1 inside, with a soft edge of the given width in texels."""
    return np.asarray(np.clip(distance / width + 0.5, 0, 1), np.float32)


def cloud(size: int, rng: np.random.Generator, base: int = 4, octaves: int = 4) -> FloatArray:
    """Fractal noise of mean 0 and deviation 1, ``base`` lumps across."""
    total = np.zeros((size, size), np.float32)
    for octave in range(octaves):
        lumps = base * 2**octave + 3
        grid = Image.fromarray(rng.standard_normal((lumps, lumps), np.float32))
        total += np.asarray(grid.resize((size, size), Image.Resampling.BICUBIC)) * 0.5**octave
    return np.asarray((total - total.mean()) / total.std(), np.float32)


def _lattice(cell: float, jitter: float, rng: np.random.Generator) -> list[tuple[float, float]]:
    """Jittered points of a hexagonal lattice over the whole map, as (x, y)."""
    points = []
    for row, y in enumerate(np.arange(-cell, MAP_SIZE + cell, cell)):
        for x in np.arange(-cell, MAP_SIZE + cell, cell):
            dx, dy = rng.normal(0, jitter * cell, 2)
            points.append((x + (cell / 2 if row % 2 else 0) + dx, y + dy))
    return points


def _cells(
    cell: float, jitter: float, rng: np.random.Generator, rows: FloatArray, columns: FloatArray
) -> tuple[FloatArray, FloatArray, FloatArray, FloatArray]:
    """Distance to the nearest and the second nearest lattice point, and the vector (dy, dx) from the nearest.

    Every texel looks only at the lattice cells around its own, so the cost does not grow with the points.
    """
    count = int(MAP_SIZE / cell) + 6
    offset = rng.normal(0, jitter * cell, (2, count, count)).astype(np.float32)
    own_row = np.round(rows / cell).astype(np.intp)
    first = np.full(rows.shape, np.inf, np.float32)
    second, best_dy, best_dx = first.copy(), first.copy(), first.copy()
    for step_row in (-1, 0, 1):
        row = own_row + step_row
        shift = np.where(row % 2, cell / 2, 0).astype(np.float32)
        own_column = np.round((columns - shift) / cell).astype(np.intp)
        for step_column in (-1, 0, 1):
            column = own_column + step_column
            at = (np.clip(row + 3, 0, count - 1), np.clip(column + 3, 0, count - 1))
            dy = rows - (row * cell + offset[0][at])
            dx = columns - (column * cell + shift + offset[1][at])
            distance = np.sqrt(dy * dy + dx * dx)
            nearer = distance < first
            second = np.where(nearer, first, np.minimum(second, distance))
            best_dy, best_dx = np.where(nearer, dy, best_dy), np.where(nearer, dx, best_dx)
            first = np.where(nearer, distance, first)
    return first, second, best_dy, best_dx


Outline = list[tuple[float, float]]


def _star(x: float, y: float, radius: float, turn: float) -> Outline:
    reach = [radius * (1 if i % 2 == 0 else 0.42) for i in range(10)]
    return [
        (x + r * math.sin(turn + i * math.pi / 5), y - r * math.cos(turn + i * math.pi / 5))
        for i, r in enumerate(reach)
    ]


def _rotated(shape: Outline, x: float, y: float, radius: float, turn: float) -> Outline:
    cos, sin = math.cos(turn) * radius, math.sin(turn) * radius
    return [(x + a * cos - b * sin, y + a * sin + b * cos) for a, b in shape]


_HEART: Outline = [
    (
        16 * math.sin(t) ** 3 / 16,
        -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) / 16,
    )
    for t in np.linspace(0, 2 * math.pi, 28)
]
_SEED: Outline = [(0.5 * math.sin(t) * (1 - 0.5 * math.cos(t)), -math.cos(t)) for t in np.linspace(0, 2 * math.pi, 16)]


def _weights(image: Image.Image) -> FloatArray:
    """An 8-bit greyscale image as weights from 0 to 1."""
    return np.asarray(image, np.float32) / np.float32(255)


class _Stamps:
    """Two layers, figure and accent, on which small shapes are stamped at twice the map's resolution."""

    def __init__(self) -> None:
        side = 2 * MAP_SIZE
        self._images = [Image.new("L", (side, side), 0) for _ in range(2)]
        self._pens = [ImageDraw.Draw(image) for image in self._images]

    def polygon(self, outline: Outline, layer: int = 0) -> None:
        self._pens[layer].polygon([(2 * x, 2 * y) for x, y in outline], fill=255)

    def disc(self, x: float, y: float, radius: float, layer: int = 0) -> None:
        self._pens[layer].ellipse((2 * (x - radius), 2 * (y - radius), 2 * (x + radius), 2 * (y + radius)), fill=255)

    def maps(self) -> tuple[FloatArray, FloatArray]:
        figure, accent = (_weights(image.reduce(2)) for image in self._images)
        return figure, accent


# ---------------------------------------------------------------------- the patterns
# Each takes a generator and a scale near 1, and returns (figure, accent). Lengths are texels: 320 make an image,
# and a motif below about 15 texels would be lost when a small model looks at 128 pixels.

Maps = tuple[FloatArray, FloatArray | None]


def _plain(rng: np.random.Generator, scale: float) -> Maps:
    return np.zeros((MAP_SIZE, MAP_SIZE), np.float32), None


def _polka_dots(rng: np.random.Generator, scale: float) -> Maps:
    stamps = _Stamps()
    for x, y in _lattice(48 * scale, 0, rng):
        stamps.disc(x, y, 14.5 * scale)
    return stamps.maps()


def _stripes(rng: np.random.Generator, scale: float) -> Maps:
    _, x = _texels()
    half = 23 * scale
    return _edge((np.sin(x * (math.pi / half)) - 0.22) * half / 3, 1.6), None


def _plaid(rng: np.random.Generator, scale: float) -> Maps:
    y, x = _texels()
    half = 38 * scale

    def bands(t: FloatArray) -> tuple[FloatArray, FloatArray]:
        phase = (t / half) % 2
        return _edge((np.abs(phase - 1) - 0.58) * half), _edge((0.075 - np.abs(phase - 1)) * half)

    (wide_x, thin_x), (wide_y, thin_y) = bands(x), bands(y)
    thin = np.maximum(thin_x, thin_y)
    return 0.5 * (wide_x + wide_y) * (1 - thin), thin


def _checkerboard(rng: np.random.Generator, scale: float) -> Maps:
    y, x = _texels()
    side = 28 * scale
    return _edge(np.sin(x * (math.pi / side)) * np.sin(y * (math.pi / side)) * side / 2, 1.6), None


def _chevron(rng: np.random.Generator, scale: float) -> Maps:
    y, x = _texels()
    half, reach = 21 * scale, 30 * scale
    zigzag = np.abs((x / reach) % 2 - 1) * reach
    return _edge((np.sin((y + zigzag) * (math.pi / half)) - 0.12) * half / 3, 1.6), None


def _waves(rng: np.random.Generator, scale: float) -> Maps:
    y, x = _texels()
    half = 20 * scale
    swell = 0.62 * half * np.sin(x * (math.pi / (1.9 * half)))
    return _edge((np.sin((y + swell) * (math.pi / half)) - 0.22) * half / 3, 1.6), None


def _flowers(rng: np.random.Generator, scale: float) -> Maps:
    stamps = _Stamps()
    for x, y in _lattice(68 * scale, 0.06, rng):
        radius, turn = 28 * scale * rng.uniform(0.88, 1.12), rng.uniform(0, 2 * math.pi)
        for petal in range(5):
            angle = turn + petal * 2 * math.pi / 5
            stamps.disc(x + 0.58 * radius * math.cos(angle), y + 0.58 * radius * math.sin(angle), 0.44 * radius)
        stamps.disc(x, y, 0.34 * radius, layer=1)
    return stamps.maps()


def _stars(rng: np.random.Generator, scale: float) -> Maps:
    stamps = _Stamps()
    for x, y in _lattice(58 * scale, 0.06, rng):
        stamps.polygon(_star(x, y, 24 * scale * rng.uniform(0.88, 1.12), rng.uniform(0, 2 * math.pi)))
    return stamps.maps()


def _hearts(rng: np.random.Generator, scale: float) -> Maps:
    stamps = _Stamps()
    for x, y in _lattice(56 * scale, 0.05, rng):
        stamps.polygon(_rotated(_HEART, x, y, 20.5 * scale * rng.uniform(0.88, 1.12), rng.normal(0, 0.15)))
    return stamps.maps()


def _leopard(rng: np.random.Generator, scale: float) -> Maps:
    y, x = _texels()
    noise = cloud(MAP_SIZE, rng, 20, 3)
    cell = 46 * scale
    distance, _, dy, dx = _cells(cell, 0.12, rng, y, x)
    distance = distance + noise * 2.2 * scale
    mouth = rng.uniform(0, 2 * math.pi) + 2.4 * cloud(MAP_SIZE, rng, 6, 1)  # where each rosette is open
    opening = np.cos(np.arctan2(dy, dx) - mouth)
    ring = _edge(5.6 * scale - np.abs(distance - 13.5 * scale), 2) * _edge(0.72 - opening + 0.25 * noise, 0.2)
    return ring, _edge(11.5 * scale - distance, 3) * (1 - ring)


def _zebra(rng: np.random.Generator, scale: float) -> Maps:
    y, x = _texels()
    half = 21 * scale
    warp = cloud(MAP_SIZE, rng, 4, 3) * 22
    return _edge((np.sin((x + warp + 0.25 * y) * (math.pi / half)) + 0.05) * half / 2.6, 1.8), None


def _tiger(rng: np.random.Generator, scale: float) -> Maps:
    y, x = _texels()
    half = 21 * scale
    warp, drift = cloud(MAP_SIZE, rng, 5, 3) * 12, cloud(MAP_SIZE, rng, 4, 2)
    along = np.sin((x + drift * 26) * (math.pi / (78 * scale)))
    stripe = np.zeros_like(x)
    for sign in (1, -1):  # tongues from either side, half a period apart
        wave = np.sin((y + warp) * (math.pi / half) + (0 if sign > 0 else math.pi))
        stripe = np.maximum(stripe, _edge((wave - 1.05 + 0.72 * np.clip(sign * along, 0, 1)) * half * 0.8, 2))
    pale = _edge(drift - 0.95, 0.7) * 0.85
    return stripe, pale * (1 - stripe)


def _giraffe(rng: np.random.Generator, scale: float) -> Maps:
    y, x = _texels()
    noise = cloud(MAP_SIZE, rng, 18, 3) * 2.2
    nearest, second, _, _ = _cells(58 * scale, 0.15, rng, y + noise, x + np.roll(noise, 99, 0))
    patch = _edge(second - nearest - 8.5 * scale, 3)
    darker = _edge(cloud(MAP_SIZE, rng, 10, 2), 3) * 0.5 * patch
    return patch - darker, darker


def _camouflage(rng: np.random.Generator, scale: float) -> Maps:
    dark = _edge(cloud(MAP_SIZE, rng, round(11 / scale), 3) - 0.35, 0.1)
    return dark, _edge(cloud(MAP_SIZE, rng, round(11 / scale), 3) - 0.4, 0.1) * (1 - dark)


def _marble(rng: np.random.Generator, scale: float) -> Maps:
    base = round(7 / scale)
    bed, strength = cloud(MAP_SIZE, rng, base, 5), cloud(MAP_SIZE, rng, base, 3)
    broad = np.exp(-np.abs(bed) * 5) * np.clip(0.55 + 0.5 * strength, 0.12, 1)
    fine = np.exp(-np.abs(np.roll(bed, 210, 1) + 0.5 * strength) * 16) * 0.8
    smoke = 0.3 * _edge(-bed - 0.5, 1.2)
    grey = np.clip(np.maximum(np.maximum(broad, fine), smoke), 0, 1)
    gold = np.exp(-np.abs(np.roll(bed, 330, 0) - 0.7) * 18) * _edge(strength, 1.0)
    return grey * (1 - gold), gold


def _watermelon(rng: np.random.Generator, scale: float) -> Maps:
    y, _ = _texels()
    period = 128 * scale
    phase = y % period
    stamps = _Stamps()
    for row in range(-1, int(MAP_SIZE / period) + 2):
        for line, share in enumerate((0.30, 0.56, 0.82)):
            for x in np.arange(-40, MAP_SIZE + 40, 40 * scale):
                across = x + (line % 2) * 20 * scale + rng.normal(0, 2)
                stamps.polygon(
                    _rotated(_SEED, across, (row + share) * period + rng.normal(0, 2), 8.5 * scale, rng.normal(0, 0.2))
                )
    seeds, _ = stamps.maps()
    rind = _edge(12 * scale - np.minimum(phase, period - phase), 2)
    return seeds * (1 - rind), rind


def _bricks(rng: np.random.Generator, scale: float) -> Maps:
    y, x = _texels()
    height, width, mortar = 25 * scale, 54 * scale, 2.6 * scale
    course = np.floor(y / height)
    shifted = x + (course % 2) * width / 2
    joint = np.maximum(
        _edge(mortar - np.minimum(y % height, height - y % height)),
        _edge(mortar - np.minimum(shifted % width, width - shifted % width)),
    )
    burnt = np.sin(course * 12.9898 + np.floor(shifted / width) * 78.233) * 43758.5453
    return joint, (burnt - np.floor(burnt)) * (1 - joint)


_DRAWN: dict[str, Callable[[np.random.Generator, float], Maps]] = {
    "plain": _plain,
    "polka dots": _polka_dots,
    "stripes": _stripes,
    "plaid": _plaid,
    "checkerboard": _checkerboard,
    "chevron": _chevron,
    "waves": _waves,
    "flowers": _flowers,
    "stars": _stars,
    "hearts": _hearts,
    "leopard": _leopard,
    "zebra": _zebra,
    "tiger": _tiger,
    "giraffe": _giraffe,
    "camouflage": _camouflage,
    "marble": _marble,
    "watermelon": _watermelon,
    "bricks": _bricks,
}


@lru_cache(maxsize=32)
def pattern_map(pattern: str, map_seed: int) -> tuple[Image.Image, Image.Image]:
    """Figure and accent weights of one drawing of a pattern, as 8-bit greyscale images of ``MAP_SIZE`` texels.

    Cached: draw images in the order of their patterns and each map is drawn once.
    """
    if pattern not in _DRAWN:
        raise ValueError(f"no pattern {pattern!r}; known: {', '.join(PATTERNS)}")
    rng = np.random.default_rng([PATTERNS.index(pattern), map_seed])
    figure, accent = _DRAWN[pattern](rng, rng.uniform(0.88, 1.16))
    accent = np.zeros_like(figure) if accent is None else np.minimum(accent, 1)
    figure = np.clip(figure, 0, 1) * (1 - accent) if pattern in ("flowers", "bricks") else np.clip(figure, 0, 1)
    first, second = (Image.fromarray(np.round(255 * weights).astype(np.uint8)) for weights in (figure, accent))
    return first, second


def texture(
    pattern: str, map_seed: int, rng: np.random.Generator, size: int, *, zoom: float, turn: float
) -> FloatArray:
    """A random window of a pattern map as (2, size, size) weights of figure and accent.

    Args:
        pattern: one of ``PATTERNS``.
        map_seed: which drawing of the pattern.
        rng: chooses where the window lies.
        size: pixels; meant for ``TEXELS_PER_IMAGE`` and above (windows are not filtered down).
        zoom: above 1 enlarges the pattern.
        turn: degrees.
    """
    window = TEXELS_PER_IMAGE / zoom
    angle, step = math.radians(turn), window / size
    slack = max(0.0, (MAP_SIZE - window * (abs(math.cos(angle)) + abs(math.sin(angle)))) / 2)
    centre_x, centre_y = MAP_SIZE / 2 + rng.uniform(-slack, slack, 2)
    cos, sin = step * math.cos(angle), step * math.sin(angle)
    half = size / 2
    affine = (cos, -sin, centre_x - half * (cos - sin), sin, cos, centre_y - half * (sin + cos))
    layers = [
        image.transform((size, size), Image.Transform.AFFINE, affine, Image.Resampling.BILINEAR)
        for image in pattern_map(pattern, map_seed)
    ]
    return np.stack([_weights(layer) for layer in layers])
