"""Queries that a vision LLM drafts. Truth: what a scripted server answers, and pairs by hand."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mm_retriever.errors import QueryError, RerankError
from mm_retriever.evaluation.datasets import read_queries
from mm_retriever.evaluation.made import draft_queries, near_pairs, write_drafts
from tests.support.llm_server import ScriptedServer, completion


@pytest.fixture(scope="module")
def running() -> Iterator[ScriptedServer]:
    with ScriptedServer() as script:
        yield script


@pytest.fixture
def server(running: ScriptedServer) -> ScriptedServer:
    running.requests.clear()
    running.reply = lambda _: completion(' "the same in blue"\n')
    return running


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("photos")
    made = [folder / f"{colour}.png" for colour in ("red", "blue", "green", "white")]
    for path in made:
        Image.new("RGB", (40, 20), path.stem).save(path)
    return made


def test_pairs_are_near_and_no_copies_and_no_image_is_in_two():
    """Rows 0 and 1 are copies; 2 is near both, 3 and 4 are near each other."""
    angles = np.radians([0, 1, 20, 90, 115])
    vectors = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    pairs = near_pairs(vectors, 9)
    assert {frozenset(pair[:2]) for pair in pairs} <= {
        frozenset(pair) for pair in ((0, 2), (1, 2), (3, 4), (0, 3), (1, 3))
    }
    used = [row for first, second, _ in pairs for row in (first, second)]
    assert len(used) == len(set(used)) == 4
    assert all(cosine == pytest.approx(vectors[first] @ vectors[second], abs=1e-6) for first, second, cosine in pairs)
    assert len(near_pairs(vectors, 1)) == 1


def test_a_draft_says_what_the_model_said_of_both_images_in_their_order(server, paths, tmp_path):
    drafts = draft_queries(paths, [(0, 1, 0.9), (2, 3, 0.8)], server.reranker())
    assert [(one.image, one.text, one.target) for one in drafts.queries] == [
        (paths[0], "the same in blue", paths[1]), (paths[2], "the same in blue", paths[3]),
    ]  # fmt: skip
    uris = [part["image_url"]["url"] for part in server.parts(0) if part["type"] == "image_url"]
    shown = [Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).getpixel((5, 5)) for uri in uris]
    assert [max(range(3), key=lambda channel: pixel[channel]) for pixel in shown] == [0, 2], "red, then blue"
    file = write_drafts(drafts, tmp_path / "new" / "queries.jsonl", "m")
    first, _ = read_queries(file)
    assert (first.image, first.text, first.targets, first.negatives) == (
        paths[0], "the same in blue", (paths[1],), (paths[0],),
    )  # fmt: skip
    assert json.loads(file.read_text().splitlines()[0])["note"] == "drafted by m; not reviewed"
    with pytest.raises(QueryError, match="exists, and may have been reviewed"):
        write_drafts(drafts, file, "m")


def test_answers_that_are_no_query_are_left_out_and_counted(server, paths):
    answers = iter(["", "in green"])
    server.reply = lambda _: completion(next(answers))
    drafts = draft_queries(paths, [(0, 1, 0.9), (2, 3, 0.8)], server.reranker())
    assert [one.text for one in drafts.queries] == ["in green"]
    assert drafts.left_out == ((paths[0], "the answer has 0 characters: ''"),)
    answers = iter(["<think>red, then blue</think>in blue", "I'm sorry, but I can't see the second image."])
    drafts = draft_queries(paths, [(0, 1, 0.9), (2, 3, 0.8)], server.reranker())
    assert [one.text for one in drafts.queries] == ["in blue"]
    assert [path for path, reason in drafts.left_out if "refused: I'm sorry" in reason] == [paths[2]]
    server.reply = lambda _: (401, b'{"error": {"message": "bad key"}}')
    with pytest.raises(RerankError, match=r"said of none of 1 pairs how they differ; the first: .*refused the API key"):
        draft_queries(paths, [(0, 1, 0.9)], server.reranker())
