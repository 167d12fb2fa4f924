"""The page in a real browser: Debian's Chromium, driven by Playwright, before the real app."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path

import pytest
from PIL import Image
from web_mm_retriever import web_app

from mm_retriever.embedding import VisualizedBGEEmbedding
from tests.support.browser import SHOTS, expect, in_browser, launched
from tests.support.drawn_store import drawn_store
from tests.support.web import served, violations

pytestmark = in_browser("web page")


@pytest.fixture(scope="module")
def address(folder):
    model = VisualizedBGEEmbedding("tiny", device="cpu")
    with (
        drawn_store(folder, model) as store,
        served(web_app(store, model, thumbnails=folder / "thumbnails")) as address,
    ):
        yield address


@pytest.fixture(scope="module")
def browser():
    with launched() as browser:
        yield browser


@pytest.fixture
def page(browser, address):
    """A fresh page; what it logs as an error, a refused script among them, fails the test."""
    context = browser.new_context(viewport={"width": 1280, "height": 900}, locale="en-GB", accept_downloads=True)
    page = context.new_page()
    complaints = []
    page.on("console", lambda message: message.type == "error" and complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(address)
    expect(page.locator("#about")).to_contain_text("12 images")
    yield page
    context.close()
    assert complaints == []


def names(page) -> list[str]:
    return page.locator(".card .name").all_inner_texts()


def search(page, words: str) -> None:
    page.fill("#text", words)
    page.press("#text", "Enter")
    expect(page.locator(".card")).to_have_count(12)


def drop_file(page, path: Path, *, event: str) -> None:
    """Drop or paste a file as the browser would."""
    page.evaluate(
        """([data, event]) => {
            const bytes = Uint8Array.from(atob(data), (c) => c.charCodeAt(0));
            const transfer = new DataTransfer();
            transfer.items.add(new File([bytes], "leopard.png", { type: "image/png" }));
            const facts = event === "paste" ? { clipboardData: transfer } : { dataTransfer: transfer };
            const kind = event === "paste" ? ClipboardEvent : DragEvent;
            document.body.dispatchEvent(new kind(event, { ...facts, bubbles: true, cancelable: true }));
        }""",
        [base64.b64encode(path.read_bytes()).decode(), event],
    )


def test_words_give_cards_and_the_address_bar_holds_the_query(page, address):
    search(page, "a red mug")
    assert names(page)[0] == "mug"
    assert page.url == f"{address}?q=a+red+mug"
    search(page, "umbrella")
    page.go_back()
    expect(page.locator("#text")).to_have_value("a red mug")
    expect(page.locator(".card .name").first).to_have_text("mug")
    page.reload()
    expect(page.locator(".card .name").first).to_have_text("mug")


@pytest.mark.parametrize("way", ["upload", "drop", "paste"])
def test_an_image_joins_the_words(page, leopard, way):
    page.fill("#text", "phone case with this")
    if way == "upload":
        page.set_input_files("#file", leopard)
    else:
        drop_file(page, leopard, event=way)
    expect(page.locator("#chips img")).to_have_count(1)
    expect(page.locator(".card")).to_have_count(12)
    assert names(page)[0] == "phone case"
    assert "q=phone+case+with+this&i=upload%3A" in page.url
    expect(page.locator("#balance-field")).to_be_visible()
    page.locator("#chips button").click()
    expect(page.locator("#chips li")).to_have_count(0)


def test_the_camera_is_asked_for_on_phones(page):
    assert page.get_attribute("#camera", "capture") == "environment"


def test_the_slider_goes_from_the_image_to_the_words(page, leopard):
    page.fill("#text", "mug")
    page.set_input_files("#file", leopard)
    expect(page.locator("#balance-field")).to_be_visible()
    page.locator("#balance").focus()
    with page.expect_response("**/v1/search"):
        page.press("#balance", "End")
    expect(page).to_have_url(re.compile("b=1"))
    expect(page.locator(".card .name").first).to_have_text("mug")
    scores = [page.locator(".card .score span").first.inner_text()]
    with page.expect_response("**/v1/search"):
        page.press("#balance", "Home")
    expect(page).to_have_url(re.compile("b=0"))
    expect(page.locator(".card .score span").first).not_to_have_text(scores[0])


def test_words_to_avoid_are_a_chip(page):
    search(page, "leopard umbrella and phone case")
    before = names(page).index("umbrella")
    page.fill("#avoid", "umbrella")
    page.press("#avoid", "Enter")
    expect(page.locator("#chips li")).to_contain_text("without umbrella")
    expect(page).to_have_url(re.compile("no=umbrella"))
    expect(page.locator(".card")).to_have_count(12)
    assert names(page).index("umbrella") >= before


def test_similar_and_similar_but(page):
    search(page, "leopard phone case")
    first = page.locator(".card").first
    first.get_by_role("button", name="Similar", exact=True).click()
    expect(page.locator(".card")).to_have_count(11)
    page.locator(".card").first.get_by_role("button", name="Similar but").click()
    page.fill("#ask-text", "in red")
    page.press("#ask-text", "Enter")
    expect(page.locator("#text")).to_have_value("in red")
    expect(page.locator("#chips img")).to_have_count(1)
    page.go_back()
    expect(page.locator("#text")).to_have_value("")


def test_thumbs_move_the_query(page):
    search(page, "mug")
    liked = page.locator(".card").nth(6)
    id_ = liked.get_attribute("data-id")
    liked.get_by_role("button", name="More like this").click()
    expect(page.locator("#chips li")).to_contain_text("more like")
    card = page.locator(f'.card[data-id="{id_}"]')
    expect(card.get_by_role("button", name="More like this")).to_have_attribute("aria-pressed", "true")
    ids = page.locator(".card").evaluate_all("cards => cards.map((card) => card.dataset.id)")
    assert ids.index(id_) < 6
    card.get_by_role("button", name="Less like this").click()
    expect(page.locator("#chips li")).to_contain_text("less like")


def test_facets_narrow_the_results(page):
    search(page, "leopard")
    page.locator("#facets").get_by_role("checkbox", name="mug").check()
    expect(page.locator(".card")).to_have_count(4)
    assert set(names(page)) == {"mug"}
    expect(page.locator("#chips li")).to_contain_text("label in mug")
    page.locator("#chips button").click()
    expect(page.locator(".card")).to_have_count(12)


def test_keys_alone_do_everything(page):
    page.keyboard.press("/")
    expect(page.locator("#text")).to_be_focused()
    page.keyboard.type("umbrella")
    page.keyboard.press("Enter")
    expect(page.locator(".card")).to_have_count(12)
    page.keyboard.press("Escape")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    expect(page.locator(".card .open").nth(1)).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator("#lightbox")).to_be_visible()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Escape")
    expect(page.locator("#lightbox")).to_be_hidden()
    page.keyboard.press("s")
    expect(page.locator("#chips img")).to_have_count(1)


def test_the_lightbox_zooms_and_downloads(page, folder):
    search(page, "mug")
    page.locator(".card .open").first.click()
    expect(page.locator("#light-title")).to_have_text("mug")
    expect(page.locator("#light-facts")).to_contain_text("file_name")
    before = page.locator("#light-image").bounding_box()["width"]
    page.get_by_role("button", name="Larger").click()
    assert page.locator("#light-image").bounding_box()["width"] > before
    with page.expect_download() as downloading:
        page.get_by_role("link", name="Download").click()
    saved = downloading.value
    assert Path(saved.path()).read_bytes() == (folder / "images" / "mug" / saved.suggested_filename).read_bytes()


@pytest.mark.parametrize("way", ["mouse", "keys"])
def test_a_region_of_an_image_becomes_the_query(page, way):
    search(page, "mug")
    page.locator(".card .open").first.click()
    expect(page.locator("#light-image")).to_have_js_property("complete", True)
    page.get_by_role("button", name="Cut out").click()
    expect(page.locator("#region")).to_be_visible()
    if way == "mouse":
        box = page.locator("#light-image").bounding_box()
        page.mouse.move(box["x"] + 20, box["y"] + 20)
        page.mouse.down()
        page.mouse.move(box["x"] + 120, box["y"] + 120, steps=4)
        page.mouse.up()
    else:
        page.keyboard.press("ArrowRight")
        page.keyboard.press("Shift+ArrowDown")
        page.keyboard.press("Enter")
    expect(page.locator("#chips li")).to_contain_text("part of an image")
    expect(page.locator("#lightbox")).to_be_hidden()
    expect(page.locator(".card")).to_have_count(12)


def test_several_images_are_one_query(page, leopard, tmp_path):
    other = tmp_path / "red.png"
    Image.new("RGB", (90, 90), "red").save(other)
    page.set_input_files("#file", [leopard, other])
    expect(page.locator("#chips img")).to_have_count(2)
    expect(page.locator(".card")).to_have_count(12)
    assert page.url.count("i=upload") == 2


@pytest.mark.parametrize("kind", ["csv", "json", "html"])
def test_results_are_exported(page, kind):
    search(page, "mug")
    with page.expect_download() as downloading:
        page.locator(f'[data-export="{kind}"]').click()
    text = Path(downloading.value.path()).read_text(encoding="utf-8")
    assert downloading.value.suggested_filename == f"results.{kind}"
    if kind == "json":
        assert [row["rank"] for row in json.loads(text)["results"]] == list(range(1, 13))
    else:
        assert text.count("phone case") >= 4


def test_the_page_says_that_tiny_knows_no_photographs(page):
    expect(page.locator(".banner")).to_contain_text("drawn products only")


def test_the_page_speaks_german(browser, address):
    page = browser.new_page(locale="de-DE")
    page.goto(address)
    expect(page.locator("h1")).to_have_text("Bildersuche")
    page.fill("#text", "mug")
    page.press("#text", "Enter")
    expect(page.locator("#status")).to_contain_text("Ergebnisse")
    page.close()


def test_an_error_is_said_on_the_page(browser, address):
    page = browser.new_page()
    page.goto(f"{address}?i=upload%3Agone")
    expect(page.locator("#problem")).to_contain_text("no longer here")
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [375, 1280])
def test_nothing_overflows_in_either_theme(browser, address, scheme, width):
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme, locale="en-GB")
    page.goto(f"{address}?q=leopard")
    expect(page.locator(".card")).to_have_count(12)
    page.wait_for_load_state("networkidle")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    if SHOTS:
        page.screenshot(path=f"{SHOTS}/{scheme}-{width}.png")
        page.locator(".card .open").first.click()
        page.wait_for_load_state("networkidle")
        page.screenshot(path=f"{SHOTS}/{scheme}-{width}-lightbox.png")
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("state", ["start", "results", "lightbox", "question"])
def test_axe_finds_no_violation(browser, address, axe, scheme, state):
    context = browser.new_context(color_scheme=scheme, bypass_csp=True, locale="en-GB")
    page = context.new_page()
    page.goto(address if state == "start" else f"{address}?q=leopard&no=fruit")
    if state != "start":
        expect(page.locator(".card")).to_have_count(12)
    if state == "lightbox":
        page.locator(".card .open").first.click()
        expect(page.locator("#light-title")).not_to_be_empty()
    if state == "question":
        page.locator(".card").first.get_by_role("button", name="Similar but").click()
    found = violations(page, axe)
    context.close()
    assert found == []
