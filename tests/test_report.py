"""The page shows what it was given, asks nobody for anything, and no word on it can become markup."""

from __future__ import annotations

import base64
import hashlib
import io
import os
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from mm_retriever.images import ImagePolicy, load_image
from mm_retriever.report import Hit, SearchReport, write_html, write_png
from tests.support.effort import EFFORT
from tests.support.memory import peak_growth

VOID = {"meta", "img"}
TAGS = {"html", "head", "meta", "title", "style", "body", "header", "main", "section", "aside", "div", "img"} | {
    *("h1", "h2", "h3", "p", "blockquote", "bdi", "span", "strong", "ol", "li", "dl", "dt", "dd"),
}


class Page(HTMLParser):
    """Tags with their attributes in order, all text, and whether every tag is closed."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.problems: list[str] = []
        self.feed(html)
        self.close()
        self.problems += self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.problems.append(f"/{tag}")

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    def handle_comment(self, data: str) -> None:
        self.problems.append(f"comment {data}")

    def unknown_decl(self, data: str) -> None:
        self.problems.append(f"declaration {data}")

    @property
    def shape(self) -> list[tuple[str, tuple[str, ...]]]:
        return [(tag, tuple(attributes)) for tag, attributes in self.tags]

    @property
    def text(self) -> str:
        return "".join(self.words)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("photos")
    paths = []
    for number, colour in enumerate(["teal", "orange", "purple", "olive"]):
        paths.append(folder / f"{colour}.png")
        Image.new("RGB", (40 + number, 30), colour).save(paths[-1])
    return paths


def hits(photos: list[Path]) -> tuple[Hit, ...]:
    return tuple(
        Hit(rank=rank, id=path.stem, score=0.9 - rank / 10, path=str(path), label=f"label {path.stem}")
        for rank, path in enumerate(photos, start=1)
    )


def reranked(photos: list[Path]) -> tuple[Hit, ...]:
    found = hits(photos)
    return tuple(
        Hit(rank=rank, id=found[place].id, path=found[place].path, note=f"note {place}")
        for rank, place in enumerate((2, 0, 3, 1), start=1)
    )


def full_report(photos: list[Path]) -> SearchReport:
    return SearchReport(
        query_text="phone case with this",
        query_image=photos[0],
        hits=hits(photos),
        reranked=reranked(photos),
        title="The example",
        caption="spots on yellow",
        reason="the same spots",
        facts=(("model", "tiny"), ("took", "12 ms")),
    )


def page_of(path: Path) -> Page:
    return Page(path.read_text(encoding="utf-8"))


# ---------------------------------------------------------------------------------------------- what is shown


def test_a_page_shows_query_results_scores_and_words(tmp_path: Path, photos: list[Path]) -> None:
    """Truth: the values given."""
    path = write_html(tmp_path / "a" / "page.html", full_report(photos), title="Demo", subtitle="four images")
    assert path == tmp_path / "a" / "page.html"
    page = page_of(path)
    assert not page.problems
    for word in [
        *("Demo", "four images", "The example", "phone case with this", "Retrieved", "Reranked", "0.800", "0.500"),
        *("label teal", "olive.png", "note 2", "spots on yellow", "the same spots", "tiny", "12 ms"),
    ]:
        assert word in page.text
    assert page.text.index("purple.png") > page.text.index("orange.png")


def test_images_are_inside_the_page_in_order(tmp_path: Path, photos: list[Path]) -> None:
    """Truth: the colours of the files; the query first, then both lists."""
    page = page_of(write_html(tmp_path / "page.html", full_report(photos), thumbnail=20))
    sources = [attributes["src"] for tag, attributes in page.tags if tag == "img"]
    shown = [load_image(source) for source in sources if source]
    assert max(max(image.size) for image in shown) == 20
    colours = [image.getpixel((5, 5)) for image in shown]
    files = [Image.open(path).getpixel((5, 5)) for path in photos]
    expected = [files[place] for place in (0, 0, 1, 2, 3, 2, 0, 3, 1)]
    assert len(colours) == len(expected)
    for colour, wanted in zip(colours, expected, strict=True):
        assert max(abs(a - b) for a, b in zip(colour, wanted, strict=True)) < 10


def test_moves_are_told(tmp_path: Path, photos: list[Path]) -> None:
    """Truth: third to first is up two, first to second down one, fourth to third up one, second to fourth down two."""
    page = page_of(write_html(tmp_path / "page.html", full_report(photos)))
    moves = [
        (attributes["class"], attributes["title"])
        for tag, attributes in page.tags
        if attributes.get("class") in ("up", "down", "same")
    ]
    assert moves == [
        ("up", "was number 3"),
        ("down", "was number 1"),
        ("up", "was number 4"),
        ("down", "was number 2"),
    ]


def test_several_searches_share_a_page(tmp_path: Path, photos: list[Path]) -> None:
    """Truth: one section each; a search by image alone and one without results have their own words."""
    reports = [
        SearchReport("one", None, hits(photos)),
        SearchReport("", photos[0], hits(photos)[:1]),
        SearchReport("three", None, ()),
    ]
    page = page_of(write_html(tmp_path / "page.html", (report for report in reports)))
    assert [tag for tag, _ in page.tags].count("section") == 3
    assert "Search by image" in page.text
    assert "Nothing found." in page.text


def test_an_image_may_come_from_elsewhere_than_its_path(tmp_path: Path) -> None:
    """Truth: PIL images and bytes are sources too."""
    out = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(out, "PNG")
    found = (
        Hit(1, "a", path="/archive/one.jpg", image=Image.new("RGB", (8, 8))),
        Hit(2, "b", path="/archive/two.jpg", image=out.getvalue()),
    )
    page = page_of(write_html(tmp_path / "page.html", SearchReport("x", Image.new("L", (9, 9)), found)))
    assert [tag for tag, _ in page.tags].count("img") == 3
    assert "one.jpg" in page.text


def test_an_image_that_cannot_be_read_is_said_to_be_missing(tmp_path: Path, photos: list[Path]) -> None:
    """Truth: a file that is not there, and one outside the roots."""
    found = (Hit(1, "a", path=str(tmp_path / "gone.png")), Hit(2, "b", path=str(photos[0])))
    report = SearchReport("x", None, found)
    page = page_of(write_html(tmp_path / "page.html", report, image_policy=ImagePolicy(roots=(tmp_path,))))
    assert page.text.count("image missing") == 2
    titles = [attributes["title"] for _, attributes in page.tags if attributes.get("class") == "image gone"]
    assert "no such file" in str(titles[0])
    assert "outside the folders" in str(titles[1])


def test_the_page_stays_within_its_bytes(tmp_path: Path) -> None:
    """Truth: the file's size; what does not fit says so."""
    noise = Image.effect_noise((400, 400), 90).convert("RGB")
    found = tuple(Hit(rank, str(rank), path=f"{rank}.png", image=noise) for rank in range(1, 60))
    path = write_html(tmp_path / "page.html", SearchReport("x", None, found), max_bytes=300_000)
    assert 200_000 < path.stat().st_size < 330_000
    page = page_of(path)
    assert page.text.count("left out: the page is full") == 59 - [tag for tag, _ in page.tags].count("img") > 0


def test_an_existing_page_is_replaced_whole(tmp_path: Path, photos: list[Path]) -> None:
    """Truth: nothing of the old page, and no temporary file stays."""
    path = tmp_path / "page.html"
    path.write_text("old " * 1_000_000)
    write_html(path, SearchReport("x", None, hits(photos)))
    assert path.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert "old" not in page_of(path).text
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_who_may_read_a_page_is_up_to_the_umask(tmp_path: Path, photos: list[Path], umask: int, mode: int) -> None:
    """A page holds thumbnails of private photographs."""
    before = os.umask(umask)
    try:
        write_html(tmp_path / "page.html", SearchReport("x", None, hits(photos)))
    finally:
        os.umask(before)
    assert (tmp_path / "page.html").stat().st_mode & 0o777 == mode


# ---------------------------------------------------------------------------------------------- safety


def test_the_page_asks_nobody_for_anything(tmp_path: Path, photos: list[Path]) -> None:
    """Truth: no script, link, form, frame or address; images only as data."""
    path = write_html(tmp_path / "page.html", full_report(photos))
    page = page_of(path)
    assert {tag for tag, _ in page.tags} <= TAGS
    for tag, attributes in page.tags:
        assert set(attributes) <= {"class", "title", "alt", "src", "lang", "charset", "http-equiv", "content", "name"}
        if tag == "img":
            assert str(attributes["src"]).startswith("data:image/jpeg;base64,")
    html = path.read_text(encoding="utf-8")
    assert not re.search(r"https?:|url\(|@import|javascript:|\bon\w+=|style=", html)


def test_the_security_policy_allows_this_style_and_nothing_else(tmp_path: Path, photos: list[Path]) -> None:
    """Truth: CSP level 3: the SHA-256 of the style element's text, computed here."""
    html = write_html(tmp_path / "page.html", full_report(photos)).read_text(encoding="utf-8")
    style = re.search(r"<style>(.*?)</style>", html, re.DOTALL)
    policy = next(
        str(attributes["content"]) for _, attributes in Page(html).tags if attributes.get("http-equiv") is not None
    )
    assert style is not None
    digest = base64.b64encode(hashlib.sha256(style[1].encode()).digest()).decode()
    assert policy.split("; ") == [
        "default-src 'none'",
        "img-src data:",
        f"style-src 'sha256-{digest}'",
        "base-uri 'none'",
        "form-action 'none'",
    ]
    assert html.index("Content-Security-Policy") < html.index("<style>")


HOSTILE = [
    "<script>alert(1)</script>",
    "</bdi></p></section></main></body></html><script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onmouseover='alert(1)",
    "<!-- --><!--",
    "]]><![CDATA[<b>",
    "</style><script>alert(1)</script>",
    "</title><svg onload=alert(1)>",
    "&lt;script&gt;&amp;&#60;b&#62;&quot;",
    "<?php echo 1 ?>",
    "javascript:alert(1)",
    "\x00<\x00s\x00cript>",
    "<\u200bscript>",
    "a\u202etxt.gpj\u2066b",
    "\ud800\udfff lone surrogates",
    "{{7*7}} ${7*7} <%= 7*7 %>",
    "x" * 10_000,
    "<" * 3_000,
    "日本語 🐆 עברית العربية",
    "line\r\nbreak\u2028more\x85",
]


def hostile_report(text: str, photos: list[Path], *, images: bool = True) -> SearchReport:
    """A report with the text in every field that takes one."""
    image = photos[0] if images else None
    found = (
        Hit(1, text, 0.5, text, photos[1], text, text),
        Hit(2, text + "2", None, f"/{text}/{text}", None, text, text),
    )
    return SearchReport(text, image, found, found[::-1], text, text, text, ((text, text),))


def write_all(folder: Path, text: str, photos: list[Path]) -> Page:
    path = write_html(folder / "page.html", hostile_report(text, photos), title=text, subtitle=text, thumbnail=8)
    return page_of(path)


@pytest.mark.parametrize("text", HOSTILE)
def test_no_text_becomes_markup(tmp_path: Path, photos: list[Path], tried: Counter[str], text: str) -> None:
    """Truth: the tags and attributes of a page are those of the same page with a harmless word."""
    harmless = write_all(tmp_path, "word", photos)
    page = write_all(tmp_path, text, photos)
    tried["hostile texts shown"] += 1
    assert not page.problems
    assert page.shape == harmless.shape


@settings(max_examples=150 * EFFORT, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(alphabet=st.one_of(st.characters(), st.sampled_from("<>&\"'/=!-;#x`\\")), min_size=1))
def test_no_text_at_all_becomes_markup(tmp_path: Path, photos: list[Path], tried: Counter[str], text: str) -> None:
    """Truth: as above, for whatever hypothesis thinks of; every letter that can be shown is shown."""
    text = "w" + text  # a text of blanks alone leaves its element out
    tried["hostile texts shown"] += 1
    harmless = write_all(tmp_path, "word", photos)
    page = write_all(tmp_path, text, photos)
    assert not page.problems
    assert page.shape == harmless.shape
    assert all(letter in page.text for letter in text if letter.isprintable())


def test_text_cannot_turn_the_page_round(tmp_path: Path, photos: list[Path]) -> None:
    """Truth: Unicode's direction overrides make gpj.exe of exe.jpg; control characters have no place in HTML."""
    html = write_html(tmp_path / "page.html", hostile_report("".join(HOSTILE), photos)).read_text(encoding="utf-8")
    assert not re.search("[\u202a-\u202e\u2066-\u2069\x00-\x08\x0b-\x1f\x7f-\x9f]", html)


def test_endless_text_is_cut(tmp_path: Path, photos: list[Path]) -> None:
    """Truth: 2,000 characters of each text."""
    report = SearchReport("x" * 5_000_000, None, (Hit(1, "a", path=str(photos[0]), note="y" * 5_000_000),))
    assert write_html(tmp_path / "page.html", report).stat().st_size < 40_000


def test_a_rank_and_a_score_are_numbers(tmp_path: Path, photos: list[Path]) -> None:
    """Truth: what is no number cannot be smuggled in as one."""
    for hit in (Hit("<b>", "a"), Hit(1, "a", score="<b>")):  # type: ignore[arg-type]
        with pytest.raises((ValueError, TypeError)):
            write_html(tmp_path / "page.html", SearchReport("x", None, (hit,)))
    assert not list(tmp_path.iterdir())
    page = page_of(write_html(tmp_path / "page.html", SearchReport("x", None, (Hit(1, "a", score=float("nan")),))))
    assert "nan" in page.text


# ---------------------------------------------------------------------------------------------- PNG


def test_a_search_is_written_as_a_contact_sheet(tmp_path: Path, photos: list[Path]) -> None:
    """Truth: four cells in two rows of three, a query column, and a line of heading."""
    path = write_png(tmp_path / "b" / "sheet.png", SearchReport("", photos[0], hits(photos)))
    with Image.open(path) as sheet:
        assert (sheet.format, sheet.size) == ("PNG", (1200, 600))
    path = write_png(tmp_path / "titled.png", SearchReport("phone case", photos[0], hits(photos)))
    with Image.open(path) as sheet:
        assert sheet.width == 1200
        assert 620 < sheet.height < 700


def test_a_reranked_search_is_written_as_before_and_after(tmp_path: Path, photos: list[Path]) -> None:
    """Truth: wider than one sheet and higher by the model's words."""
    with Image.open(write_png(tmp_path / "figure.png", full_report(photos))) as figure:
        assert figure.width == 200 + 600 + 25 + 600
        assert figure.height > 40 + 400 + 60


@pytest.mark.parametrize("text", HOSTILE)
def test_no_text_breaks_the_figure(tmp_path: Path, photos: list[Path], text: str) -> None:
    """Truth: the figure is written whatever a model said."""
    with Image.open(write_png(tmp_path / "figure.png", hostile_report(text, photos))) as figure:
        assert figure.height < 2_000


def test_a_figure_shows_missing_images_as_missing(tmp_path: Path, photos: list[Path]) -> None:
    """Truth: grey where the image would be."""
    found = (Hit(1, "a", path="gone.png"), *hits(photos)[1:])
    with Image.open(write_png(tmp_path / "sheet.png", SearchReport("", None, found))) as sheet:
        assert len(set(sheet.getpixel((20, 200)))) <= 2


def test_a_figure_of_nothing_says_so(tmp_path: Path) -> None:
    """Truth: a search without hits is an answer, and whoever asked for a figure of it gets one."""
    with Image.open(write_png(tmp_path / "sheet.png", SearchReport("words"))) as sheet:
        assert sheet.convert("L").getextrema()[0] < 100  # there is something to read


@pytest.mark.slow
def test_a_figure_does_not_hold_its_images_whole(tmp_path: Path) -> None:
    """Truth: twenty images of 16 megapixels take 1.3 GB at once; Pillow's own count of what it holds."""
    Image.new("RGB", (4_000, 4_000), "teal").save(tmp_path / "large.jpg")
    found = tuple(Hit(rank, str(rank), path=str(tmp_path / "large.jpg")) for rank in range(1, 21))
    with peak_growth() as mib:
        write_png(tmp_path / "sheet.png", SearchReport("", None, found))
    assert mib() < 400
