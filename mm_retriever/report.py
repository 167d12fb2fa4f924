"""Results that a person looks at: one self-contained HTML page, or a PNG figure.

The page needs no script and asks nobody for anything: its style is inline and pinned by hash in a strict content
security policy, its pictures are small JPEGs inside it. Every word on it may come from a stranger (a file name, a
sidecar, a model that read a picture), so everything is escaped. Knows nothing of models, stores or LlamaIndex.
"""

from __future__ import annotations

import base64
import hashlib
import io
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from PIL import Image

from mm_retriever.errors import ImageLoadError, one_line
from mm_retriever.files import write_atomically
from mm_retriever.images import DEFAULT_POLICY, ImagePolicy, ImageSource, opened_image, source_name, thumbnail_data_uri
from mm_retriever.images.sheet import CELL, before_after, contact_sheet, with_text

THUMBNAIL = 320  # pixels
_LARGEST_VIEW = 4 * CELL
MAX_PAGE_BYTES = 32 * 2**20


@dataclass(frozen=True)
class Hit:
    """One result of a search.

    Args:
        rank: 1 is the best.
        id: tells the hit from others; connects it with its place after reranking.
        score: higher is better; None: not shown.
        path: what is written below the picture (its last part, the whole on hover).
        image: the picture, if it is not at `path`.
        label: what it is, in a word or two.
        note: anything worth a line: the model's reason, why a picture is missing.
    """

    rank: int
    id: str
    score: float | None = None
    path: str = ""
    image: ImageSource | None = None
    label: str = ""
    note: str = ""


@dataclass(frozen=True)
class SearchReport:
    """One search: what was asked, what came back, and how a model ranked it.

    Args:
        query_text: the words of the query.
        query_image: its picture.
        hits: as retrieved, best first.
        reranked: the same hits (or the best of them) after reranking; None: not reranked.
        title: a heading; by default the words of the query.
        caption: what the model says it sees in the query picture.
        reason: why the first of `reranked` is first.
        facts: small print: ("retrieved in", "12 ms"), ("model", "tiny")...
    """

    query_text: str = ""
    query_image: ImageSource | None = None
    hits: tuple[Hit, ...] = ()
    reranked: tuple[Hit, ...] | None = None
    title: str = ""
    caption: str = ""
    reason: str = ""
    facts: tuple[tuple[str, str], ...] = ()


def write_html(
    path: str | os.PathLike[str],
    reports: SearchReport | Iterable[SearchReport],
    *,
    title: str = "Search results",
    subtitle: str = "",
    thumbnail: int = THUMBNAIL,
    max_bytes: int = MAX_PAGE_BYTES,
    image_policy: ImagePolicy = DEFAULT_POLICY,
) -> Path:
    """Write one page with every search on it, and return its path. An existing file is replaced in one step.

    Args:
        path: folders above it are made.
        reports: one search or several.
        title: heading of the page.
        subtitle: a line below it.
        thumbnail: longest side of the pictures in pixels.
        max_bytes: once so many bytes of pictures are on the page, further ones are left out and say so.
        image_policy: what may be read.
    """
    reports = [reports] if isinstance(reports, SearchReport) else list(reports)
    page = _Page(thumbnail, max_bytes, image_policy)
    sections = "\n".join(page.section(report) for report in reports)
    return _write(Path(path), _document(title, subtitle, sections).encode())


def write_png(
    path: str | os.PathLike[str], report: SearchReport, *, image_policy: ImagePolicy = DEFAULT_POLICY
) -> Path:
    """Write one search as a figure, a contact sheet or before and after reranking, and return its path.

    One without hits and without a query image says that nothing was found.
    """
    query = None if report.query_image is None else _load(report.query_image, image_policy)[0]
    pictures = [_load(_source(hit), image_policy)[0] for hit in report.hits]
    title = one_line(": ".join(text for text in (report.title, report.query_text) if text))
    places = {hit.id: position for position, hit in enumerate(report.hits)}
    order = [places[hit.id] for hit in report.reranked or () if hit.id in places]
    if order:
        figure = before_after(pictures, order, query, title=title, caption=report.caption, reason=report.reason)
    else:
        facts = (
            ("What it sees", report.caption),
            ("Why", report.reason),
            ("Result", "" if pictures else "nothing found"),
        )
        below = [(name, text) for name, text in facts if text]
        sheet = (
            contact_sheet(pictures, query) if pictures or query else Image.new("RGB", (3 * CELL, CELL // 3), "white")
        )
        figure = with_text(sheet, above=title, below=below)
    out = io.BytesIO()
    figure.save(out, "PNG")
    return _write(Path(path), out.getvalue())


def _write(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_atomically(path, data)


def _fitting(size: tuple[int, int]) -> tuple[int, int]:
    scale = _LARGEST_VIEW / max(size)
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def _source(hit: Hit) -> ImageSource:
    return hit.path if hit.image is None else hit.image


def _load(source: ImageSource, policy: ImagePolicy) -> tuple[Image.Image | None, str]:
    """The picture, or None and the reason in a line."""
    try:
        with opened_image(source, policy=policy) as image:
            small = image.copy() if max(image.size) <= _LARGEST_VIEW else image
            if small is image:  # hundreds of large images would not fit into memory
                small = image.resize(_fitting(image.size), Image.Resampling.LANCZOS, reducing_gap=2.0)
            return small, ""
    except ImageLoadError as error:
        return None, str(error)


# ---------------------------------------------------------------------------------------------- HTML


def _text(text: str) -> str:
    """Text for HTML, inside an element or a quoted attribute."""
    return escape(one_line(text), quote=True)


def _element(name: str, text: str) -> str:
    """An element around text of unknown origin, kept apart from the writing direction round it; "" for no text."""
    return f"<{name}><bdi>{_text(text)}</bdi></{name}>" if text.strip() else ""


class _Page:
    """Sections of one page, which share its budget of bytes for pictures."""

    def __init__(self, thumbnail: int, max_bytes: int, policy: ImagePolicy) -> None:
        self.thumbnail, self.left, self.policy = thumbnail, max_bytes, policy
        self.known: dict[str | int, tuple[str, str]] = {}

    def section(self, report: SearchReport) -> str:
        heading = report.title or report.query_text or "Search by picture"
        query = "" if report.query_image is None else self.picture(report.query_image, "query picture")
        query += _element("blockquote", report.query_text)
        if report.reranked is None:
            answers = self.grid(report.hits)
        else:
            before = {hit.id: hit.rank for hit in report.hits}
            sides = self.grid(report.hits, "Retrieved"), self.grid(report.reranked, "Reranked", before)
            answers = f'<div class="sides"><div>{sides[0]}</div><div>{sides[1]}</div></div>'
        answers += _names_and_texts("words", [("What it sees", report.caption), ("Why the first", report.reason)])
        return (
            f"<section><h2><bdi>{_text(heading)}</bdi></h2>"
            f'<div class="search"><aside>{query}</aside><div>{answers}</div></div>'
            f"{_names_and_texts('facts', report.facts)}</section>"
        )

    def grid(self, hits: Sequence[Hit], heading: str = "", before: dict[str, int] | None = None) -> str:
        cards = "".join(self.card(hit, before) for hit in hits)
        return _element("h3", heading) + (f"<ol>{cards}</ol>" if cards else '<p class="none">Nothing found.</p>')

    def card(self, hit: Hit, before: dict[str, int] | None) -> str:
        name = os.path.basename(hit.path) or hit.path  # noqa: PTH119 - a name to show, not a file to touch
        score = "" if hit.score is None else f'<span class="score">{hit.score:.3f}</span>'
        return (
            f'<li><div class="top"><span class="rank">{int(hit.rank)}</span>{_move(hit, before)}{score}</div>'
            f"{self.picture(_source(hit), hit.label or name or 'result')}"
            f"{_element('strong', hit.label)}"
            f'<span class="path" title="{_text(hit.path)}"><bdi>{_text(name)}</bdi></span>'
            f"{_element('p', hit.note)}</li>"
        )

    def picture(self, source: ImageSource, alternative: str) -> str:
        uri, reason = self.thumbnail_uri(source)
        if not uri:
            return f'<div class="picture gone" title="{_text(reason)}">picture missing</div>'
        if len(uri) > self.left:
            return f'<div class="picture gone" title="{_text(source_name(source))}">left out: the page is full</div>'
        self.left -= len(uri)
        return f'<div class="picture"><img alt="{_text(alternative)}" src="{uri}"></div>'

    def thumbnail_uri(self, source: ImageSource) -> tuple[str, str]:
        """The picture as a data URI, or "" and the reason; read once although it is shown before and after."""
        key = os.fspath(source) if isinstance(source, str | os.PathLike) else id(source)
        if key not in self.known:
            image, reason = _load(source, self.policy)
            self.known[key] = ("" if image is None else thumbnail_data_uri(image, self.thumbnail)), reason
        return self.known[key]


def _names_and_texts(kind: str, pairs: Iterable[tuple[str, str]]) -> str:
    rows = "".join(f"<dt>{_text(name)}</dt>{_element('dd', text)}" for name, text in pairs if text.strip())
    return f'<dl class="{kind}">{rows}</dl>' if rows else ""


def _move(hit: Hit, before: dict[str, int] | None) -> str:
    """How far a hit went up or down in reranking."""
    if before is None or hit.id not in before:
        return ""
    steps = before[hit.id] - hit.rank
    kind, sign = ("up", "▲") if steps > 0 else ("down", "▼") if steps < 0 else ("same", "=")
    return f'<span class="{kind}" title="was number {before[hit.id]}">{sign}{abs(steps) or ""}</span>'


_STYLE = """
:root { color-scheme: light dark; --paper: #fafafa; --card: #fff; --ink: #18181b; --faint: #71717a; --line: #e4e4e7;
  --well: #f4f4f5; --red: #d00000; --blue: #003cff; --up: #15803d; --down: #b45309; }
@media (prefers-color-scheme: dark) { :root { --paper: #111113; --card: #1c1c1f; --ink: #ededf0; --faint: #a1a1aa;
  --line: #2e2e33; --well: #27272b; --red: #ff6b6b; --blue: #6d8dff; --up: #4ade80; --down: #fbbf24; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1400px; padding: 2rem 1.5rem 4rem; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; overflow-wrap: anywhere; }
h1 { margin: 0; font-size: 1.7rem; letter-spacing: -0.02em; }
header p { margin: 0.2rem 0 0; color: var(--faint); }
section { margin-top: 2.2rem; padding-top: 1.4rem; border-top: 1px solid var(--line); }
h2 { margin: 0 0 1rem; font-size: 1.2rem; }
h3 { margin: 1.4rem 0 0.6rem; font-size: 0.8rem; font-weight: 600; letter-spacing: 0.06em; text-transform: uppercase;
  color: var(--faint); }
.sides { display: grid; grid-template-columns: 1fr 1fr; gap: 1.8rem; }
.sides h3 { margin-top: 0; }
.search { display: grid; grid-template-columns: 210px 1fr; gap: 1.6rem; align-items: start; }
aside { position: sticky; top: 1rem; }
aside .picture { border: 4px solid var(--blue); }
blockquote { margin: 0.8rem 0 0; padding: 0; font-size: 1.05rem; font-weight: 600; }
blockquote::before { content: "\\201c"; color: var(--faint); }
blockquote::after { content: "\\201d"; color: var(--faint); }
ol { display: grid; grid-template-columns: repeat(auto-fill, minmax(140px, 1fr)); gap: 0.8rem; margin: 0; padding: 0;
  list-style: none; }
li { min-width: 0; }
ol > li { display: flex; flex-direction: column; gap: 0.15rem; padding: 0.55rem; background: var(--card);
  border: 1px solid var(--line); border-radius: 10px; }
.top { display: flex; gap: 0.5rem; align-items: baseline; padding: 0 0.15rem 0.25rem; }
.rank { font-size: 1.15rem; font-weight: 700; color: var(--red); }
.up { color: var(--up); } .down { color: var(--down); } .same { color: var(--faint); }
.up, .down, .same { font-size: 0.8rem; font-weight: 600; }
.score { margin-left: auto; font-size: 0.85rem; font-variant-numeric: tabular-nums; color: var(--faint); }
.picture { position: relative; display: grid; place-items: center; aspect-ratio: 1; overflow: hidden;
  background: var(--well); border-radius: 6px; margin-bottom: 0.3rem; }
.picture img { position: absolute; inset: 0; width: 100%; height: 100%; object-fit: contain; }
.gone { color: var(--faint); font-size: 0.85rem; }
.path { font-size: 0.8rem; color: var(--faint); white-space: nowrap; overflow: hidden; text-overflow: ellipsis; }
li p { margin: 0.2rem 0 0; font-size: 0.85rem; }
.words { margin: 1.2rem 0 0; padding: 0.9rem 1.1rem; background: var(--card); border: 1px solid var(--line);
  border-left: 4px solid var(--up); border-radius: 10px; }
.words dt { font-size: 0.8rem; color: var(--faint); } .words dd { margin: 0 0 0.5rem; }
.facts { display: flex; flex-wrap: wrap; gap: 0.2rem 0.4rem; margin: 1rem 0 0; font-size: 0.8rem; color: var(--faint); }
.facts dd { margin: 0 1.2rem 0 0; font-weight: 600; color: var(--ink); }
.none { color: var(--faint); }
@media (max-width: 1000px) { .sides { grid-template-columns: 1fr; } }
@media (max-width: 720px) { .search { grid-template-columns: 1fr; } aside { position: static; max-width: 210px; } }
"""
_STYLE_HASH = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
_SECURITY = f"default-src 'none'; img-src data:; style-src 'sha256-{_STYLE_HASH}'; base-uri 'none'; form-action 'none'"


def _document(title: str, subtitle: str, sections: str) -> str:
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{_SECURITY}">
<meta name="referrer" content="no-referrer">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{_text(title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<header><h1>{_text(title)}</h1>{_element("p", subtitle)}</header>
<main>
{sections}
</main>
</body>
</html>
"""
