"""Light and shadow: shapes and patterns into images.

Every image is linear in the colours that paint it: ``background * colour + texture * pattern + trim * colour +
fixed``. The four coefficients (six planes, since the fixed part has three channels) come from ``product_layers`` and
``theme_layers``; ``draw_product`` and ``draw_theme`` fill them in once, a training script keeps them and fills them in
thousands of ways.
"""

from __future__ import annotations

import colorsys
import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from mm_retriever.demo.catalogue.colours import FloatArray, palette
from mm_retriever.demo.catalogue.patterns import cloud, texture
from mm_retriever.demo.catalogue.scenes import animal, ball, swatch
from mm_retriever.demo.catalogue.shapes import HANDED, PRODUCTS, Chance, Outline, Part

NATIVE_SIZE = 320  # pixels; smaller images are drawn at this size and reduced, so that every size shows the same
SUPERSAMPLING = 3  # outlines are filled at this multiple and averaged
MAPS_PER_BLOCK = 8  # drawings of each pattern that the images of one block of seeds share
SEED_BLOCK = 10_000
PALETTE_JITTER = 5.0  # deviation of each colour channel from image to image, of 255
PRODUCT_ZOOM, PRODUCT_TURN = (0.9, 1.2), 8.0  # of the pattern; turn is a deviation in degrees
THEME_ZOOM, THEME_TURN = (0.85, 1.4), 15.0


def map_seed(seed: int, rng: np.random.Generator) -> int:
    """Which drawing of its pattern an image shows.

    Seeds in one block of ``SEED_BLOCK`` share a few drawings, so that a catalogue is drawn quickly; seeds of different
    blocks never share one, so that test images can be kept apart from training images.
    """
    return seed // SEED_BLOCK * MAPS_PER_BLOCK + int(rng.integers(MAPS_PER_BLOCK))


# ---------------------------------------------------------------------- layers


@lru_cache(maxsize=64)
def _gaussian(size: int, sigma: float) -> FloatArray:
    """Matrix that blurs the columns of an image: two products blur it both ways, exactly and without scipy."""
    at = np.arange(size, dtype=np.float32)
    weights = np.exp(-0.5 * ((at[:, None] - at) / sigma) ** 2)
    return np.asarray(weights / (sigma * math.sqrt(2 * math.pi)), np.float32)


def _blur(mask: FloatArray, sigma: float) -> FloatArray:
    kernel = _gaussian(mask.shape[0], round(max(sigma, 0.7), 1))
    return np.asarray(kernel @ mask @ kernel, np.float32)


class _Placement:
    """Where a shape lies in the image: scaled, turned, shifted, perhaps mirrored."""

    def __init__(
        self, scale: float = 1.0, turn: float = 0.0, shift: tuple[float, float] = (0.0, 0.0), mirrored: bool = False
    ):
        self.scale = scale
        self._cos, self._sin = scale * math.cos(math.radians(turn)), scale * math.sin(math.radians(turn))
        self._shift, self._mirrored = shift, mirrored

    def __call__(self, outline: Outline, pixels: int) -> list[tuple[float, float]]:
        dx, dy = self._shift
        placed = []
        for x, y in outline:
            x, y = (0.5 - x if self._mirrored else x - 0.5), y - 0.5
            placed.append(
                (
                    (x * self._cos - y * self._sin + 0.5 + dx) * pixels,
                    (x * self._sin + y * self._cos + 0.5 + dy) * pixels,
                )
            )
        return placed


def _mask(part: Part, place: _Placement, size: int) -> FloatArray:
    """Coverage of a part, 0 to 1."""
    pixels = size * SUPERSAMPLING
    image = Image.new("L", (pixels, pixels), 0)
    pen = ImageDraw.Draw(image)
    for outline in part.outlines:
        pen.polygon(place(outline, pixels), fill=255)
    for hole in part.holes:
        pen.polygon(place(hole, pixels), fill=0)
    for line, width in part.strokes:
        pen.line(place(line, pixels), fill=255, width=max(1, round(width * place.scale * pixels)), joint="curve")
    return np.asarray(image.reduce(SUPERSAMPLING), np.float32) / np.float32(255)


def _light(mask: FloatArray, bevel: float, relief: float) -> tuple[FloatArray, FloatArray]:
    """Brightness and gloss of a part that swells from its edge over ``bevel`` pixels, lit from the upper left."""
    if relief == 0:
        return np.ones_like(mask), np.zeros_like(mask)
    height = _blur(mask, bevel * 0.5)
    slope = np.gradient(height)
    down, right = slope[0] * bevel, slope[1] * bevel
    shade = np.clip(1 + relief * (0.42 * right + 0.50 * down), 0.45, 1.3)
    gloss = np.clip(right * 0.5 + down * 0.6 - 0.42, 0, 1) * relief
    return shade.astype(np.float32, copy=False), gloss.astype(np.float32, copy=False)


def _layers(
    parts: list[Part], place: _Placement, size: int, *, shadow: float, light: NDArray[np.floating]
) -> FloatArray:
    """Coefficients (6, size, size) of background, texture, trim and the fixed RGB."""
    masks = [_mask(part, place, size) for part in parts]
    silhouette = np.maximum.reduce(masks)
    cast = _blur(silhouette, size * 0.022)
    down, right = round(size * 0.022), round(size * 0.012)
    cast = np.pad(cast, ((down, 0), (right, 0)))[:size, :size]
    layers = np.zeros((6, size, size), np.float32)
    layers[0] = light * (1 - shadow * cast)
    contact = size * 0.008
    for part, mask in zip(parts, masks, strict=True):
        shade, gloss = _light(mask, part.bevel * place.scale * size, part.relief)
        layers *= (1 - 0.25 * np.clip(_blur(mask, contact) - mask, 0, 1)) * (1 - mask)
        layers[3:] += 62 * gloss * mask
        if part.material == "texture":
            layers[1] += shade * mask
        elif part.material == "trim":
            layers[2] += shade * mask
        else:
            layers[3:] += np.array(part.material, np.float32)[:, None, None] * (shade * mask)
    return layers


@lru_cache(maxsize=4)
def _grid(size: int) -> tuple[FloatArray, FloatArray]:
    rows, columns = np.mgrid[0:size, 0:size].astype(np.float32) / size
    return rows, columns


def product_layers(kind: str, rng: np.random.Generator, size: int = NATIVE_SIZE) -> FloatArray:
    """A product of this kind without its colours: coefficients (6, size, size) of an image."""
    if kind not in PRODUCTS:
        raise ValueError(f"no kind of product {kind!r}; known: {', '.join(PRODUCTS)}")
    parts = PRODUCTS[kind](Chance(rng))
    place = _Placement(
        scale=rng.uniform(0.8, 1.0),
        turn=rng.normal(0, 6),
        shift=(rng.uniform(-0.05, 0.05), rng.uniform(-0.05, 0.05)),
        mirrored=bool(rng.random() < 0.5 and kind in HANDED),
    )
    y, x = _grid(size)
    return _layers(parts, place, size, shadow=0.34, light=1.04 - 0.10 * y - 0.06 * ((x - 0.5) ** 2 + (y - 0.4) ** 2))


def theme_layers(pattern: str, rng: np.random.Generator, size: int = NATIVE_SIZE) -> FloatArray:
    """An image of a pattern without its colours: cloth up close, a ball, a swatch, or the animal that wears it."""
    y, x = _grid(size)
    show = rng.random()
    if show < 0.4:
        folds = Image.fromarray(cloud(64, rng, 2, 2)).resize((size, size), Image.Resampling.BICUBIC)
        lamp_x, lamp_y = rng.uniform(0.3, 0.7, 2)
        layers = np.zeros((6, size, size), np.float32)
        layers[1] = 1 + 0.09 * np.asarray(folds) - 0.35 * ((x - lamp_x) ** 2 + (y - lamp_y) ** 2)
        return layers
    chance = Chance(rng)
    beast = animal(pattern, chance) if show < 0.8 else None
    parts = beast or (ball(chance) if rng.random() < 0.5 else swatch(chance))
    place = _Placement(scale=rng.uniform(0.88, 1.04), turn=rng.normal(0, 5))
    return _layers(parts, place, size, shadow=0.35, light=1.1 - 0.3 * y)


# ---------------------------------------------------------------------- colours


def background(rng: np.random.Generator) -> FloatArray:
    """Colour of a product image's background: often near white, else a pale tint."""
    if rng.random() < 0.6:
        return np.asarray(rng.uniform(214, 250) + rng.normal(0, 4, 3), np.float32)
    return (
        np.array(colorsys.hsv_to_rgb(rng.random(), rng.uniform(0.05, 0.2), rng.uniform(0.76, 0.97)), np.float32) * 255
    )


def trim_of(ground: FloatArray) -> FloatArray:
    """Colour of seams and cuffs beside a ground colour: darker, or lighter than what is nearly black."""
    return ground * 0.62 if ground.mean() > 70 else ground * 1.6 + 20


def _paint(
    layers: FloatArray, pattern: str, colour: str, weights: FloatArray, behind: FloatArray, rng: np.random.Generator
) -> Image.Image:
    colours = palette(pattern, colour)
    colours = np.clip(colours + rng.normal(0, PALETTE_JITTER, colours.shape), 0, 255).astype(np.float32)
    ground, figure, accent = colours[:, :, None, None]
    pattern_colours = ground + weights[0] * (figure - ground) + weights[1] * (accent - ground)
    trim = trim_of(colours[0])[:, None, None]
    image = layers[0] * behind[:, None, None] + layers[1] * pattern_colours + layers[2] * trim + layers[3:]
    return Image.fromarray(np.clip(image + 0.5, 0, 255).astype(np.uint8).transpose(1, 2, 0))


def _sized(image: Image.Image, size: int) -> Image.Image:
    return image if image.width == size else image.resize((size, size), Image.Resampling.LANCZOS)


def _checked(pattern: str, colour: str, seed: int, size: int) -> None:
    palette(pattern, colour)
    if seed < 0:
        raise ValueError(f"seed {seed} is negative; use 0 or more")
    if not 8 <= size <= 4096:
        raise ValueError(f"size {size} is not between 8 and 4096 pixels")


def draw_product(kind: str, pattern: str, colour: str, seed: int, size: int = NATIVE_SIZE) -> Image.Image:
    """RGB image of one product; the same arguments draw the same pixels.

    Raises:
        ValueError: unknown kind, pattern or colour, a pattern that does not come in that colour, or a size or seed
            out of range.
    """
    _checked(pattern, colour, seed, size)
    rng = np.random.default_rng([1, seed])
    pixels = max(size, NATIVE_SIZE)
    drawing = map_seed(seed, rng)
    layers = product_layers(kind, rng, pixels)
    weights = texture(pattern, drawing, rng, pixels, zoom=rng.uniform(*PRODUCT_ZOOM), turn=rng.normal(0, PRODUCT_TURN))
    return _sized(_paint(layers, pattern, colour, weights, background(rng), rng), size)


def draw_theme(pattern: str, colour: str, seed: int, size: int = NATIVE_SIZE) -> Image.Image:
    """RGB image of a pattern away from any product; the same arguments draw the same pixels.

    Raises:
        ValueError: unknown pattern or colour, a pattern that does not come in that colour, or a size or seed out of
            range.
    """
    _checked(pattern, colour, seed, size)
    rng = np.random.default_rng([2, seed])
    pixels = max(size, NATIVE_SIZE)
    drawing = map_seed(seed, rng)
    layers = theme_layers(pattern, rng, pixels)
    weights = texture(pattern, drawing, rng, pixels, zoom=rng.uniform(*THEME_ZOOM), turn=rng.normal(0, THEME_TURN))
    behind = background(rng) * np.float32(rng.uniform(0.55, 1))
    return _sized(_paint(layers, pattern, colour, weights, behind, rng), size)
