"""The review of drafted queries, as clients of the web app see it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("starlette", reason='needs the extra "web"')
from starlette.testclient import TestClient

from mm_retriever.errors import QueryError
from tests.support.web import HOME


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
