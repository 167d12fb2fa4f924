"""The catalogue: which products there are, which are held out of training, and the folder of images on disk."""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from mm_retriever.demo.catalogue.captions import KINDS, Looks, caption
from mm_retriever.demo.catalogue.colours import NATURAL, PATTERNS, colours_of
from mm_retriever.demo.catalogue.drawing import NATIVE_SIZE, SEED_BLOCK, draw_product, draw_theme

_HELD_OUT_STEPS = (10, 3, 14)  # three patterns a kind, shifting by five from kind to kind: 48 of 288 pairs
HELD_OUT: frozenset[tuple[str, str]] = frozenset(
    (kind, PATTERNS[(5 * row + step) % len(PATTERNS)]) for row, kind in enumerate(KINDS) for step in _HELD_OUT_STEPS
)
"""(kind, pattern) pairs that the bundled models never saw in training, neither as images nor in texts. The leopard
phone case of the published example is one of them."""

_COLOURS_FIRST = 4  # of each pair, before any pair gets more
_DEMO_THEMES = (
    ("leopard", NATURAL), ("zebra", NATURAL), ("tiger", NATURAL), ("giraffe", NATURAL), ("watermelon", NATURAL),
    ("marble", NATURAL), ("hearts", "red"), ("polka dots", "blue"), ("flowers", "pink"), ("stars", "purple"),
    ("plaid", "green"), ("waves", "blue"),
)  # fmt: skip


@dataclass(frozen=True)
class Product:
    """One product of a catalogue; ``seed`` draws its image."""

    kind: str
    pattern: str
    colour: str
    seed: int

    @property
    def looks(self) -> Looks:
        """Kind, pattern and colour, without the seed."""
        return Looks(self.kind, self.pattern, self.colour)

    @property
    def description(self) -> str:
        """What the image shows, in one English phrase."""
        return caption(self.looks)

    @property
    def held_out(self) -> bool:
        """Whether the bundled models never saw this pattern on this kind."""
        return (self.kind, self.pattern) in HELD_OUT

    @property
    def file_name(self) -> str:
        """Relative path of its image in a written catalogue, with forward slashes."""
        folder, words = self.kind.replace(" ", "-"), f"{self.colour} {self.pattern} {self.kind}"
        return f"{folder}/{words.replace(' ', '-')}-{self.seed}.jpg"

    def draw(self, size: int = NATIVE_SIZE) -> Image.Image:
        """Its image."""
        return draw_product(self.kind, self.pattern, self.colour, self.seed, size)


def all_looks() -> list[Looks]:
    """Every product there can be: 16 kinds in 18 patterns in the colours that each pattern comes in."""
    return [Looks(kind, pattern, colour) for kind in KINDS for pattern in PATTERNS for colour in colours_of(pattern)]


def catalogue(count: int = 900, seed: int = 0) -> list[Product]:
    """Distinct products, no two alike in kind, pattern and colour, in a random order that ``seed`` fixes.

    From 900 up, every kind comes in every pattern, in up to four colours before any has more; natural furs are always
    among them.

    Raises:
        ValueError: more products than there are, fewer than one, or a negative seed.
    """
    everything = all_looks()
    if not 1 <= count <= len(everything):
        raise ValueError(f"count {count} is not between 1 and {len(everything)}, the number of different products")
    if seed < 0:
        raise ValueError(f"seed {seed} is negative; use 0 or more")
    rng = np.random.default_rng([3, seed])
    first: list[Looks] = []
    rest: list[Looks] = []
    for kind in KINDS:
        for pattern in PATTERNS:
            colours = list(rng.permutation(colours_of(pattern)))
            if NATURAL in colours:
                colours.remove(NATURAL)
                colours.insert(0, NATURAL)
            looks = [Looks(kind, pattern, str(colour)) for colour in colours]
            first += looks[:_COLOURS_FIRST]
            rest += looks[_COLOURS_FIRST:]
    ordered = [group[i] for group in (first, rest) for i in rng.permutation(len(group))][:count]
    order = rng.permutation(count)
    return [_product(ordered[i], seed * SEED_BLOCK + place) for place, i in enumerate(order)]


def _product(looks: Looks, seed: int) -> Product:
    assert looks.kind is not None
    return Product(looks.kind, looks.pattern, looks.colour, seed)


@dataclass(frozen=True)
class WrittenCatalogue:
    """Where ``write_catalogue`` put things.

    Attributes:
        products: folder of product images, one folder a kind: what an index reads.
        themes: folder of theme images to ask with, ``leopard.jpg`` among them.
        labels: JSON file with the truth about every product image, keyed by its path relative to ``products``.
    """

    products: Path
    themes: Path
    labels: Path


def write_catalogue(
    folder: str | os.PathLike[str],
    *,
    count: int = 900,
    seed: int = 0,
    size: int = NATIVE_SIZE,
    quality: int = 90,
    show_progress: bool = False,
) -> WrittenCatalogue:
    """Draws a catalogue into ``folder``: product images, theme images and a sidecar of truth labels.

    900 images take about 20 seconds on one core; files that are there are overwritten.
    """
    root = Path(folder)
    written = WrittenCatalogue(root / "products", root / "themes", root / "labels.json")
    products = catalogue(count, seed)
    for kind in sorted({product.kind for product in products}):
        (written.products / kind.replace(" ", "-")).mkdir(parents=True, exist_ok=True)
    written.themes.mkdir(parents=True, exist_ok=True)

    def save(product: Product) -> None:
        product.draw(size).save(written.products / product.file_name, quality=quality)

    in_map_order = sorted(products, key=lambda product: PATTERNS.index(product.pattern))  # each map is drawn once
    with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:  # numpy and Pillow let go of the lock
        drawn = pool.map(save, in_map_order)
        list(tqdm(drawn, total=count, desc="Drawing", unit="image", disable=not show_progress))
    for number, (pattern, colour) in enumerate(_DEMO_THEMES):
        name = pattern if colour == NATURAL else f"{colour} {pattern}"
        image = draw_theme(pattern, colour, seed * SEED_BLOCK + number, size)
        image.save(written.themes / f"{name.replace(' ', '-')}.jpg", quality=quality)
    labels = {product.file_name: _label(product) for product in products}
    written.labels.write_text(json.dumps(labels, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return written


def _label(product: Product) -> dict[str, str | bool]:
    return {
        "kind": product.kind,
        "pattern": product.pattern,
        "colour": product.colour,
        "description": product.description,
        "held_out": product.held_out,
    }
