"""Ranking on demand, as clients of the web app see it."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("starlette", reason='needs the extra "web"')
from starlette.testclient import TestClient

from tests.support.held_reranker import HeldRerank
from tests.support.web import HOME


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
