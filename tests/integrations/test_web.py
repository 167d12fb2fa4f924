"""The web app as its clients see it: Starlette's test client before the real app, model and store of drawn products."""

from __future__ import annotations

import asyncio
import io
import json
import socket
from pathlib import Path

import pytest

pytest.importorskip("starlette", reason='needs the extra "web"')
from fastapi import FastAPI
from PIL import Image
from starlette.testclient import TestClient
from web_mm_retriever.app import strings
from web_mm_retriever.serving import listen_on

from mm_retriever.demo.catalogue import draw_product
from mm_retriever.errors import QueryError
from mm_retriever.ingest import ingest_images, remove_images
from mm_retriever.search_tools.rows import RowsQuery, find_rows, result_rows
from tests.support.web import HOME, TOKEN


def test_words_find_images_with_thumbnails_and_originals(client, folder):
    answer = client.post("/v1/search", json={"text": "a mug", "top_k": 4}).json()
    assert [one["label"] for one in answer["results"]] == ["mug"] * 4
    assert answer["next"] == 4
    first = answer["results"][0]
    thumbnail = client.get(first["thumbnail"])
    assert thumbnail.headers["content-type"] == "image/jpeg"
    assert Image.open(io.BytesIO(thumbnail.content)).size == (160, 160)
    assert client.get(first["thumbnail"], headers={"if-none-match": thumbnail.headers["etag"]}).status_code == 304
    weak = {"if-none-match": f'"other", W/{thumbnail.headers["etag"]}'}  # RFC 9110, 13.1.2
    assert client.get(first["thumbnail"], headers=weak).status_code == 304
    original = client.get(first["original"])
    assert original.content == (folder / "images" / "mug" / first["metadata"]["file_name"]).read_bytes()
    assert client.get(first["original"] + "&download=1").headers["content-disposition"].startswith("attachment")


def test_the_thumbnail_of_a_file_that_was_replaced_has_another_address(store, embed_model, client, folder):
    """Browsers keep a thumbnail for a day by its address, and the id of an image stays when its file is replaced."""
    path = folder / "replaced" / "one.png"
    path.parent.mkdir()

    def address(kind: str) -> str:
        draw_product(kind, "plain", "red", seed=1).save(path)
        ingest_images(path.parent, store, embed_model, show_progress=False)
        named = [{"key": "file_name", "value": "one.png"}]
        (result,) = client.post("/v1/search", json={"text": kind, "filters": named}).json()["results"]
        return str(result["thumbnail"])

    try:
        first, second = address("mug"), address("umbrella")
        assert first != second
        assert first.partition("&")[0] == second.partition("&")[0]
        assert "max-age" in client.get(second).headers["cache-control"]
        assert "no-cache" in client.get(second.partition("&")[0]).headers["cache-control"]
    finally:
        remove_images(store, path)


def test_an_answer_tells_how_long_the_model_took(client):
    timing = client.post("/v1/search", json={"text": "a mug"}).headers["server-timing"]
    model, total = (float(part.partition("dur=")[2]) for part in timing.split(", "))
    assert 0 < model < total


def test_an_upload_is_an_image_of_a_query(client, leopard):
    upload = client.post("/v1/uploads", content=leopard.read_bytes(), headers={"content-type": "image/png"}).json()
    assert (upload["width"], upload["height"]) == (160, 160)
    asked = {"text": "phone case with this", "image": upload["image"], "top_k": 1}
    (first,) = client.post("/v1/search", json=asked).json()["results"]
    assert (first["label"], first["metadata"]["file_name"]) == ("phone case", "natural leopard.jpg")
    assert client.get("/v1/thumbnail", params={"id": upload["image"]}).status_code == 200
    forgotten = client.post("/v1/search", json={"image": "upload:0123"})
    assert (forgotten.status_code, "no longer here" in forgotten.json()["error"]) == (400, True)


def test_pages_of_results_are_parts_of_one_ranking(client):
    whole = client.post("/v1/search", json={"text": "mug", "top_k": 12}).json()["results"]
    parts = [client.post("/v1/search", json={"text": "mug", "top_k": 5, "skip": skip}).json() for skip in (0, 5, 10)]
    assert [one["id"] for part in parts for one in part["results"]] == [one["id"] for one in whole]
    assert [part["next"] for part in parts] == [5, 10, None]


def test_similar_leaves_out_the_image_itself(client):
    (mug,) = client.post("/v1/search", json={"text": "mug", "top_k": 1}).json()["results"]
    similar = client.post("/v1/search", json={"image": mug["id"], "exclude_image": True, "top_k": 12}).json()
    assert len(similar["results"]) == 11
    assert mug["id"] not in [one["id"] for one in similar["results"]]


def test_facets_count_the_rows_that_match(client):
    counted = client.post("/v1/facets", json={}).json()
    (label,) = (facet for facet in counted["facets"] if facet["key"] == "label")
    assert {(one["value"], one["count"]) for one in label["values"]} == {("mug", 4), ("phone case", 4), ("umbrella", 4)}
    assert (counted["rows"], counted["complete"]) == (12, True)
    narrow = {"filters": [{"key": "label", "operator": "==", "value": "mug"}]}
    assert client.post("/v1/facets", json=narrow).json()["rows"] == 4
    found = client.post("/v1/search", json={"text": "leopard", **narrow, "top_k": 12}).json()
    assert {one["label"] for one in found["results"]} == {"mug"}


def test_the_rows_of_the_command_line_tell_only_the_servers_own_user_where_files_lie(app, client, store, embed_model):
    asked = {"text": "mug", "top_k": 3}
    others = client.post("/v1/rows", json=asked).json()["rows"]
    owner = {"authorization": f"Bearer {app.access.secret}"}
    rows = client.post("/v1/rows", json=asked, headers=owner).json()["rows"]
    local = result_rows(find_rows(store, embed_model, RowsQuery(text="mug", top_k=3)).nodes)
    for row, mine in zip(rows, json.loads(json.dumps(local)), strict=True):
        assert row.pop("score") == pytest.approx(mine.pop("score"), abs=1e-6)
        assert row == mine
    assert "file_path" in rows[0]
    for row, others_row in zip(rows, others, strict=True):
        del row["file_path"], others_row["score"]
        assert row == others_row
    assert "/" not in json.dumps(others)
    secret = Path(__file__).parent / "secret.png"
    refused = client.post("/v1/rows", json={"image": str(secret)})
    assert (refused.status_code, str(secret.parent) in refused.text) == (422, False)
    assert client.post("/v1/rows", json={"text": "mug", "top_k": 201}).status_code == 400


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({}, "nothing to search for"),
        ({"text": "x", "unknown": 1}, "unknown: Extra inputs are not permitted"),
        ({"text": "x", "top_k": 0}, "top_k: Input should be greater"),
        ({"text": "x", "balance": 3}, "balance 3.0: give a number from 0"),
        ({"text": "x", "filters": [{"key": "nothing", "operator": "==", "value": 1}]}, "no column 'nothing'"),
        ({"text": "x", "avoid": ["mug " * 501]}, "avoid.0: String should have at most 2000 characters"),
        ({"text": "x", "liked": ["a" * 513]}, "liked.0: String should have at most 512 characters"),
        ({"text": "x", "avoid": ["mug"] * 65}, "65 given, at most 64"),
        ({"text": "x", "liked": ["nobody"]}, "no image of the id 'nobody'"),
        ({"image": "/etc/hostname.png"}, "no image is known"),
        ({"image": "http://127.0.0.1/a.png"}, "URLs is off"),
    ],
)
def test_what_cannot_be_answered_is_said_in_a_line(client, asked, said):
    refused = client.post("/v1/search", json=asked)
    assert refused.status_code in (400, 422)
    assert said in refused.json()["error"]


def test_no_answer_tells_where_files_lie(client, folder):
    found = client.post("/v1/search", json={"text": "mug", "top_k": 12})
    assert str(folder) not in found.text
    gone = folder / "images" / "mug" / "blue stars.jpg"
    data = gone.read_bytes()
    gone.unlink()
    try:
        names = {(one["label"], one["metadata"]["file_name"]): one for one in found.json()["results"]}
        one = names["mug", "blue stars.jpg"]
        refused = client.get("/v1/original" + one["original"].removeprefix("v1/original"))
        assert (refused.status_code, str(folder) in refused.text) == (422, False)
        gone.write_bytes(data + b"changed")
        assert "not the file that was indexed" in client.get("/" + one["original"]).json()["error"]
    finally:
        gone.write_bytes(data)


# ------------------------------------------------------------------------------------------ who may ask


def test_pages_of_other_sites_get_nothing(client):
    asked = {"json": {"text": "mug"}}
    for headers in (
        {"origin": "http://evil.example"},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
    ):
        assert client.post("/v1/search", headers=headers, **asked).status_code == 403
        assert client.get("/v1/thumbnail?id=x", headers=headers).status_code == 403
    for host in ("evil.example", "127.0.0.1.evil.example", "127.0.0.1@evil.example", "0.0.0.0", "[", ""):
        assert client.post("/v1/search", headers={"host": host}, **asked).status_code == 421
    for origin in ("null", "http://[", "http://127.0.0.1:9"):
        assert client.post("/v1/search", headers={"origin": origin}, **asked).status_code == 403
    form = {"content-type": "text/plain"}  # what a form of any page may send
    assert client.post("/v1/search", content=b'{"text": "mug"}', headers=form).status_code == 415
    assert client.post("/v1/uploads", content=b"", headers=form).status_code == 415
    assert client.post("/v1/search", headers={"origin": HOME, "sec-fetch-site": "same-origin"}, **asked).is_success


def test_with_a_token_everything_but_signing_in_needs_it(make_app):
    app = make_app(host="0.0.0.0", token=TOKEN)
    with TestClient(app, base_url="http://images.example") as client:
        for method, path in (
            ("post", "/v1/search"),
            ("post", "/v1/uploads"),
            ("get", "/v1/info"),
            ("get", "/v1/thumbnail?id=x"),
            ("get", "/v1/original?id=x"),
            ("get", "/openapi.json"),
            ("post", "/mcp"),
        ):
            assert client.request(method, path).status_code == 401, path
            assert client.request(method, path, headers={"authorization": "Bearer wrong"}).status_code == 401
        assert 'id="enter"' in client.get("/").text
        assert client.get("/v1/info", headers={"authorization": f"Bearer {TOKEN}"}).is_success


def test_a_link_signs_one_browser_in_once(make_app):
    app = make_app(host="0.0.0.0", token=TOKEN)
    link = "/" + app.access.link()
    with TestClient(app, base_url="http://images.example") as client:
        entered = client.get(link, follow_redirects=False)
        cookie = entered.headers["set-cookie"].lower()
        assert (entered.status_code, entered.headers["location"]) == (303, "./")
        assert "httponly" in cookie
        assert "samesite=strict" in cookie
        assert client.get("/v1/info").is_success
    other = TestClient(app, base_url="http://images.example")
    other.get(link)
    assert other.get("/v1/info").status_code == 401
    assert other.post("/enter", json={"token": "wrong"}).status_code == 403
    assert other.post("/enter", json={"token": TOKEN}).status_code == 204
    assert other.get("/v1/info").is_success


def test_another_host_needs_a_token(make_app):
    with pytest.raises(QueryError, match="needs a token"):
        make_app(host="0.0.0.0")


def test_an_answer_does_not_wait_for_the_last_one_to_be_acknowledged():
    """On a connection that stays open each answer would take 40 ms longer (Nagle's algorithm, delayed ACKs)."""

    async def accepted() -> int:
        sends_at_once: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        async def see(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            opened = writer.get_extra_info("socket")
            sends_at_once.set_result(opened.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()

        listener = listen_on("127.0.0.1", 0)
        async with await asyncio.start_server(see, sock=listener):
            _, writer = await asyncio.open_connection(*listener.getsockname())
            writer.close()
            return await sends_at_once

    assert asyncio.run(accepted())


def test_a_body_that_is_too_large_is_refused(client):
    headers = {"content-type": "application/json", "content-length": str(64 * 2**20)}
    assert client.post("/v1/search", content=b"{}", headers=headers).status_code == 413


# ------------------------------------------------------------------------------------------ the page and its host


def test_the_page_is_small_and_needs_nobody_else(client):
    page = client.get("/")
    policy = page.headers["content-security-policy"]
    assert "script-src 'self'" in policy
    assert "unsafe" not in policy
    assert "http" not in page.text.replace("http-equiv", "").split("<body")[0]
    static = Path(__file__).parents[2] / "integrations" / "web_mm_retriever" / "static"
    assert len(page.content) + sum(path.stat().st_size for path in static.iterdir()) < 150_000
    assert page.text.count("<script") == 1


def test_the_page_speaks_the_browsers_language(client):
    assert 'lang="de"' in client.get("/", headers={"accept-language": "de-CH,en;q=0.5"}).text
    assert 'lang="en"' in client.get("/", headers={"accept-language": "fr"}).text
    assert 'lang="en"' in client.get("/?lang=en", headers={"accept-language": "de"}).text
    assert strings()["de"].keys() == strings()["en"].keys()


def test_the_openapi_document_describes_every_endpoint(client):
    document = client.get("/openapi.json").json()
    assert document["openapi"] == "3.1.0"
    assert set(document["paths"]["/v1/search"]) == {"post"}
    schemas = document["components"]["schemas"]
    for reference in set(json.dumps(document).split('"$ref": "')[1:]):
        assert reference.partition('"')[0].removeprefix("#/components/schemas/") in schemas


def test_it_can_be_mounted_in_another_app(make_app):
    """Starlette passes no lifespan on to what is mounted; MCP starts with its first request."""
    outer = FastAPI()
    outer.mount("/images", make_app())
    with TestClient(outer, base_url=HOME) as client:
        assert 'href="static/style.css' in client.get("/images/").text
        assert str(client.get("/images").url).endswith("/images/")
        assert client.get("/images/static/app.js").is_success
        found = client.post("/images/v1/search", json={"text": "mug", "top_k": 1}).json()
        assert client.get("/images/" + found["results"][0]["thumbnail"]).is_success
        who = {"protocolVersion": "2025-06-18", "capabilities": {}, "clientInfo": {"name": "test", "version": "0"}}
        call = {"jsonrpc": "2.0", "id": 1, "method": "initialize", "params": who}
        answer = client.post("/images/mcp", json=call, headers={"accept": "application/json, text/event-stream"})
        assert (answer.status_code, '"mm-retriever"' in answer.text) == (200, True)


def test_many_users_at_once_get_the_answers_of_one(client):
    from concurrent.futures import ThreadPoolExecutor

    texts = ["mug", "umbrella", "phone case", "red polka dots", "leopard"]

    def ask(text):
        found = client.post("/v1/search", json={"text": text, "top_k": 3})
        return [one["id"] for one in found.json()["results"]]

    alone = {text: ask(text) for text in texts}
    with ThreadPoolExecutor(10) as threads:
        for text, ids in zip(texts * 6, threads.map(ask, texts * 6), strict=True):
            assert ids == alone[text]
