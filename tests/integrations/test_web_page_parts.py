"""Ranking on demand, ratings, indexing and the rest of the page in a real browser, before the real app.

One server has three apps: `many` over 46 images with an index of words, a reranker, ratings and a folder to index;
`locked` that wants a token.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from types import SimpleNamespace

import pytest
from PIL import Image
from starlette.applications import Starlette
from starlette.routing import Mount
from web_mm_retriever import web_app
from web_mm_retriever.admission import Access
from web_mm_retriever.serving import listen_on
from web_mm_retriever.waiting import waiting_page

from mm_retriever.embedding import VisualizedBGEEmbedding
from mm_retriever.ingest import ingest_images
from mm_retriever.store import open_store
from tests.support.browser import SHOTS, expect, in_browser, launched
from tests.support.drawn_store import draw_images
from tests.support.held_reranker import HeldRerank
from tests.support.web import TOKEN, HeldModel, served, violations

pytestmark = in_browser("parts of the web page")


def draw_many(folder):
    """Twelve products, 34 squares of different colours, and two copies of one of them; one has a caption."""
    draw_images(folder)
    for number in range(34):
        Image.new("RGB", (48, 48), (7 * number, 250 - 7 * number, 90)).save(folder / f"square {number:02}.png")
    for copy in ("copy a.png", "copy b.png"):
        shutil.copy(folder / "square 00.png", folder / copy)
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "square 07.png", "caption": "zebra crossing"}))
    return folder


def draft_queries(folder):
    """Three drafts about the products, as `evaluate --make` writes them."""
    names = [path.relative_to(folder).as_posix() for path in sorted((folder / "images").rglob("*.jpg"))]
    lines = [
        {"image": names[n], "text": f"draft {n}", "targets": [names[n + 1]], "note": "drafted by m; not reviewed"}
        for n in range(3)
    ]
    (folder / "drafts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / "drafts.jsonl"


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    model, held = VisualizedBGEEmbedding("tiny", device="cpu"), HeldModel("tiny", device="cpu")
    images = draw_many(folder / "images")
    draw_images(folder / "inbox" / "spring")
    (folder / "inbox" / "spring" / "notes.txt").write_text("no image")
    (folder / "inbox" / "spring" / "broken.jpg").write_bytes(b"nothing")
    reranker = HeldRerank(top_n=50)
    opened = folder / "opened"
    program = folder / "bin" / "xdg-open"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nprintf %s "$1" > "{opened}.part" && mv "{opened}.part" "{opened}"\n')
    program.chmod(0o755)
    screen = pytest.MonkeyPatch()
    screen.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    screen.setenv("DISPLAY", ":99")
    with open_store(folder / "many.db", model, hybrid=True) as store, open_store(folder / "new.db", held) as new:
        ingest_images(images, store, model, show_progress=False)
        options = {"thumbnails": folder / "thumbnails"}
        many = web_app(store, model, rerank=reranker, ratings=folder / "many.queries.jsonl", allow_urls=True, **options)
        first = web_app(store, model, rerank=reranker, **options)
        fresh = web_app(new, held, index_roots=[folder / "inbox"], **options)
        locked = web_app(store, model, token=TOKEN, **options)
        drafts = web_app(store, model, review=draft_queries(folder), **options)
        apps = {"/many": many, "/first": first, "/fresh": fresh, "/locked": locked, "/drafts": drafts}
        with served(Starlette(routes=[Mount(path, app) for path, app in apps.items()])) as address:
            yield SimpleNamespace(
                address=address,
                folder=folder,
                images=images,
                reranker=reranker,
                held=held,
                new=new,
                opened=opened,
                another=lambda: web_app(store, model, **options),
            )
        held.released.set()
        fresh.close()
    screen.undo()


@pytest.fixture(scope="module")
def browser():
    with launched() as browser:
        yield browser


@pytest.fixture
def visit(browser, site):
    """Opens pages; what they log as an error fails the test, but for requests that a test expects to be refused."""
    contexts, complaints = [], []

    def open_page(path, *, refused=(), holds=None, until="load", **options):
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, "locale": "en-GB", **options})
        contexts.append(context)
        page = context.new_page()
        page.on(
            "console",
            lambda message: (
                message.type == "error"
                and not any(str(status) in message.text for status in refused)
                and complaints.append(message.text)
            ),
        )
        page.on("pageerror", lambda error: complaints.append(str(error)))
        if holds is not None:
            address, held = holds
            page.route(address, lambda route: held.append(route))
        page.goto(site.address + path, wait_until=until)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []


def ids(page) -> list[str]:
    return page.locator(".card").evaluate_all("cards => cards.map((card) => card.dataset.id)")


def found(visit, query: str, app: str = "many", **options):
    page = visit(f"{app}/?{query}", **options)
    expect(page.locator(".card").nth(9)).to_be_visible()
    return page


# ------------------------------------------------------------------------------------------ ranking on demand


def test_the_best_are_ranked_when_somebody_asks_for_it(visit, site):
    """Before its first ranking the page says that nobody knows how long it takes; after it, how long."""
    site.reranker.released.clear()
    page = found(visit, "q=mug", app="first")
    before = ids(page)
    expect(page.locator("#rerank")).to_have_text("Rank the best 9 by held (how long it takes is not known yet)")
    page.locator("#rerank").click()
    expect(page.locator("#rank-status")).to_contain_text("how long it takes is not known yet")
    expect(page.locator("#rank-progress")).to_be_visible()
    site.reranker.released.set()
    expect(page.locator("#status")).to_contain_text("The best 9 ranked by held in")
    assert ids(page)[:9] == before[:9][::-1]
    assert ids(page)[9:] == before[9:]
    first = page.locator(".card").first
    expect(first.locator(".reason")).to_have_text("reason 9")
    expect(first.locator(".moved")).to_contain_text("was number 9")
    expect(page.locator("#ranking")).to_be_hidden()
    expect(page.locator("#rerank")).to_have_text(re.compile(r"\(about [\d.]+ s\)"))


def test_a_ranking_is_stopped_and_the_order_stays(visit, site):
    for event in (site.reranker.released, site.reranker.began, site.reranker.ended):
        event.clear()
    page = found(visit, "q=umbrella")
    before = ids(page)
    page.locator("#rerank").click()
    expect(page.locator("#rank-stop")).to_be_focused()
    assert site.reranker.began.wait(60), "a request stopped before it is sent never reaches the model"
    page.locator("#rank-stop").click()
    expect(page.locator("#status")).to_have_text("Stopped. The order stays as it was.")
    assert site.reranker.ended.wait(60), "the model stops too, though nobody released it"
    assert ids(page) == before


def test_a_model_that_fails_leaves_the_order_and_says_so(visit, site):
    site.reranker.released.set()
    site.reranker.fails = True
    try:
        page = found(visit, "q=umbrella")
        before = ids(page)
        page.locator("#rerank").click()
        expect(page.locator("#problem")).to_contain_text("The order stays as it was")
        expect(page.locator("#problem")).to_contain_text("out of memory")
        assert ids(page) == before
    finally:
        site.reranker.fails = False


def test_without_a_model_nobody_is_offered_a_ranking(visit):
    page = visit("locked/", refused=[401])
    page.fill("#token", TOKEN)
    page.press("#token", "Enter")
    page.fill("#text", "mug")
    page.press("#text", "Enter")
    expect(page.locator(".card").nth(9)).to_be_visible()
    expect(page.locator("#rerank")).to_be_hidden()


# ------------------------------------------------------------------------------------------ ratings


def test_thumbs_are_kept_as_an_evaluation_set(visit, site):
    file = site.folder / "many.queries.jsonl"
    page = found(visit, "q=umbrella")
    card = page.locator(".card").first
    path = card.get_attribute("data-id")
    card.get_by_role("button", name="More like this").click()
    expect(page.locator("#rated")).to_contain_text(f"{file}. Queries: 1")
    with page.expect_download() as downloading:
        page.locator("#rated a").click()
    (line,) = map(json.loads, downloading.value.path().read_text().splitlines())
    assert line["text"] == "umbrella"
    assert [os.path.dirname(target) for target in line["targets"]] == [str(site.images / "umbrella")]
    assert downloading.value.suggested_filename == "queries.jsonl"
    page.locator(f'.card[data-id="{path}"]').get_by_role("button", name="More like this").click()
    expect(page.locator("#rated")).to_contain_text("Queries: 0")
    page.fill("#avoid", "fruit")
    page.press("#avoid", "Enter")
    expect(page.locator("#chips li")).to_contain_text("without fruit")
    page.locator(".card").first.get_by_role("button", name="Less like this").click()
    expect(page.locator("#rated")).to_contain_text("not kept")
    assert file.read_text() == ""


# ------------------------------------------------------------------------------------------ indexing


def test_a_folder_is_chosen_indexed_paused_and_reported(visit, site):
    page = visit("fresh/")
    page.locator("#to-indexing").click()
    page.get_by_role("button", name="inbox").click()
    page.get_by_role("button", name="spring").click()
    expect(page.locator("#start")).to_have_text("Index inbox/spring")
    page.locator("#start").click()
    expect(page.locator("#run-title")).to_have_text("inbox/spring: indexing")
    page.locator("#pause").click()
    expect(page.locator("#run-title")).to_have_text("inbox/spring: paused")
    page.locator("#resume").click()
    site.held.released.set()
    expect(page.locator("#run-title")).to_have_text("inbox/spring: done")
    report = page.locator("#report")
    expect(report).to_contain_text("12 new")
    expect(report).to_contain_text("1 skipped")
    expect(report).to_contain_text("broken.jpg")
    expect(report).to_contain_text(".txt")
    (site.folder / "inbox" / "spring" / "mug" / "blue stars.jpg").unlink()
    page.locator("#prune").check()
    page.locator("#start").click()
    expect(report).to_contain_text("1 removed, their files are gone")
    assert site.new.count() == 11
    site.held.released.clear()
    for size in range(40, 52):  # more than go through the model at once
        Image.new("RGB", (size, size), "red").save(site.folder / "inbox" / "spring" / f"red {size}.png")
    page.locator("#start").click()
    page.locator("#stop").click()
    expect(page.locator("#run-title")).to_have_text("inbox/spring: stopping")
    site.held.released.set()
    expect(page.locator("#run-title")).to_have_text("inbox/spring: stopped")
    expect(report).to_contain_text("stopped before its end")


def test_where_nothing_may_be_indexed_there_is_no_such_page(visit):
    page = found(visit, "q=mug", refused=[404])
    expect(page.locator("#to-indexing")).to_be_hidden()
    assert page.goto(page.url.partition("?")[0] + "indexing").status == 404


# ------------------------------------------------------------------------------------------ drafted queries


def test_drafts_are_reviewed_by_keyboard(visit, site, axe):
    """Truth: the file afterwards. The first draft is put off, the second corrected, the third dropped."""
    page = visit("drafts/", bypass_csp=True)
    page.locator("#to-review").click()
    words = page.locator("#words")
    expect(words).to_have_value("draft 0")
    expect(page.locator("#status")).to_have_text("3 of 3 queries in drafts.jsonl are not reviewed yet.")
    expect(page.locator("#pair img")).to_have_count(2)
    page.wait_for_load_state("networkidle")
    assert page.locator("#pair img").evaluate_all("all => all.map((one) => one.naturalWidth > 0)") == [True, True]
    assert violations(page, axe) == []
    if SHOTS:
        page.screenshot(path=f"{SHOTS}/review.png")
    page.get_by_role("button", name="Later").press("Enter")
    expect(words).to_have_value("draft 1")
    expect(words).to_be_focused()
    page.keyboard.press("Control+a")
    page.keyboard.type("in blue")
    page.keyboard.press("Enter")
    expect(words).to_have_value("draft 2")
    page.get_by_role("button", name="Drop").press("Enter")
    expect(words).to_have_value("draft 0")
    page.keyboard.press("Enter")
    expect(page.locator("#status")).to_have_text("All 2 queries in drafts.jsonl are reviewed.")
    expect(page.locator("#review")).to_be_hidden()
    kept = list(map(json.loads, (site.folder / "drafts.jsonl").read_text().splitlines()))
    assert [(one["text"], one["note"].partition("; ")[2]) for one in kept] == [
        ("draft 0", "reviewed"),
        ("in blue", "corrected by hand"),
    ]


# ------------------------------------------------------------------------------------------ a model that is on its way


def test_a_page_that_waits_for_the_weights_becomes_the_search(browser, site, axe):
    listener = listen_on("127.0.0.1", 0)
    page = browser.new_page(locale="en-GB", bypass_csp=True)
    with waiting_page(listener, Access("127.0.0.1", None), "some/model") as tell:
        tell(1_000_000, 4_000_000)
        page.goto(f"http://127.0.0.1:{listener.getsockname()[1]}/")
        expect(page.locator("#downloading")).to_contain_text("The weights of some/model are being downloaded")
        assert violations(page, axe) == []
        tell(3_000_000, 4_000_000)
        expect(page.locator("#waiting .quiet")).to_have_text("3 of 4 MB")
        assert page.locator("#waiting progress").get_attribute("value") == "3"
    with served(site.another(), listener):
        expect(page.locator("#about")).to_contain_text("48 images")
        page.close()


# ------------------------------------------------------------------------------------------ the rest of the page


def test_the_full_text_switch_finds_words(visit):
    page = found(visit, "q=zebra")
    assert "square 07.png" not in page.locator(".card").first.inner_text()
    page.locator("#hybrid").check()
    expect(page.locator(".card").first).to_contain_text("square 07.png")
    expect(page).to_have_url(re.compile("h=1"))


def test_results_go_on_as_one_scrolls_and_copies_are_one_card(visit):
    """46 files that are no copies of others, 40 on the first page."""
    page = found(visit, "q=mug")
    expect(page.locator(".card")).to_have_count(40)
    page.locator(".card").last.scroll_into_view_if_needed()
    expect(page.locator(".card")).to_have_count(46)
    assert len(set(ids(page))) == 46
    expect(page.locator("#more")).to_be_hidden()
    expect(page.locator(".copies")).to_have_text("3 copies")


def test_an_image_is_given_by_its_address(visit):
    """An address of this machine is refused, which the page says; it stays a part of the query."""
    url = "http://127.0.0.1:9/shoe.png"
    page = found(visit, "q=mug", refused=[400, 422])
    page.locator("#url").click()
    page.fill("#ask-text", url)
    with page.expect_request("**/v1/search") as asked:
        page.press("#ask-text", "Enter")
    assert asked.value.post_data_json["image"] == url
    expect(page.locator("#chips li")).to_contain_text(url)
    expect(page.locator("#problem")).to_contain_text("127.0.0.1")


def test_a_token_signs_a_browser_in(visit, site):
    page = visit("locked/", refused=[401, 403])
    page.fill("#token", "a-wrong-token-of-somebody")
    page.press("#token", "Enter")
    expect(page.locator("#problem")).to_contain_text("not the token")
    page.fill("#token", TOKEN)
    page.press("#token", "Enter")
    expect(page.locator("#text")).to_be_visible()
    page.reload()
    expect(page.locator("#text")).to_be_visible()
    (cookie,) = page.context.cookies()
    assert (cookie["httpOnly"], cookie["sameSite"], cookie["path"]) == (True, "Strict", "/locked")


@pytest.mark.parametrize(("app", "box"), [("locked", "#token"), ("many", "#text")])
def test_nothing_can_be_typed_before_the_page_listens_to_enter(visit, app, box):
    """It would be lost: forms are sent by scripts alone."""
    held = []
    page = visit(f"{app}/", refused=[401], holds=("**/static/app.js*", held), until="commit")
    expect(page.locator(box)).to_be_disabled()
    while not held:  # the page may be there before it asks for its script
        page.wait_for_timeout(20)
    for route in held:
        route.continue_()
    expect(page.locator(box)).to_be_enabled()


def test_what_is_typed_while_the_page_asks_for_its_facts_stays(visit, site):
    held = []
    page = visit("many/", holds=("**/v1/info", held))
    page.fill("#text", "mug")
    held.pop().continue_()
    expect(page.locator("#about")).to_contain_text("48 images")
    assert page.input_value("#text") == "mug"
    page.press("#text", "Enter")
    expect(page.locator(".card").nth(9)).to_be_visible()


def test_the_folder_of_a_file_is_opened_on_this_machine(visit, site):
    page = found(visit, "q=umbrella")
    page.locator(".card .open").first.click()
    with page.expect_response("**/v1/reveal") as answer:
        page.locator("#reveal").click()
    assert answer.value.status == 200
    for _ in range(2_000):
        if site.opened.exists():
            break
        page.wait_for_timeout(10)
    assert site.opened.read_text() == str(site.images / "umbrella")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [375, 1280])
def test_nothing_overflows_and_axe_finds_no_violation(visit, site, axe, scheme, width):
    """After a ranking, with a rating, and on the indexing page."""
    site.reranker.released.set()
    options = {"viewport": {"width": width, "height": 900}, "color_scheme": scheme, "bypass_csp": True}
    page = found(visit, "q=umbrella", **options)
    page.locator(".card").first.get_by_role("button", name="More like this").click()
    expect(page.locator("#rated")).to_contain_text("Queries: 1")
    expect(page.locator("#chips li")).to_contain_text("more like")
    expect(page.locator(".card").nth(9)).to_be_visible()
    page.locator("#rerank").click()
    expect(page.locator(".card .reason").first).to_be_visible()
    page.wait_for_load_state("networkidle")
    tops = page.locator(".card").first.locator(".vote").evaluate_all("all => all.map((one) => one.offsetTop)")
    other = visit("fresh/indexing", **options)
    other.get_by_role("button", name="inbox").click()
    expect(other.get_by_role("button", name="spring")).to_be_visible()
    for shown, name in ((page, "ranked"), (other, "indexing")):
        if SHOTS:
            shown.screenshot(path=f"{SHOTS}/{name}-{scheme}-{width}.png")
        assert shown.evaluate("document.documentElement.scrollWidth") <= width
        assert violations(shown, axe) == []
    assert tops[0] == tops[1], "both thumbs are on one line"
    page.locator('.vote[aria-pressed="true"]').click()
    expect(page.locator("#rated")).to_contain_text("Queries: 0")
