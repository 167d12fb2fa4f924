"""Ranking on demand, ratings and indexing as clients of the web app see them."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

pytest.importorskip("starlette", reason='needs the extra "web"')
from starlette.testclient import TestClient
from web_mm_retriever import web_app

from mm_retriever.errors import QueryError
from mm_retriever.evaluation.datasets import read_queries
from mm_retriever.store import open_store
from tests.support.drawn_store import draw_images
from tests.support.held_reranker import HeldRerank
from tests.support.web import HOME, TOKEN, HeldModel

# ------------------------------------------------------------------------------------------ ranking on demand


def ranked(client, **asked) -> list[dict]:
    return [json.loads(line) for line in client.post("/v1/rerank", json=asked).text.splitlines()]


def test_results_are_ranked_by_the_servers_model(make_app):
    """Truth: the scripted model turns the order round. Before its first ranking nobody knows how long one takes."""
    reranker = HeldRerank(top_n=50)
    reranker.released.set()
    with TestClient(make_app(rerank=reranker), base_url=HOME) as client:
        info = client.get("/v1/info").json()
        assert (info["rerank"], info["rerank_seconds"]) == ("held", None)
        found = client.post("/v1/search", json={"text": "mug", "top_k": 4}).json()["results"]
        ids = [one["id"] for one in found]
        first, *_, last = ranked(client, text="mug", ids=ids)
        assert (first["event"] in ("waiting", "running"), first["expected_seconds"]) == (True, None)
        assert (last["event"], last["passes"]) == ("done", 1)
        assert [one["id"] for one in last["results"]] == ids[::-1]
        assert last["results"][0]["reason"] == "reason 4"
        assert client.get("/v1/info").json()["rerank_seconds"] > 0
        assert ranked(client, text="mug", ids=ids)[0]["expected_seconds"] is not None
        reranker.fails = True
        assert (failed := ranked(client, text="mug", ids=ids)[-1])["event"] == "failed"
        assert "out of memory" in failed["error"]
        assert client.post("/v1/rerank", json={"text": "mug", "ids": []}).status_code == 400
        assert "nothing to rank by" in ranked(client, ids=ids)[-1]["error"]


def test_a_model_of_this_package_ranks_by_name(make_app):
    with TestClient(make_app(rerank="tiny", device="cpu"), base_url=HOME) as client:
        found = client.post("/v1/search", json={"text": "mug", "top_k": 3}).json()["results"]
        asked = {"text": "mug", "ids": [one["id"] for one in found], "scores": [one["score"] for one in found]}
        last = ranked(client, **asked)[-1]
        assert sorted(one["id"] for one in last["results"]) == sorted(asked["ids"])


def test_without_a_model_there_is_no_address_to_ask(client):
    assert client.post("/v1/rerank", json={"text": "mug", "ids": ["x"]}).status_code == 404
    assert client.get("/v1/info").json()["rerank"] is None


# ------------------------------------------------------------------------------------------ ratings


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


# ------------------------------------------------------------------------------------------ drafted queries


def drafts(folder: Path) -> Path:
    """Three drafts, as `evaluate --make` writes them, between a query of a person and an empty line."""
    images = folder / "images"
    names = sorted(path.relative_to(folder).as_posix() for path in images.rglob("*.jpg"))
    made = [
        {"image": names[n], "text": f"draft {n}", "targets": [names[n + 1]], "note": "drafted by m; not reviewed"}
        for n in range(3)
    ]
    own = '{"text":  "a hat", "targets": ["images/hat.jpg"]}'
    file = folder / "drafts.jsonl"
    file.write_text("\n".join([json.dumps(made[0]), own, "", *map(json.dumps, made[1:]), ""]))
    return file


def test_drafts_are_kept_corrected_dropped_or_put_off(make_app, folder):
    """Truth: the file afterwards; the line of a person stays as it was, byte for byte."""
    file = drafts(folder)
    file.chmod(0o640)
    own = file.read_text().splitlines()[1]
    with TestClient(make_app(review=file), base_url=HOME) as client:
        assert client.get("/v1/info").json()["review"] is True
        state = client.get("/v1/review").json()
        first = state["draft"]
        assert (state["place"], state["queries"], state["left"]) == ("drafts.jsonl", 4, 3)
        assert (first["text"], first["note"], first["image"], first["targets"]) == ("draft 0", "drafted by m", True, 1)
        for place in (0, 1):
            image = client.get("/v1/review/image", params={"id": first["id"], "place": place})
            assert image.headers["content-type"] == "image/jpeg"
        assert client.get("/v1/review/image", params={"id": first["id"], "place": 2}).status_code == 400
        second = client.get("/v1/review", params={"after": first["id"]}).json()["draft"]

        def judge(draft, verdict, text=""):
            asked = {"id": draft["id"], "verdict": verdict, "text": text, "after": first["id"]}
            return client.post("/v1/review/verdict", json=asked)

        third = judge(second, "keep", "in another colour").json()["draft"]
        assert third["text"] == "draft 2"
        assert judge(third, "drop").json()["draft"] == first
        done = judge(first, "keep", "draft 0").json()
        assert (done["queries"], done["left"], done["draft"]) == (3, 0, None)
        again = judge(first, "drop")
        assert (again.status_code, "no longer in the file" in again.json()["error"]) == (400, True)
    kept, line, _, corrected, end = file.read_text().split("\n")
    assert (line, end, file.stat().st_mode & 0o777) == (own, "", 0o640)
    assert json.loads(kept)["note"] == "drafted by m; reviewed"
    assert (json.loads(corrected)["text"], json.loads(corrected)["note"]) == (
        "in another colour",
        "drafted by m; corrected by hand",
    )


def test_a_file_of_something_else_is_not_reviewed(make_app, client, tmp_path):
    with pytest.raises(QueryError, match="No such file"):
        make_app(review=tmp_path / "gone.jsonl")
    (tmp_path / "other.jsonl").write_text('{"text": "x"}\nnot JSON\n')
    with pytest.raises(QueryError, match="'not JSON' is no query"):
        make_app(review=tmp_path / "other.jsonl")
    assert client.get("/review").status_code == 404
    assert client.get("/v1/review").status_code == 404


# ------------------------------------------------------------------------------------------ indexing


@pytest.fixture
def indexing(tmp_path, embed_model):
    """An app over an empty store, whose users may index one folder."""
    photos = tmp_path / "photos"
    draw_images(photos / "shop")
    (photos / "shop" / "notes.txt").write_text("no image")
    (photos / "shop" / "broken.jpg").write_bytes(b"nothing")
    (photos / "out").symlink_to("/etc")
    with open_store(tmp_path / "new.db", embed_model) as store:
        app = web_app(store, embed_model, thumbnails=tmp_path / "thumbnails", index_roots=[photos])
        with TestClient(app, base_url=HOME) as client:
            yield client, photos, store


def end_of_run(client) -> dict:
    while (run := client.get("/v1/indexing").json())["state"] in ("running", "stopping", "paused"):
        time.sleep(0.02)
    return run


def test_a_folder_is_indexed_and_the_report_says_what_was_left_out(indexing):
    client, photos, store = indexing
    assert client.get("/v1/indexing").json()["state"] == "idle"
    assert client.get("/v1/folders").json()["folders"] == [{"at": "0", "name": "photos"}]
    below = client.get("/v1/folders?at=0").json()
    assert {"at": "0/shop", "name": "shop"} in below["folders"]
    started = client.post("/v1/indexing/start", json={"folder": "0/shop"})
    assert started.json()["folder"] == "photos/shop"
    run = end_of_run(client)
    assert (run["state"], run["counts"]) == ("done", {"indexed": 12, "skipped": 1})
    assert [one["path"] for one in run["skipped"]] == ["broken.jpg"]
    assert [(one["kind"], one["count"]) for one in run["ignored"]] == [(".txt", 1)]
    assert store.count() == client.get("/v1/info").json()["rows"] == 12
    (photos / "shop" / "mug" / "blue stars.jpg").unlink()
    client.post("/v1/indexing/start", json={"folder": "0/shop", "prune": True})
    assert end_of_run(client)["counts"] == {"unchanged": 11, "removed": 1, "skipped": 1}
    for path in (photos / "shop" / "umbrella").iterdir():
        path.unlink()
    (photos / "shop" / "mug" / "red leopard.jpg").unlink()
    client.post("/v1/indexing/start", json={"folder": "0", "prune": True})
    run = end_of_run(client)
    assert (run["state"], "the box for that ticked" in run["error"], str(photos) in run["error"]) == (
        "failed",
        True,
        False,
    )
    client.post("/v1/indexing/start", json={"folder": "0", "prune": True, "force": True})
    assert end_of_run(client)["counts"]["removed"] == 5


def test_what_is_not_below_an_allowed_folder_is_not_indexed(indexing):
    client, _, store = indexing
    for at in ("", "1", "0/..", "0/../..", "0/out", "0/shop/notes.txt", "0/missing", "0/\0", "x"):
        refused = client.post("/v1/indexing/start", json={"folder": at})
        assert (refused.status_code, store.count()) == (400, 0), at
    assert client.get("/v1/indexing").json()["state"] == "idle"


def test_a_run_is_paused_goes_on_and_is_stopped_and_runs_alone(tmp_path):
    """The model waits, so that no run ends before its time."""
    model = HeldModel("tiny", device="cpu")
    draw_images(tmp_path / "photos")
    with open_store(tmp_path / "new.db", model) as store:
        app = web_app(store, model, thumbnails=tmp_path / "thumbnails", index_roots=[tmp_path / "photos"])
        with TestClient(app, base_url=HOME) as client:
            try:
                client.post("/v1/indexing/start", json={"folder": "0"})
                assert client.post("/v1/indexing/pause", json={}).json()["state"] == "paused"
                assert client.post("/v1/indexing/start", json={"folder": "0"}).status_code == 409
                assert client.post("/v1/search", json={"text": "mug"}).is_success, "searches are answered meanwhile"
                assert client.post("/v1/indexing/stop", json={}).json()["state"] == "stopping"
                model.released.set()
                run = end_of_run(client)
                assert (run["state"], store.count() < 12) == ("stopped", True)
                assert "stopped before its end" in run["notes"][0]
                model.released.clear()
                client.post("/v1/indexing/start", json={"folder": "0"})
                client.post("/v1/indexing/pause", json={})
                assert client.post("/v1/indexing/resume", json={}).json()["state"] == "running"
                model.released.set()
                assert (end_of_run(client)["state"], store.count()) == ("done", 12)
            finally:
                model.released.set()


def test_nobody_indexes_where_no_folder_is_allowed(client):
    for path in ("/v1/indexing", "/v1/folders", "/indexing"):
        assert client.get(path).status_code == 404
    assert client.get("/v1/info").json()["indexing"] is False
