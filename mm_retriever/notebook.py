"""Results, reports and stores as a notebook displays them: HTML without scripts, its images small JPEGs inside it.

Any word may be untrusted (a file name, a sidecar, a model's reason), so the template escapes whatever it prints, and
nothing is fetched. What is more than a cell should hold is counted and said.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from llama_index.core.schema import BaseNode, NodeWithScore

from mm_retriever.errors import ImageLoadError, QueryError, one_line
from mm_retriever.images import DEFAULT_POLICY, ImagePolicy, first_readable, opened_image, thumbnail_data_uri
from mm_retriever.own_keys import own_value
from mm_retriever.request import node_images

if TYPE_CHECKING:
    from jinja2 import Template

SIDE = 160
"""Longest side of an image in pixels."""
MOST_CARDS = 60
MOST_LINES = 20
MAX_BYTES = 4 * 2**20
"""Of all images of a cell."""
_LONGEST = 300  # characters of one text


@dataclass(frozen=True)
class _Card:
    rank: int
    id: str
    score: float | None = None
    place: str = ""
    label: str = ""
    note: str = ""
    image: str = ""  # a data URI
    missing: str = ""  # what is said in its place


@dataclass(frozen=True)
class Shown:
    """What a notebook displays as HTML, and `print` as lines.

    Args:
        title: a line above all.
        facts: names and values.
        lines: notes.
        cards: results with their images.
        side: the longest side of an image.
    """

    title: str = ""
    facts: tuple[tuple[str, str], ...] = ()
    lines: tuple[str, ...] = ()
    cards: tuple[_Card, ...] = field(default=(), repr=False)
    side: int = SIDE

    def _repr_html_(self) -> str:
        return _template().render(
            title=self.title, facts=self.facts, lines=self.lines, cards=self.cards, side=self.side
        )

    def __str__(self) -> str:
        lines = [self.title, *(f"{name}: {fact}" for name, fact in self.facts), *self.lines]
        for card in self.cards:
            score = "" if card.score is None else f"{card.score:.3f} "
            lines.append(f"{card.rank} {score}{card.label} {card.place or card.id}")
        return "\n".join(one_line(line) for line in lines if line)

    __repr__ = __str__


def show(
    nodes: Iterable[NodeWithScore | BaseNode],
    title: str = "",
    *,
    most: int = MOST_CARDS,
    side: int = SIDE,
    image_policy: ImagePolicy = DEFAULT_POLICY,
) -> Shown:
    """Return results with their images, as the last line of a notebook's cell displays them.

    Args:
        nodes: of a retriever, a reranker or a response (`source_nodes`), best first.
        title: a line above them, such as the words of the query.
        most: how many are shown; the others are counted.
        side: the longest side of an image in pixels, 16 to 512.
        image_policy: which images may be read.

    Raises:
        QueryError: a number out of range, or what is no node.
    """
    if not 16 <= side <= 512:
        raise QueryError(f"side {side!r}: give 16 to 512 pixels")
    if most < 1:
        raise QueryError(f"most {most!r}: give 1 or more")
    given = list(nodes)
    left, cards = MAX_BYTES, []
    for rank, item in enumerate(islice(given, most), 1):
        card = _card(rank, item, side, left, image_policy)
        left -= len(card.image)
        cards.append(card)
    lines = [] if given else ["nothing found"]
    lines += [f"and {len(given) - most} more"] if len(given) > most else []
    return Shown(title=title, lines=tuple(lines), cards=tuple(cards), side=side)


def shown_facts(title: str, facts: Mapping[str, object], lines: Sequence[str] = ()) -> str:
    """Return the HTML of a report: facts that are neither 0 nor empty, and its first notes."""
    escaped = tuple((name, one_line(fact, _LONGEST)) for name, fact in facts.items() if fact not in (0, "", None))
    first = tuple(one_line(line, _LONGEST) for line in lines[:MOST_LINES])
    more = (f"and {len(lines) - MOST_LINES} more",) if len(lines) > MOST_LINES else ()
    return Shown(title, escaped, (*first, *more))._repr_html_()


def _card(rank: int, item: NodeWithScore | BaseNode, side: int, left: int, policy: ImagePolicy) -> _Card:
    node, score = (item.node, item.score) if isinstance(item, NodeWithScore) else (item, None)
    if not isinstance(node, BaseNode):
        raise QueryError(f"show takes nodes, as a retriever gives them, and not {type(item).__name__}")
    known = node.metadata
    label = known.get("description") or known.get("label") or ""
    note = known.get("rerank_reason") or known.get("rerank_note") or ""
    images = node_images(node)
    place = str(own_value(known, "file_path") or "") or next(
        (os.fspath(image) for image in images if isinstance(image, str) and image[:5].lower() != "data:"), ""
    )
    image, missing = _thumbnail(node, side, policy) if images else ("", one_line(node.get_content(), _LONGEST))
    if len(image) > left:
        image, missing = "", "left out: the cell is full"
    texts = {"place": place, "label": str(label), "note": str(note)}
    return _Card(
        rank,
        one_line(node.node_id, _LONGEST),
        score=score,
        image=image,
        missing=missing,
        **{name: one_line(text, _LONGEST) for name, text in texts.items()},
    )


def _thumbnail(node: BaseNode, side: int, policy: ImagePolicy) -> tuple[str, str]:
    """The image as a data URI, or "" and why there is none."""

    def small(source: object) -> str:
        with opened_image(source, policy=policy) as image:  # type: ignore[arg-type]
            return thumbnail_data_uri(image, side)

    try:
        return first_readable(node_images(node), small), ""
    except ImageLoadError as error:
        return "", f"image missing: {one_line(error.reason or error, _LONGEST)}"


@cache
def _template() -> Template:
    import jinja2  # which only a notebook needs

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: value if len(str(value)) > 2_000 else one_line(value),  # a data URI is ours
    )
    environment.filters["basename"] = os.path.basename
    return environment.get_template("notebook.html.j2")
