"""Queries of customers who also say what their own image shows, and drawn images for them.

"navy instead of crimson", "exchange a mug for a tote bag": the bundled embedder was trained on queries that name what
is wanted and nothing else, so that the second colour, pattern or kind misleads it. Every template stands in one part
alone: "train", "choose" (recipes and weights are chosen on it) or "test".
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
from PIL import Image

from mm_retriever.demo.catalogue import HELD_OUT, PATTERNS, Looks, draw_product, draw_theme

sys.path.append(str(Path(__file__).resolve().parent.parent / "examples" / "training"))
from phrases import COLOUR_NAMES, Mode, compose_query, fill

Part = Literal["train", "choose", "test"]
Words = Mapping[Mode, Sequence[str]]
Pair = tuple[str, str]

SIZE = 160  # pixels at which images are drawn
CHOSEN_ON: frozenset[Pair] = frozenset(sorted(HELD_OUT)[::2])
"""Half of the (kind, pattern) pairs that the bundled models never saw; the others are tested."""
TESTED = HELD_OUT - CHOSEN_ON

_SAID: dict[Mode, tuple[str, str, str]] = {  # {K} {P} {C}: what is wanted; {k} {p} {c}: what the query image shows
    "kind": ("a {K}", "as a {K}", "a {k}"),
    "colour": ("{C}", "in {C}", "{c}"),
    "pattern": ("{P}", "with {P}", "{p}"),
}
_TEMPLATES: dict[Part, tuple[str, ...]] = {
    "train": (
        "not OLD, NEW", "from OLD to NEW", "swap OLD for NEW", "change OLD to NEW", "replace OLD with NEW",
        "turn OLD into NEW", "instead of OLD, NEW", "i have OLD, now i want NEW", "OLD is nice, but i need NEW",
        "i like OLD but i would like NEW more", "OLD was not what i wanted, i want NEW", "it is OLD, i want it AS",
        "mine is OLD, is there one AS", "my wife has OLD, i need it AS", "this one is OLD, show me the same AS",
        "anything but OLD, best NEW", "we have enough of OLD at home, find NEW", "OLD is too loud for me, show me NEW",
        "where you have OLD i want NEW", "the picture has OLD, i am looking for NEW",
        "my old one is OLD, the new one should be NEW", "OLD is not for me, make it NEW", "do not show OLD, show NEW",
        "without OLD, NEW please", "OLD? no, NEW", "tired of OLD, give me NEW",
        "i got OLD last year and want it AS this time", "NEW instead of OLD", "NEW, not OLD", "NEW, please no OLD",
        "this AS, without OLD", "i want NEW, not OLD", "NEW would suit me more than OLD", "make it NEW, it is OLD here",
        "show me NEW, i have OLD", "the same AS, this is OLD", "i need NEW because OLD is sold out",
        "do you have it AS too, not just OLD", "find me NEW, my husband hates OLD", "NEW in place of OLD",
        "is there one AS, i do not like OLD", "looks good, but NEW and no OLD", "NEW to replace OLD",
        "we want NEW, our old one is OLD", "the one AS, never OLD",
    ),
    "choose": (
        "OLD out, NEW in", "take OLD away and give me NEW", "you show OLD, could i have NEW",
        "a friend has OLD, for me NEW", "best NEW, OLD is boring", "i would buy it AS, i never use OLD",
        "please NEW this time, last time it was OLD", "do it AS, forget OLD",
    ),
    "test": (
        "this shows OLD, do you sell it AS?", "can i get NEW rather than OLD", "OLD was a gift, now we are after NEW",
        "exchange OLD for NEW", "no more OLD, show me NEW", "i do not want OLD but NEW",
        "looking for NEW, this is only OLD", "keep the rest, just NEW where OLD is",
        "NEW, as OLD does not go with my room", "she asked for NEW, you sent OLD",
    ),
}  # fmt: skip
CUSTOMERS: dict[Part, Words] = {
    part: {
        mode: [text.replace("NEW", new).replace("AS", as_new).replace("OLD", old) for text in templates]
        for mode, (new, as_new, old) in _SAID.items()
    }
    for part, templates in _TEMPLATES.items()
}


@dataclass(frozen=True)
class Asked:
    """What the query image shows, the words beside it, and the one product that both ask for."""

    source: Looks
    text: str
    wanted: Looks


def ask(
    wanted: Sequence[Looks], words: Words, rng: np.random.Generator, count: int, *, never: frozenset[Pair] = frozenset()
) -> list[Asked]:
    """Queries for products drawn by chance, the modes in turn.

    Args:
        wanted: products that may be asked for.
        words: templates by mode.
        rng: chooses products, images and words.
        count: of queries.
        never: (kind, pattern) pairs that no query image may show, and no words may speak of.
    """
    asked: list[Asked] = []
    modes = tuple(words)
    while len(asked) < count:
        looks = wanted[int(rng.integers(len(wanted)))]
        query = compose_query(looks, modes[len(asked) % len(modes)], rng, wording=words, never=never)
        if query is None:
            continue
        kind, pattern, colour = query.source
        if colour not in COLOUR_NAMES and "{c}" in query.text:
            continue  # a natural fur has no colour to name
        text = query.text
        for mark in ("{k}", "{p}", "{c}"):
            text = text.replace(mark, mark.upper())
        asked.append(Asked(query.source, fill(text, rng, kind=kind, pattern=pattern, colour=colour), looks))
    return asked


class Drawn:
    """Images in a folder, each drawn once: a later run with the same folder draws none.

    Args:
        folder: made if it is not there.
        on_its_side: turned by a quarter, as by a camera that lies on its side.
    """

    def __init__(self, folder: Path, *, on_its_side: bool = False) -> None:
        self.folder, self.on_its_side = folder, on_its_side
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
            if self.on_its_side:
                drawn = drawn.transpose(Image.Transpose.ROTATE_90)
            drawn.save(paths[place], quality=92)

        missing = [place for place, path in enumerate(paths) if not path.exists()]
        missing.sort(key=lambda place: PATTERNS.index(looks[place].pattern))  # each pattern map is drawn once
        with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
            list(pool.map(draw, missing))
        return paths
