"""Plain English about products: reasons, and the ways a person may ask for one.

Two sets of wordings: those the bundled models learn from (``"training"``), and others that they never saw
(``"held-out"``), for an honest test. Knows nothing of pixels.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from mm_retriever.demo.catalogue import KINDS, NATURAL, PATTERNS, Looks, caption, colours_of
from mm_retriever.demo.catalogue.captions import PATTERN_PHRASES, pattern_phrase, with_article

Mode = Literal["theme", "kind", "colour", "pattern"]
MODES: tuple[Mode, ...] = ("theme", "kind", "colour", "pattern")
"""How an image and a text make one query: a theme image and the kind of product wanted; a product image and
another kind; the same in another colour; the same with another pattern."""
Wording = Literal["training", "held-out"]


@dataclass(frozen=True)
class ComposedQuery:
    """An image to draw, a text beside it, and what both together ask for."""

    source: Looks
    text: str
    wanted: Looks
    mode: Mode


# ---------------------------------------------------------------------- words

KIND_NAMES: dict[str, tuple[str, ...]] = {
    "phone case": ("phone case", "phone cover", "mobile cover", "smartphone case", "case for my phone"),
    "mug": ("mug", "coffee mug", "cup", "tea mug"),
    "t-shirt": ("t-shirt", "t shirt", "tshirt", "tee", "shirt", "tee shirt"),
    "tote bag": ("tote bag", "tote", "shopping bag", "shopper", "cloth bag"),
    "cushion": ("cushion", "pillow", "throw pillow", "sofa cushion"),
    "sneaker": ("sneaker", "shoe", "trainer", "running shoe", "pair of sneakers"),
    "watch": ("watch", "wristwatch", "wrist watch"),
    "umbrella": ("umbrella", "parasol", "brolly"),
    "notebook": ("notebook", "notepad", "journal", "diary"),
    "cap": ("cap", "baseball cap", "hat"),
    "dress": ("dress", "summer dress", "frock", "gown"),
    "sock": ("sock", "pair of socks", "ankle sock"),
    "backpack": ("backpack", "rucksack", "school bag"),
    "lamp": ("lamp", "table lamp", "bedside lamp", "lampshade"),
    "water bottle": ("water bottle", "bottle", "flask", "drinking bottle"),
    "tie": ("tie", "necktie", "neck tie"),
}
PATTERN_NAMES: dict[str, tuple[str, ...]] = {
    "plain": ("plain", "solid", "no pattern"),
    "polka dots": ("polka dots", "polka dot", "dots", "dotted", "spots"),
    "stripes": ("stripes", "striped", "candy stripes", "straight stripes"),
    "plaid": ("plaid", "tartan", "gingham", "plaid pattern"),
    "checkerboard": ("checkerboard", "chessboard", "checkered", "checkerboard pattern"),
    "chevron": ("chevron", "zigzag", "zig zag", "zigzags", "chevron pattern"),
    "waves": ("waves", "wavy", "wave", "wavy lines"),
    "flowers": ("flowers", "floral", "flower", "blossoms"),
    "stars": ("stars", "star", "starry"),
    "hearts": ("hearts", "heart", "love hearts"),
    "leopard": ("leopard", "leopard print", "leopard spots", "cheetah", "leopard skin"),
    "zebra": ("zebra", "zebra stripes", "zebra print", "zebra skin"),
    "tiger": ("tiger", "tiger stripes", "tiger print", "tiger skin"),
    "giraffe": ("giraffe", "giraffe print", "giraffe patches", "giraffe skin"),
    "camouflage": ("camouflage", "camo", "army print", "military camo"),
    "marble": ("marble", "marbled", "marble stone", "marble pattern"),
    "watermelon": ("watermelon", "melon", "watermelon slice", "watermelon pattern"),
    "bricks": ("bricks", "brick", "brick wall", "brick pattern"),
}
COLOUR_NAMES: dict[str, tuple[str, ...]] = {
    "red": ("red", "crimson", "scarlet"),
    "orange": ("orange", "tangerine"),
    "yellow": ("yellow", "golden"),
    "green": ("green", "emerald"),
    "blue": ("blue", "navy"),
    "purple": ("purple", "violet"),
    "pink": ("pink", "rose"),
    "black": ("black", "dark"),
    "white": ("white", "ivory"),
}
# {K} a kind, {P} a pattern, {C} a colour
_TRAINING: dict[Mode, tuple[str, ...]] = {
    "theme": (
        "{K} with this", "a {K} with this", "a {K} with this pattern", "{K} with this print", "this on a {K}",
        "a {K} like this", "{K} in this style", "i want a {K} that looks like this", "find me a {K} with this design",
        "same pattern on a {K}", "{K}", "a {K}", "turn this into a {K}", "show me a {K} in this pattern",
        "do you have a {K} like this", "{K} that matches this", "put this on a {K}",
        "looking for a {K} with this texture",
        "make a {K} out of this", "{K} with the pattern in this photo", "{K} like the picture", "this as a {K}",
        "a {K} decorated like this please", "i need a {K} with the same look", "{K} in this material and color",
    ),
    "kind": (
        "as a {K}", "this as a {K}", "same pattern on a {K}", "the {K} version", "make it a {K}", "{K} with this",
        "a {K} with this pattern", "the same design but as a {K}", "the same but a {K}", "instead a {K}",
        "i want this on a {K}", "a matching {K}", "not this, a {K}", "like this but a {K}", "a {K} in the same style",
        "this but as a {K}", "show me the {K} with this print", "do you have this as a {K}", "the same look on a {K}",
        "i like the pattern, show me a {K}",
    ),
    "colour": (
        "the same in {C}", "in {C}", "but in {C}", "same thing in {C}", "{C} version", "change the color to {C}",
        "make it {C}", "i like this but in {C}", "{C} please", "the {C} one", "can i get this in {C}", "same but {C}",
        "instead {C}", "do you have it in {C}", "recolor it to {C}", "this in {C}", "the same one but {C}",
        "show me the {C} one", "{C}", "i want it in {C} instead", "the same item with a {C} color",
        "is there a {C} one",
    ),
    "pattern": (
        "but with {P}", "with {P}", "the same with {P}", "the same with {P} instead", "replace the pattern with {P}",
        "swap the print for {P}", "{P} version", "but {P}", "i like this but with {P}", "make it {P}", "the {P} one",
        "change the pattern to {P}", "same item with {P}", "do you have it with {P}", "in {P}", "{P}", "this with {P}",
        "show me the one with {P}", "the same but {P}", "i want it with {P}", "is there one with {P}",
    ),
}  # fmt: skip
_HELD_OUT: dict[Mode, tuple[str, ...]] = {
    "theme": (
        "please search for a {K} featuring the motif above", "could i buy a {K} printed like that one",
        "any {K} wearing these looks?", "gift idea: {K}, same surface as shown",
        "my daughter would love a {K} such as this",
        "{K} please, matching what you see here",
    ),
    "kind": (
        "got the identical print for a {K}?", "we would rather have a {K} of this sort",
        "transfer the motif onto a {K}",
        "{K}, keeping the decoration", "is a {K} sold with that decoration too", "a {K} would be better",
    ),
    "colour": (
        "only {C} though", "my favourite shade is {C}", "could it be dyed {C}?", "swap its colour for {C}",
        "we would rather have a {C} edition", "{C} instead of that",
    ),
    "pattern": (
        "let it show {P}", "covered in {P} rather than that", "could you print {P} there?",
        "keep the product, decorate using {P}",
        "we would rather have {P}", "any edition featuring {P}?",
    ),
}  # fmt: skip
_FULL = (
    "a {C} {P} {K}", "{C} {P} {K}", "a {K} with {C} {P}", "{C} {K} with {P}", "a {C} {K} with {P}",
    "{K} with {P} in {C}",
    "{P} {K} in {C}", "looking for a {C} {P} {K}", "show me a {C} {K} with {P}", "{K}, {C}, {P}",
)  # fmt: skip
_FULL_WITHOUT_COLOUR = (
    "a {P} {K}", "{P} {K}", "a {K} with {P}", "{K} with {P}", "{K} in {P}", "looking for a {P} {K}",
    "show me a {K} with {P}", "a {K} covered in {P}", "do you have a {K} with {P}",
)  # fmt: skip
_FULL_PLAIN = (
    "a {C} {K}", "{C} {K}", "{K} in {C}", "a plain {C} {K}", "{K} in plain {C}", "{C} plain {K}", "solid {C} {K}",
    "show me a {C} {K}", "looking for a {C} {K}",
)  # fmt: skip


def templates(wording: Wording) -> dict[Mode, tuple[str, ...]]:
    """Templates of composed queries, by mode; the two wordings have none in common."""
    return dict(_TRAINING if wording == "training" else _HELD_OUT)


def vocabulary() -> tuple[str, ...]:
    """Every word of the captions, the reasons and the training wordings, lower case and sorted, hyphens split.

    The held-out wordings are left out on purpose.
    """
    texts = [
        text for names in (KIND_NAMES, PATTERN_NAMES, COLOUR_NAMES) for choices in names.values() for text in choices
    ]
    texts += [text for choices in _TRAINING.values() for text in choices]
    texts += [*_FULL, *_FULL_WITHOUT_COLOUR, *_FULL_PLAIN, *PATTERN_PHRASES.values(), *KINDS, *PATTERNS]
    looks = [Looks(kind, pattern, colours_of(pattern)[0]) for kind in KINDS for pattern in PATTERNS]
    texts += [caption(look) for look in looks] + [caption(look._replace(kind=None)) for look in looks]
    texts += [reason(mode, look) for mode in MODES for look in looks if mode != "colour" or can_recolour(look)]
    words: set[str] = set()
    for text in texts:
        for mark in ("{K}", "{P}", "{C}"):
            text = text.replace(mark, " ")
        words.update("".join(letter if letter.isalnum() else " " for letter in text.lower()).split())
    return tuple(sorted(words))


# ---------------------------------------------------------------------- sentences


def reason(mode: Mode, looks: Looks) -> str:
    """Why a product answers a query of this mode: "it is the same tote bag, but with hearts"."""
    kind, pattern, colour = looks
    if kind is None:
        raise ValueError("a theme image is never the answer; give the looks of a product")
    if mode == "colour":
        return f"it is the same {kind}, but {colour}"
    if mode == "pattern":
        return f"it is the same {kind}, but {'plain' if pattern == 'plain' else 'with ' + pattern_phrase(pattern)}"
    what = f"a plain {kind}" if pattern == "plain" else f"{with_article(kind)} with {pattern_phrase(pattern)}"
    return f"it is {what}, like the picture"


# ---------------------------------------------------------------------- queries


def _pick(choices: Sequence[str], rng: np.random.Generator) -> str:
    return choices[int(rng.integers(len(choices)))]


def fill(
    template: str,
    rng: np.random.Generator,
    *,
    kind: str | None = None,
    pattern: str | None = None,
    colour: str | None = None,
) -> str:
    """The template with a name of each thing given, chosen among its synonyms."""
    for mark, thing, names in (
        ("{K}", kind, KIND_NAMES),
        ("{P}", pattern, PATTERN_NAMES),
        ("{C}", colour, COLOUR_NAMES),
    ):
        if thing is not None and mark in template:
            template = template.replace(mark, _pick(names[thing], rng))
    return re.sub(r"\ba (?=[aeiou])", "an ", template)


def full_text(looks: Looks, rng: np.random.Generator, *, with_colour: bool = True) -> str:
    """A text-only query for a product; a natural colour goes without saying."""
    kind, pattern, colour = looks
    if pattern == "plain":
        return fill(_pick(_FULL_PLAIN, rng), rng, kind=kind, colour=colour)
    if colour == NATURAL or not with_colour:
        return fill(_pick(_FULL_WITHOUT_COLOUR, rng), rng, kind=kind, pattern=pattern)
    return fill(_pick(_FULL, rng), rng, kind=kind, pattern=pattern, colour=colour)


def can_recolour(looks: Looks) -> bool:
    """Whether a query can ask for this product by its colour: a natural one has no colour to ask for."""
    return looks.colour != NATURAL


def compose_query(
    wanted: Looks,
    mode: Mode,
    rng: np.random.Generator,
    *,
    wording: Wording | Mapping[Mode, Sequence[str]] = "training",
    never: frozenset[tuple[str, str]] = frozenset(),
) -> ComposedQuery | None:
    """A query whose one right answer is ``wanted``, or None where no image can be its source.

    Args:
        wanted: looks of a product.
        mode: kind of query; ``"colour"`` needs ``can_recolour(wanted)``.
        rng: chooses the source image and the words.
        wording: which set of templates, or templates by mode.
        never: (kind, pattern) pairs that the source image must not show.
    """
    kind, pattern, colour = wanted
    if kind is None:
        raise ValueError("a query asks for a product; give a kind")
    known = templates(wording) if isinstance(wording, str) else wording
    template = _pick(known[mode], rng)
    if mode == "theme":
        return ComposedQuery(Looks(None, pattern, colour), fill(template, rng, kind=kind), wanted, mode)
    if mode == "kind":
        others = [other for other in KINDS if other != kind and (other, pattern) not in never]
        if not others:
            return None
        source = Looks(_pick(tuple(others), rng), pattern, colour)
        return ComposedQuery(source, fill(template, rng, kind=kind), wanted, mode)
    if mode == "colour":
        if not can_recolour(wanted) or (kind, pattern) in never:
            return None
        before = tuple(other for other in colours_of(pattern) if other != colour)
        return ComposedQuery(Looks(kind, pattern, _pick(before, rng)), fill(template, rng, colour=colour), wanted, mode)
    return _pattern_query(wanted, template, rng, never)


def _pattern_query(
    wanted: Looks, template: str, rng: np.random.Generator, never: frozenset[tuple[str, str]]
) -> ComposedQuery | None:
    """The same product with another pattern; the text names the colour wherever the image does not give it."""
    kind, pattern, colour = wanted
    others = tuple(other for other in PATTERNS if other != pattern and (kind, other) not in never)
    if not others:
        return None
    before = _pick(others, rng)
    shades = colours_of(before)
    # "with zebra" alone means the natural zebra, whatever the image's colour
    unsaid = colour == NATURAL or (NATURAL not in colours_of(pattern) and colour in shades and rng.random() < 0.7)
    if unsaid:
        shade = _pick(shades, rng) if colour == NATURAL else colour
        return ComposedQuery(Looks(kind, before, shade), fill(template, rng, pattern=pattern), wanted, "pattern")
    text = fill(template.replace("{P}", "{C} {P}"), rng, pattern=pattern, colour=colour)
    return ComposedQuery(Looks(kind, before, _pick(shades, rng)), text, wanted, "pattern")
