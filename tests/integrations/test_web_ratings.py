"""Ratings, as clients of the web app see them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("starlette", reason='needs the extra "web"')
from starlette.testclient import TestClient

from mm_retriever.errors import QueryError
from mm_retriever.evaluation.datasets import read_queries
from tests.support.web import HOME, TOKEN


def test_ratings_are_lines_of_an_evaluation_set(make_app, tmp_path, leopard, folder):
    file = tmp_path / "photos.queries.jsonl"
    with TestClient(make_app(ratings=file), base_url=HOME) as client:
        upload = client.post("/v1/uploads", content=leopard.read_bytes(), headers={"content-type": "image/png"}).json()
        query = {"text": "phone case with this", "image": upload["image"]}
        found = client.post("/v1/search", json={**query, "top_k": 3}).json()["results"]
        paths = [str(folder / "images" / one["label"] / one["metadata"]["file_name"]) for one in found]

        def rate(place, rating):
            return client.post("/v1/rate", json={**query, "id": found[place]["id"], "rating": rating}).json()

        assert rate(1, "down") == {"queries": 0, "waiting": 1, "place": str(file), "download": True}
        assert rate(0, "up")["queries"] == 1
        assert rate(2, "up")["queries"] == 1
        (line,) = map(json.loads, file.read_text().splitlines())
        image = Path(line.pop("image"))
        assert image.parent == tmp_path / "photos.queries.images"
        assert image.read_bytes() == leopard.read_bytes()
        assert line == {"text": "phone case with this", "targets": [paths[0], paths[2]], "negatives": [paths[1]]}
        (labelled,) = read_queries(file)
        assert [str(path) for path in labelled.targets] == [paths[0], paths[2]]
        assert client.get("/v1/ratings").text == file.read_text()
        rate(0, "none")
        assert rate(2, "down") == {"queries": 0, "waiting": 1, "place": str(file), "download": True}
        assert file.read_text() == ""
        refused = client.post("/v1/rate", json={"id": found[0]["id"], "rating": "up"})
        assert "this query has neither" in refused.json()["error"]


def test_lines_of_others_stay_and_a_damaged_file_is_refused(make_app, tmp_path):
    file = tmp_path / "own.jsonl"
    own = {"text": "a hat", "targets": ["hat.jpg"], "negatives": [], "note": "by hand"}
    file.write_text(json.dumps(own) + "\n")
    with TestClient(make_app(ratings=file), base_url=HOME) as client:
        (mug,) = client.post("/v1/search", json={"text": "mug", "top_k": 1}).json()["results"]
        client.post("/v1/rate", json={"text": "mug", "id": mug["id"], "rating": "up"})
        assert json.loads(file.read_text().splitlines()[0]) == own
        assert str(tmp_path / "hat.jpg") in client.get("/v1/ratings").text, "paths that hold in any folder"
    file.write_text("{}\nnot JSON\n")
    with pytest.raises(QueryError, match="line 2: no query"):
        make_app(ratings=file)


def test_a_query_image_is_not_its_own_right_result(make_app, tmp_path):
    """`read_queries` refuses the whole file for such a line."""
    file = tmp_path / "queries.jsonl"
    with TestClient(make_app(ratings=file), base_url=HOME) as client:
        (mug,) = client.post("/v1/search", json={"text": "mug", "top_k": 1}).json()["results"]
        original = client.get(mug["original"]).content
        upload = client.post("/v1/uploads", content=original, headers={"content-type": "image/jpeg"}).json()
        for image in (mug["id"], upload["image"]):
            (itself, other) = client.post("/v1/search", json={"image": image, "top_k": 2}).json()["results"]
            assert itself["id"] == mug["id"]
            refused = client.post("/v1/rate", json={"image": image, "id": itself["id"], "rating": "up"})
            assert (refused.status_code, "the query image itself" in refused.json()["error"]) == (400, True)
            assert client.post("/v1/rate", json={"image": image, "id": other["id"], "rating": "up"}).status_code == 200
    assert len(read_queries(file)) == 2


def test_ratings_are_added_to_a_file_that_begins_with_a_byte_order_mark(make_app, tmp_path):
    file = tmp_path / "own.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"text": "a hat", "targets": ["hat.jpg"]}\r\n')
    with TestClient(make_app(ratings=file), base_url=HOME) as client:
        assert client.get("/v1/info").json()["ratings"]["queries"] == 1
        (mug,) = client.post("/v1/search", json={"text": "mug", "top_k": 1}).json()["results"]
        client.post("/v1/rate", json={"text": "mug", "id": mug["id"], "rating": "up"})
    assert [json.loads(line)["text"] for line in file.read_text().splitlines()] == ["a hat", "mug"]


def test_with_a_token_nobody_is_told_where_rated_images_lie(make_app, tmp_path):
    app = make_app(host="0.0.0.0", token=TOKEN, ratings=tmp_path / "queries.jsonl", index_roots=[tmp_path])
    headers = {"authorization": f"Bearer {TOKEN}"}
    with TestClient(app, base_url="http://images.example", headers=headers) as client:
        assert client.get("/v1/info").json()["ratings"]["place"] == "queries.jsonl"
        assert client.get("/v1/ratings").status_code == 403
        assert str(tmp_path) not in client.get("/v1/folders?at=0").text
