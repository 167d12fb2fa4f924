"""What a drawn image shows, and the sentence that says it."""

from __future__ import annotations

from typing import NamedTuple

from mm_retriever.demo.catalogue.colours import NATURAL
from mm_retriever.demo.catalogue.shapes import PRODUCTS

KINDS: tuple[str, ...] = tuple(PRODUCTS)
PATTERN_PHRASES: dict[str, str] = {
    "plaid": "a plaid pattern",
    "checkerboard": "a checkerboard pattern",
    "chevron": "a chevron pattern",
    "leopard": "leopard print",
    "zebra": "zebra stripes",
    "tiger": "tiger stripes",
    "giraffe": "giraffe print",
    "marble": "a marble pattern",
    "watermelon": "a watermelon pattern",
    "bricks": "a brick pattern",
}


class Looks(NamedTuple):
    """What an image shows; `kind` is None for a theme image."""

    kind: str | None
    pattern: str
    colour: str


def with_article(phrase: str) -> str:
    """The phrase after "a" or "an"."""
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def pattern_phrase(pattern: str) -> str:
    """The pattern as it stands after "with"."""
    return PATTERN_PHRASES.get(pattern, pattern)


def caption(looks: Looks) -> str:
    """The one canonical description of an image: "an orange tote bag with hearts"."""
    kind, pattern, colour = looks
    shade = "" if colour == NATURAL else f"{colour} "
    if kind is None:
        what = f"plain {colour}" if pattern == "plain" else f"{shade}{pattern_phrase(pattern).removeprefix('a ')}"
        return f"a picture of {what}"
    if pattern == "plain":
        return f"a plain {shade}{kind}"
    return f"{with_article(shade + kind)} with {pattern_phrase(pattern)}"
