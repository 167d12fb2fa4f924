"""Indexing, as clients of the web app see it."""

from __future__ import annotations

import time

import pytest

pytest.importorskip("starlette", reason='needs the extra "web"')
from starlette.testclient import TestClient
from web_mm_retriever import web_app

from mm_retriever.store import open_store
from tests.support.drawn_store import draw_images
from tests.support.web import HOME, HeldModel


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
