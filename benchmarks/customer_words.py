"""Queries of customers who also say what they do not want, and drawn images for them.

"make the crimson one navy", "no mug, a tote bag with this print please": the bundled embedder was trained on queries
that name what is wanted and nothing else, so that the second colour or kind misleads it. Every template stands in one
part alone: "train", "choose" (hyper-parameters and weights are chosen on it) or "test".
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from mm_retriever.demo.catalogue import HELD_OUT, KINDS, PATTERNS, Looks, draw_product, draw_theme

sys.path.append(str(Path(__file__).resolve().parent.parent / "examples" / "training"))
from phrases import COLOUR_NAMES, MODES, Mode, compose_query, fill

Part = Literal["train", "choose", "test"]
Words = Mapping[Mode, Sequence[str]]
Pair = tuple[str, str]

SIZE = 160  # pixels at which images are drawn
CHOSEN_ON: frozenset[Pair] = frozenset(sorted(HELD_OUT)[::3])
"""A third of the (kind, pattern) pairs that the bundled models never saw; the others are tested."""
TESTED = HELD_OUT - CHOSEN_ON

# {K} {P} {C}: the kind, pattern and colour wanted; {k} {p} {c}: those of the query image, or another kind
CUSTOMERS: dict[Part, dict[Mode, tuple[str, ...]]] = {
    "train": {
        "theme": (
            "a {K} with this instead of a {k}", "not a {k} with this, a {K}",
            "i have a {k} with this, now i want a {K}",
            "a {k} is nice, but i need a {K} like this", "this on a {K}, please no {k}",
            "put this on a {K}, not on a {k}", "it is for a {K}, not a {k}",
            "a {K} like this, we have enough of the {k} at home", "my wife got a {k} with this, is there a {K} too",
            "no {k}, i want this on a {K}",
        ),
        "kind": (
            "a {K} instead of a {k}", "not a {k}, a {K}", "i have the {k}, now i want the {K}",
            "the {k} is nice, but i need a {K}", "this as a {K}, please no {k}", "swap the {k} for a {K}",
            "turn the {k} into a {K}", "a {K}, we have enough of the {k} at home",
            "my wife has the {k}, is there a {K} too", "it is on a {k}, i want it on a {K}",
        ),
        "colour": (
            "{C} instead of {c}", "not {c}, {C}", "i have the {c} one, now i want {C}",
            "the {c} one is nice, but i need {C}", "this in {C}, please no {c}", "swap {c} for {C}",
            "change the {c} to {C}", "{C}, we have enough {c} at home", "my wife hates {c}, is there a {C} one",
            "it is {c}, i want it {C}",
        ),
        "pattern": (
            "{P} instead of {p}", "not {p}, {P}", "i have one with {p}, now i want {P}",
            "the {p} one is nice, but i need {P}", "the same with {P}, please no {p}", "swap the {p} for {P}",
            "change {p} to {P}", "{P}, we have enough {p} at home", "my husband hates {p}, is there one with {P}",
            "it has {p}, i want {P}",
        ),
    },
    "choose": {
        "theme": (
            "from {k} to {K}, with this print", "anything but a {k}, best a {K} in this style",
            "do you sell a {K} like this too, not just a {k}", "a {k} is too small, show me a {K} with this",
        ),
        "kind": (
            "from {k} to {K}", "anything but a {k}, best a {K}", "do you sell a {K} too, not just the {k}",
            "a {k} is too small, show me a {K}",
        ),
        "colour": (
            "from {c} to {C}", "anything but {c}, best {C}", "do you have it in {C} too, not just {c}",
            "the {c} is too loud, show me {C}",
        ),
        "pattern": (
            "from {p} to {P}", "anything but {p}, best {P}", "do you sell it with {P} too, not just {p}",
            "{p} is too loud, show me {P}",
        ),
    },
    "test": {
        "theme": (
            "a {k} is not for me, make it a {K} with this", "where you have a {k} with this i want a {K}",
            "a {K} with this would suit me more than a {k}", "no {k}, a {K} with this print please",
            "my old {k} had this, the new {K} should have it too", "a {K} in this look, the {k} was not good",
        ),
        "kind": (
            "a {k} is not for me, make it a {K}", "make the {k} a {K}", "where you have a {k} i want a {K}",
            "a {K} would suit me more than a {k}", "no {k}, a {K} please",
            "my old one is a {k}, the new one should be a {K}",
        ),
        "colour": (
            "{c} is not for me, make it {C}", "make the {c} {C}", "where this is {c} i want {C}",
            "{C} would suit me more than {c}", "no {c}, {C} please", "my old one is {c}, the new one should be {C}",
        ),
        "pattern": (
            "{p} is not for me, make it {P}", "make the {p} {P}", "where this has {p} i want {P}",
            "{P} would suit me more than {p}", "no {p}, {P} please",
            "my old one has {p}, the new one should have {P}",
        ),
    },
}  # fmt: skip


@dataclass(frozen=True)
class Asked:
    """What the query image shows, the words beside it, and the one product that both ask for."""

    source: Looks
    text: str
    wanted: Looks


def ask(
    wanted: Sequence[Looks], words: Words, rng: np.random.Generator, count: int, *, never: frozenset[Pair] = frozenset()
) -> list[Asked]:
    """Queries for products drawn by chance, the four modes in turn.

    Args:
        wanted: products that may be asked for.
        words: templates by mode.
        rng: chooses products, images and words.
        count: of queries.
        never: (kind, pattern) pairs that no query image may show, and no words may speak of.
    """
    asked: list[Asked] = []
    while len(asked) < count:
        looks = wanted[int(rng.integers(len(wanted)))]
        query = compose_query(looks, MODES[len(asked) % len(MODES)], rng, wording=words, never=never)
        if query is None:
            continue
        kind, pattern, colour = query.source
        if colour not in COLOUR_NAMES and "{c}" in query.text:
            continue  # a natural fur has no colour to name
        if kind is None:
            others = [other for other in KINDS if other != looks.kind and (other, pattern) not in never]
            kind = others[int(rng.integers(len(others)))]
        text = query.text
        for mark in ("{k}", "{p}", "{c}"):
            text = text.replace(mark, mark.upper())
        asked.append(Asked(query.source, fill(text, rng, kind=kind, pattern=pattern, colour=colour), looks))
    return asked


class Drawn:
    """Images in a folder, each drawn once: a later run with the same folder draws none.

    Args:
        folder: made if it is not there.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def images(self, looks: Sequence[Looks], seed: int) -> list[Path]:
        """The image of each product, or of a theme where the kind is None, from this seed up."""
        seeds = [seed + place for place in range(len(looks))]
        names = ["-".join(map(str, (*one, at))).replace(" ", "_") for one, at in zip(looks, seeds, strict=True)]
        paths = [self.folder / f"{name}.jpg" for name in names]

        def draw(place: int) -> None:
            kind, pattern, colour = looks[place]
            drawn = (
                draw_theme(pattern, colour, seeds[place], SIZE)
                if kind is None
                else draw_product(kind, pattern, colour, seeds[place], SIZE)
            )
            drawn.save(paths[place], quality=92)

        missing = [place for place, path in enumerate(paths) if not path.exists()]
        missing.sort(key=lambda place: PATTERNS.index(looks[place].pattern))  # each pattern map is drawn once
        with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
            list(pool.map(draw, missing))
        return paths
