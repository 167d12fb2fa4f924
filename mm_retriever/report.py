"""Results that a person looks at: one self-contained HTML page, or a PNG figure.

The page needs no script and asks nobody for anything: its style is inline and pinned by hash in a strict content
security policy, its images are small JPEGs inside it. Any word on it may be untrusted (a file name, a sidecar, what a
model read in an image), so the template escapes whatever it prints. Knows nothing of models, stores or LlamaIndex.
"""

from __future__ import annotations

import base64
import hashlib
import io
import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from mm_retriever.errors import ImageLoadError, one_line
from mm_retriever.files import write_atomically
from mm_retriever.images import DEFAULT_POLICY, ImagePolicy, ImageSource, opened_image, source_name, thumbnail_data_uri
from mm_retriever.images.loading import resized
from mm_retriever.images.sheet import CELL, before_after, contact_sheet, with_text

if TYPE_CHECKING:
    from jinja2 import Environment

THUMBNAIL = 320  # pixels
_LARGEST_VIEW = 4 * CELL
MAX_PAGE_BYTES = 32 * 2**20
_FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Hit:
    """One result of a search.

    Args:
        rank: 1 is the best.
        id: tells the hit from others; connects it with its place after reranking.
        score: higher is better; None: not shown.
        path: what is written below the image (its last part, the whole on hover).
        image: the image, if it is not at `path`.
        label: what it is, in a word or two.
        note: anything worth a line: the model's reason, why an image is missing.
    """

    rank: int
    id: str
    score: float | None = None
    path: str = ""
    image: ImageSource | None = None
    label: str = ""
    note: str = ""

    @property
    def source(self) -> ImageSource:
        """Where the image is read from."""
        return self.path if self.image is None else self.image


@dataclass(frozen=True)
class SearchReport:
    """One search: what was asked, what came back, and how a model ranked it.

    Args:
        query_text: the words of the query.
        query_image: its image.
        hits: as retrieved, best first.
        reranked: the same hits (or the best of them) after reranking; None: not reranked.
        title: a heading; by default the words of the query.
        caption: what the model says it sees in the query image.
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

    @property
    def ranks(self) -> dict[str, int]:
        """The ranks as retrieved, by the ids of the hits."""
        return {hit.id: hit.rank for hit in self.hits}


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
        thumbnail: longest side of the images in pixels.
        max_bytes: once so many bytes of images are on the page, further ones are left out and say so.
        image_policy: what may be read.
    """
    reports = [reports] if isinstance(reports, SearchReport) else list(reports)
    thumbnails = Thumbnails(thumbnail, max_bytes, image_policy)
    page = render_page("report.html.j2", thumbnails, title=title, subtitle=subtitle, reports=reports)
    return write_page(Path(path), page)


def write_png(
    path: str | os.PathLike[str], report: SearchReport, *, image_policy: ImagePolicy = DEFAULT_POLICY
) -> Path:
    """Write one search as a figure, a contact sheet or before and after reranking, and return its path.

    One without hits and without a query image says that nothing was found.
    """
    query = None if report.query_image is None else _load(report.query_image, image_policy)[0]
    images = [_load(hit.source, image_policy)[0] for hit in report.hits]
    title = one_line(": ".join(text for text in (report.title, report.query_text) if text))
    places = {hit.id: position for position, hit in enumerate(report.hits)}
    order = [places[hit.id] for hit in report.reranked or () if hit.id in places]
    if order:
        figure = before_after(images, order, query, title=title, caption=report.caption, reason=report.reason)
    else:
        facts = (
            ("What it sees", report.caption),
            ("Why", report.reason),
            ("Result", "" if images else "nothing found"),
        )
        below = [(name, text) for name, text in facts if text]
        sheet = contact_sheet(images, query) if images or query else Image.new("RGB", (3 * CELL, CELL // 3), "white")
        figure = with_text(sheet, above=title, below=below)
    out = io.BytesIO()
    figure.save(out, "PNG")
    return _write(Path(path), out.getvalue())


def write_page(path: Path, page: str) -> Path:
    """Write a page in one step, and return its path; folders above it are made."""
    return _write(path, page.encode())


def _write(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_atomically(path, data)


def _load(source: ImageSource, policy: ImagePolicy) -> tuple[Image.Image | None, str]:
    """The image, or None and the reason in a line."""
    try:
        with opened_image(source, policy=policy) as image:
            if max(image.size) <= _LARGEST_VIEW:
                return image.copy(), ""
            # hundreds of large images would not fit into memory
            return resized(image, _LARGEST_VIEW), ""
    except ImageLoadError as error:
        return None, str(error)


class Thumbnails:
    """Images of one page as data URIs, up to a number of bytes; each is read once, wherever it is shown."""

    def __init__(
        self, side: int = THUMBNAIL, max_bytes: int = MAX_PAGE_BYTES, policy: ImagePolicy = DEFAULT_POLICY
    ) -> None:
        self._side, self._left, self._policy = side, max_bytes, policy
        self._known: dict[str | int, tuple[str, str]] = {}

    def __call__(self, source: ImageSource) -> tuple[str, str, str]:
        """Return a data URI, or "", what to say instead, and the reason."""
        key = os.fspath(source) if isinstance(source, str | os.PathLike) else id(source)
        if key not in self._known:
            image, reason = _load(source, self._policy)
            self._known[key] = ("" if image is None else thumbnail_data_uri(image, self._side)), reason
        uri, reason = self._known[key]
        if not uri:
            return "", "image missing", reason
        if len(uri) > self._left:
            return "", "left out: the page is full", source_name(source)
        self._left -= len(uri)
        return uri, "", ""


@cache
def _environment() -> Environment:
    import jinja2  # which a search that only prints does not need
    from markupsafe import Markup

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_FOLDER),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: value if isinstance(value, Markup) else one_line(value),
    )
    environment.filters["basename"] = os.path.basename
    return environment


def render_page(template: str, thumbnail: Thumbnails, *, title: str, subtitle: str, **values: Any) -> str:
    """Return a page with our style, which asks nobody for anything.

    Args:
        template: a file beside this module.
        thumbnail: its images.
        title: heading of the page.
        subtitle: a line below it.
        values: what else the template shows; it escapes all of it.
    """
    style = (_FOLDER / "report.css").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    security = f"default-src 'none'; img-src data:; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    page = {"title": title, "subtitle": subtitle, "thumbnail": thumbnail, "style": style, "security": security}
    return _environment().get_template(template).render(**page, **values)
