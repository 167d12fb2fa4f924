"""Images made of images: the numbered grid that a vision model ranks, and the figure of before and after.

The grid is as published: square cells of 300 pixels, three in a row, a red number in each corner, the query image
with a blue border at the left: 1200 x 900 pixels for nine candidates. Pillow only; knows nothing of models or nodes.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

from PIL import Image, ImageDraw, ImageFont

from mm_retriever.errors import one_line
from mm_retriever.images.loading import load_image, resized

COLUMNS = 3
CELL = 300  # pixels

_PAPER, _INK, _FAINT = "white", (24, 24, 27), (113, 113, 122)
_RED, _BLUE, _GREEN = (220, 0, 0), (0, 60, 255), (22, 140, 70)
_MISSING, _LINE = (228, 228, 231), (212, 212, 216)
_LONGEST_TEXT = 600  # characters

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def contact_sheet(
    candidates: Sequence[Image.Image | None],
    query: Image.Image | None = None,
    *,
    labels: Sequence[str] | None = None,
    columns: int = COLUMNS,
    cell: int = CELL,
) -> Image.Image:
    """Return the grid, row by row, with the query image in a column of its own at the left.

    Args:
        candidates: any number of images; None is drawn as a grey cell that says "missing".
        query: the query image; without one there is no such column.
        labels: what stands in the corners; by default 1, 2, 3...
        columns: cells in a row; fewer candidates than that make a narrower grid.
        cell: side of a cell in pixels. Images are fitted into it, never stretched or cut.

    Raises:
        ValueError: nothing to show, or labels that do not fit the candidates.
    """
    labels = [str(number) for number in range(1, len(candidates) + 1)] if labels is None else labels
    if not candidates and query is None:
        raise ValueError("contact_sheet() needs at least one candidate or a query image")
    if len(labels) != len(candidates):
        raise ValueError(f"{len(labels)} labels for {len(candidates)} candidates")
    if columns < 1 or cell < 24:
        raise ValueError(f"columns={columns!r}, cell={cell!r}: at least 1 column and 24 pixels are needed")
    columns = max(1, min(columns, len(candidates)))
    rows = max(1, -(-len(candidates) // columns))
    left = cell if query is not None else 0
    width = left + (columns * cell if candidates else 0)
    sheet = Image.new("RGB", (width, rows * cell), _PAPER)
    if query is not None:
        frame = _query_frame(query, cell)
        top = (sheet.height - frame.height) // 2
        sheet.paste(frame, ((cell - frame.width) // 2, top))
        if rows > 1:  # there is room above it
            at = (cell // 2, top - cell // 12)
            ImageDraw.Draw(sheet).text(at, "query", fill=_BLUE, font=_font(cell // 10), anchor="mm")
    for position, (candidate, label) in enumerate(zip(candidates, labels, strict=True)):
        row, column = divmod(position, columns)
        sheet.paste(_candidate_cell(candidate, label, cell), (left + column * cell, row * cell))
    return sheet


def before_after(
    candidates: Sequence[Image.Image | None],
    order: Sequence[int],
    query: Image.Image | None = None,
    *,
    title: str = "",
    caption: str = "",
    reason: str = "",
    columns: int = COLUMNS,
    cell: int = 200,
) -> Image.Image:
    """Return two sheets side by side, the candidates as retrieved and as reranked, with the words of the model below.

    Every candidate keeps its number, so that one sees where it went; the winner has a green frame.

    Args:
        candidates: in the order of retrieval; None is drawn as missing.
        order: positions in `candidates`, best first; those left out are not shown on the right.
        query: the query image.
        title: what was asked.
        caption: what the model says it sees in the query image.
        reason: why the first one is first.
        columns: cells in a row.
        cell: side of a cell in pixels.

    Raises:
        ValueError: an order that names a candidate twice, or one that is not there.
    """
    if not order or len(set(order)) != len(order) or not set(order) <= set(range(len(candidates))):
        raise ValueError(f"order={list(order)!r} must name candidates of 0 to {len(candidates) - 1}, each at most once")
    gap = cell // 8
    before = contact_sheet(candidates, query, columns=columns, cell=cell)
    numbers = [str(position + 1) for position in order]
    after = contact_sheet([candidates[position] for position in order], labels=numbers, columns=columns, cell=cell)
    ImageDraw.Draw(after).rectangle((0, 0, cell - 1, cell - 1), outline=_GREEN, width=max(3, cell // 40))
    heading = cell // 5
    size = before.width + gap + after.width, heading + max(before.height, after.height)
    figure = Image.new("RGB", size, _PAPER)
    draw, font = ImageDraw.Draw(figure), _font(cell // 10)
    retrieved_at = cell if query is not None else 0
    for text, left in (("Retrieved", retrieved_at), ("Reranked", before.width + gap)):
        draw.text((left + cell // 30, heading // 2), text, fill=_INK, font=font, anchor="lm")
    figure.paste(before, (0, heading))
    figure.paste(after, (before.width + gap, heading))
    middle = before.width + gap // 2
    draw.line((middle, heading // 2, middle, figure.height - heading // 4), fill=_LINE, width=2)
    below = [("What it sees", caption), ("Why the first", reason)]
    return with_text(figure, above=title, below=[(name, text) for name, text in below if text])


def with_text(image: Image.Image, *, above: str = "", below: Sequence[tuple[str, str]] = ()) -> Image.Image:
    """Return the image on a sheet of paper with a heading above and named paragraphs below it."""
    if not above and not below:
        return image
    large, small = _font(max(18, image.width // 48)), _font(max(14, image.width // 64))
    margin = max(12, image.width // 50)
    width = image.width - 2 * margin
    heading = _wrapped(above, large, width)[:3] if above else []
    paragraphs = [(name, _wrapped(text, small, width)) for name, text in below]
    top = margin + len(heading) * _line_height(large) if heading else 0
    lines = sum(len(text) for _, text in paragraphs)
    bottom = (lines + len(paragraphs)) * _line_height(small) + (len(paragraphs) + 1) * margin // 2 if paragraphs else 0
    sheet = Image.new("RGB", (image.width, top + image.height + bottom), _PAPER)
    sheet.paste(image, (0, top))
    draw = ImageDraw.Draw(sheet)
    for number, line in enumerate(heading):
        draw.text((margin, margin // 2 + number * _line_height(large)), line, fill=_INK, font=large)
    at = top + image.height + margin // 2
    for name, text in paragraphs:
        draw.text((margin, at), name, fill=_FAINT, font=small)
        for line in text:
            at += _line_height(small)
            draw.text((margin, at), line, fill=_INK, font=small)
        at += _line_height(small) + margin // 2
    return sheet


def _query_frame(query: Image.Image, cell: int) -> Image.Image:
    border = max(4, cell // 30)
    inner = _fitted(query, cell - 4 * border)
    frame = Image.new("RGB", (inner.width + 2 * border, inner.height + 2 * border), _BLUE)
    frame.paste(inner, (border, border))
    return frame


def _candidate_cell(candidate: Image.Image | None, label: str, cell: int) -> Image.Image:
    margin = max(2, cell // 50)
    square = Image.new("RGB", (cell, cell), _PAPER)
    draw = ImageDraw.Draw(square)
    if candidate is None:
        draw.rectangle((margin, margin, cell - 1 - margin, cell - 1 - margin), fill=_MISSING)
        draw.text((cell // 2, cell // 2), "missing", fill=_FAINT, font=_font(cell // 10), anchor="mm")
    else:
        image = _fitted(candidate, cell - 2 * margin)
        square.paste(image, ((cell - image.width) // 2, (cell - image.height) // 2))
    draw.rectangle((0, 0, cell - 1, cell - 1), outline=_LINE)
    _draw_number(draw, label, cell)
    return square


def _draw_number(draw: ImageDraw.ImageDraw, label: str, cell: int) -> None:
    """Red on a white tag: it must be legible on any image, for a person as for a model."""
    font = _font(cell // 7)
    pad = cell // 50
    _, top, right, bottom = draw.textbbox((0, 0), label, font=font)
    width, height = right + 2 * pad, bottom - top + 2 * pad
    draw.rectangle((1, 1, width, height), fill=_PAPER)
    draw.text((1 + pad, 1 + pad - top), label, fill=_RED, font=font)


def _fitted(image: Image.Image, side: int) -> Image.Image:
    return resized(load_image(image), side)


@cache
def _font(size: float) -> Font:
    return ImageFont.load_default(size=max(8, int(size)))


def _line_height(font: Font) -> int:
    _, top, _, bottom = font.getbbox("Ågjy")
    return int((bottom - top) * 1.35)


def _wrapped(text: str, font: Font, width: int) -> list[str]:
    """Lines that fit; what is too long for a line is broken, what is too long for the figure is cut."""
    words = one_line(text, _LONGEST_TEXT).split()
    lines: list[str] = []
    line = ""
    while words:
        word = words.pop(0)
        longer = f"{line} {word}".strip()
        if font.getlength(longer) <= width:
            line = longer
        elif line:
            lines.append(line)
            line = ""
            words.insert(0, word)
        else:
            fits = max(1, next((end for end in range(1, len(word)) if font.getlength(word[:end]) > width), 2) - 1)
            lines.append(word[:fits])
            if word[fits:]:
                words.insert(0, word[fits:])
    return [*lines, line] if line else lines
