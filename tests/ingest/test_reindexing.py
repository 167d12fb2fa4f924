"""`reindex`: every row keeps what it has and gets a vector of the new model; killed anywhere, one collection answers.

Truth: the rows before, and vectors computed here by the models themselves.
"""

from __future__ import annotations

import base64
import json
import random
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llama_index.core.schema import ImageDocument, ImageNode, TextNode
from llama_index.core.vector_stores.types import VectorStoreQuery, VectorStoreQueryMode
from PIL import Image
from pymilvus import MilvusClient

from mm_retriever import ComposedEmbedding, ingest_images, open_store, reindex
from mm_retriever.errors import IngestError, ReindexError, StoreError, StoreLockedError, StoreMismatchError
from mm_retriever.store import describe_store, open_stored
from mm_retriever.store.connection import Connection
from tests.ingest.test_kills import warm
from tests.support.colour_embedding import paint
from tests.support.command_line import run
from tests.support.effort import EFFORT
from tests.support.mean_colour import MeanColour

NAME = "photos"
COLOURS = ("red", "blue", "green", "white", "black")


@pytest.fixture(scope="module")
def tiny() -> ComposedEmbedding:
    return ComposedEmbedding("tiny", device="cpu")


@pytest.fixture(scope="module")
def colour() -> ComposedEmbedding:
    return ComposedEmbedding(MeanColour())


@pytest.fixture
def place(tmp_path: Path, colour: ComposedEmbedding) -> Path:
    """A store with columns, captions, texts of both kinds and an index of words, under the model of mean colours."""
    fill(tmp_path, tmp_path / "a.db", colour, hybrid=True)
    return tmp_path


def fill(place: Path, where: Path | str, model: ComposedEmbedding, images: int = 5, **options: Any) -> None:
    for number in range(images):
        paint(place / "photos" / f"{number}.png", COLOURS[number % 5])
    columns = {f"{number}.png": {"price": number + 0.5, "caption": f"the {number}th"} for number in range(images)}
    (place / "columns.json").write_text(json.dumps(columns))
    with open_store(where, model, collection=NAME, **options) as store:
        ingest_images(place / "photos", store, model, sidecar=place / "columns.json", show_progress=False)
        ingest_images([TextNode(id_="note", text="a red mug")], store, model, show_progress=False)
        other = TextNode(id_="other", text="a mug", metadata={"colour": "blue"})
        store.add(model([other]))


def rows(where: Path | str) -> tuple[str, dict[str, dict[str, Any]]]:
    """The model of the collection, and its rows by id."""
    with open_stored(where, collection=NAME) as store:
        return store.model_id, {row["id"]: row for page in store.scan(["*"]) for row in page}


def truth(stored: dict[str, dict[str, Any]], model: ComposedEmbedding) -> dict[str, np.ndarray]:
    vectors = {}
    for id_, row in stored.items():
        if path := row.get("file_path"):
            vectors[id_] = model.get_image_embedding(path)
        else:
            vectors[id_] = model.get_text_embedding("a red mug" if id_ == "note" else "colour: blue\n\na mug")
    return {id_: np.array(vector) for id_, vector in vectors.items()}


def facts(stored: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {
        id_: {key: row[key] for key in row if key not in ("embedding", "_row_checksum")} for id_, row in stored.items()
    }


def check(where: Path | str, before: dict[str, dict[str, Any]], *models: ComposedEmbedding) -> str:
    """One model's whole collection answers; which."""
    model_id, stored = rows(where)
    model = next(model for model in models if model.model_id == model_id)
    assert facts(stored) == facts(before), "a row is lost or changed"
    vectors = truth(stored, model)
    for id_, row in stored.items():
        assert np.allclose(row["embedding"], vectors[id_], atol=1e-5), f"{id_} has no vector of {model_id}"
    with open_store(where, model, collection=NAME) as store:
        query = VectorStoreQuery(query_embedding=vectors["note"].tolist(), similarity_top_k=100)
        assert sorted(store.query(query).ids) == sorted(before)
    return model_id


def test_rows_keep_everything_and_get_vectors_of_the_new_model(place, colour, tiny):
    """Ids, metadata, captions, relationships, the index of words, texts as they were embedded; and nothing is left."""
    _, before = rows(place / "a.db")
    report = reindex(place / "a.db", tiny, collection=NAME, show_progress=False)
    assert (report.rows, report.embedded, report.reused, report.dropped) == (7, 7, 0, ())
    assert check(place / "a.db", before, tiny) == tiny.model_id
    with open_store(place / "a.db", tiny, collection=NAME) as store:
        assert (store.hybrid, store.analyzer) == (True, "mixed")
        words = VectorStoreQuery(query_str="3th", mode=VectorStoreQueryMode.TEXT_SEARCH, similarity_top_k=3)
        assert [node.metadata["file_name"] for node in store.query(words).nodes] == ["3.png"]
        assert not store.verify().damaged
        assert ingest_images(place / "photos", store, tiny, show_progress=False).unchanged == 5
    assert describe_store(place / "a.db").keys() == {NAME}
    again = reindex(place / "a.db", tiny, collection=NAME, show_progress=False)
    assert (again.already, again.embedded) == (True, 0)


def test_aliases_go_to_the_new_rows_and_are_no_names_to_reindex_or_empty(place, colour, tiny):
    """Milvus Lite renames and drops what an alias stands for: the collection's own name was gone, and its rows."""
    with open_store(place / "a.db", colour, collection=NAME) as store:
        store.client.create_alias(NAME, "live")
    _, before = rows(place / "a.db")
    says = f"'live' is an alias of the collection '{NAME}' at .*: give that name"
    with pytest.raises(StoreError, match=says):
        reindex(place / "a.db", tiny, collection="live", show_progress=False)
    with pytest.raises(StoreError, match=says):
        open_store(place / "a.db", colour, collection="live", overwrite=True)
    with open_store(place / "a.db", colour, collection="live") as store, pytest.raises(StoreError, match=says):
        store.clear()
    assert check(place / "a.db", before, colour) == colour.model_id
    reindex(place / "a.db", tiny, collection=NAME, show_progress=False)
    with open_store(place / "a.db", tiny, collection="live", create=False) as store:
        assert store.count() == len(before)
    assert describe_store(place / "a.db").keys() == {NAME}


def test_an_image_that_cannot_be_read_stops_the_switch_unless_its_row_may_go(capfd, place, colour, tiny):
    """Our choice: nothing stored is lost without a word; what was embedded is not embedded again."""
    with open_store(place / "a.db", colour, collection=NAME) as store:
        store.write([ImageNode(id_="url", image_url="http://127.0.0.1:9/a.png", embedding=[1.0, 0.0, 0.0])])
    _, before = rows(place / "a.db")
    (place / "photos" / "2.png").unlink()
    command = ("reindex", "--db", place / "a.db", "--collection", NAME, "--model", "tiny", "--device", "cpu")
    code, out, err = run(capfd, *command)
    assert code == 1
    assert "2.png: no such file" in out
    assert "127.0.0.1:9/a.png: fetching URLs is off; --allow-urls turns it on" in out
    assert "2 of 8 rows cannot be embedded anew" in err.splitlines()[-1]
    assert "--drop-missing" in err.splitlines()[-1]
    code, out, _ = run(capfd, *command, "--json")
    assert (code, len(json.loads(out)["unreadable"])) == (1, 2)
    _, now = rows(place / "a.db")
    assert now.keys() == before.keys()
    code, out, _ = run(capfd, "info", "--db", place / "a.db")
    assert "left by a reindex of photos that has not ended" in " ".join(out.split())
    code, out, _ = run(capfd, *command, "--drop-missing", "--json")
    report = json.loads(out)
    assert (code, report["rows"], report["embedded"], report["reused"], len(report["dropped"])) == (0, 6, 0, 6, 2)
    kept = {id_: row for id_, row in before.items() if id_ != "url" and row.get("file_name") != "2.png"}
    assert check(place / "a.db", kept, tiny) == tiny.model_id
    code, out, _ = run(capfd, "info", "--db", place / "a.db")
    said = " ".join(out.split())
    assert "6 rows, model tiny, float32, image with text composed, as it was trained" in said
    assert "left by" not in said


def test_an_image_that_came_as_bytes_is_not_embedded_by_its_words(place, colour, tiny):
    """No store keeps the bytes: a vector of an empty text would stand for the image, and look like any other."""
    data = (place / "photos" / "0.png").read_bytes()
    with open_store(place / "b.db", colour, collection=NAME) as store:
        ingest_images([ImageDocument(image=base64.b64encode(data).decode())], store, colour, show_progress=False)
    options = {"collection": NAME, "show_progress": False}
    with pytest.raises(ReindexError, match=r"1 of 1 rows .* it came as bytes, which no store keeps: ingest it again"):
        reindex(place / "b.db", tiny, **options)
    assert describe_store(place / "b.db")[NAME]["model"] == colour.model_id
    assert len(reindex(place / "b.db", tiny, drop_missing=True, **options).dropped) == 1


def test_rows_written_meanwhile_are_taken_along_and_open_stores_end_with_an_error(place, colour, tiny):
    """A store that is open for the old model neither gets an answer from the new vectors nor writes among them."""

    class Slow(MeanColour):
        space = "slow@1"

        def encode(self, contents, *, query=False):
            begun.set()
            assert go_on.wait(30)
            return super().encode(contents, query=query)

    begun, go_on = threading.Event(), threading.Event()
    done: list[Any] = []
    slow = ComposedEmbedding(Slow())
    thread = threading.Thread(
        target=lambda: done.append(reindex(place / "a.db", slow, collection=NAME, batch_size=2, show_progress=False))
    )
    with open_store(place / "a.db", colour, collection=NAME) as store:
        thread.start()
        assert begun.wait(30)
        with pytest.raises(StoreLockedError, match="another process reindexes"):
            reindex(place / "a.db", tiny, collection=NAME, show_progress=False)
        paint(place / "photos" / "new.png", "yellow")
        ingest_images(place / "photos", store, colour, show_progress=False)
        store.delete_nodes(["other"])
        _, before = rows(place / "a.db")
        go_on.set()
        query = VectorStoreQuery(query_embedding=colour.get_text_embedding("red"), similarity_top_k=1)
        answers, end = 0, float("inf")
        with pytest.raises(StoreMismatchError, match=r"switched to the model 'slow@1' .* while it was open for"):
            while time.monotonic() < end:
                assert store.query(query).nodes[0].get_content() == "a red mug"
                answers += 1
                if not thread.is_alive():
                    end = min(end, time.monotonic() + 30)
        thread.join()
        assert answers > 0
        with pytest.raises(StoreMismatchError, match="was switched"):
            store.add(colour([TextNode(text="late")]))
    assert done[0].rows == 7
    assert check(place / "a.db", before, slow) == "slow@1"


def test_an_image_that_changed_since_it_was_indexed_is_embedded_as_it_is_now(place, colour, tiny):
    """Its digest is that of the new pixels; the next `index` writes the rest of its row and embeds nothing."""
    paint(place / "photos" / "1.png", "purple")
    report = reindex(place / "a.db", tiny, collection=NAME, show_progress=False)
    assert report.changed == 1
    with open_store(place / "a.db", tiny, collection=NAME) as store:
        report = ingest_images(place / "photos", store, tiny, show_progress=False)
        assert (report.embedded, report.updated + report.unchanged) == (0, 5)
        (row,) = (row for page in store.scan(["*"]) for row in page if row.get("file_name") == "1.png")
        assert np.allclose(row["embedding"], tiny.get_image_embedding(row["file_path"]), atol=1e-5)
        assert row["price"] == 1.5


def test_what_cannot_be_reindexed_is_refused_in_one_line(capfd, place, tmp_path):
    for command, says in (
        (("--db", tmp_path / "none.db"), "there is no store"),
        (("--db", place / "a.db", "--collection", "none"), "there is no collection 'none'"),
        (("--db", place / "a.db", "--model", "no/such/model"), "does not exist"),
    ):
        code, _, err = run(capfd, "reindex", "--model", "tiny", "--device", "cpu", *command)
        assert (code, err.count("\n")) == (2, 1)
        assert says in err
    with pytest.raises(IngestError, match="batch_size"):
        reindex(place / "a.db", "tiny", batch_size=0)


def test_a_collection_made_anew_after_a_broken_switch_is_not_taken_for_its_end(place, colour, tiny):
    """Another program that makes the collection while it has no name: both are kept until a person looks."""
    fill(place, place / "c.db", colour)
    with Connection(place / "c.db", token=None, timeout=30) as connection, connection.request("renaming"):
        connection.ask(connection.client.rename_collection, NAME, f"{NAME}__before_reindex")
        connection.ask(connection.client.create_collection, NAME, 3)
        with pytest.raises(StoreError):
            reindex(place / "c.db", tiny, collection=NAME, show_progress=False)
        assert connection.client.get_collection_stats(f"{NAME}__before_reindex")["row_count"] == 7


# ------------------------------------------------------------------------------------------ kills


def after_a_kill(place: Path, before: dict[str, dict[str, Any]], *models: ComposedEmbedding) -> str:
    """On a copy: the next run finds all as the dead one left it."""
    left = place / "left"
    shutil.copytree(place / "a.db", left / "a.db")
    try:
        return check(left / "a.db", before, *models)
    finally:
        shutil.rmtree(left)


@pytest.mark.slow
def test_killed_at_each_step_of_the_switch_one_whole_collection_answers(place, colour, tiny, tried):
    """SIGKILL before the old collection is renamed, before the new one is, before the old one is removed."""
    _, before = rows(place / "a.db")
    (place / "target").write_text("tiny")
    with warm(what="reindexing") as run:
        for by, at, answers in (("rename", 1, colour), ("rename", 2, colour), ("drop", 1, tiny)):
            assert run(place, by, at)["killed"], (by, at)
            assert after_a_kill(place, before, colour, tiny) == answers.model_id
        assert describe_store(place / "a.db").keys() == {NAME, f"{NAME}__before_reindex"}
        assert run(place)["step"] == "end"
    tried["runs of reindex killed"] += 3
    assert check(place / "a.db", before, tiny) == tiny.model_id
    assert describe_store(place / "a.db").keys() == {NAME}


@pytest.mark.slow
def test_killed_at_random_moments_one_whole_collection_answers_and_the_next_run_ends_the_work(
    tmp_path, colour, tiny, tried
):
    """The collection goes from one model to the other and back; rows are written between the runs."""
    chance = random.Random(13)
    fill(tmp_path, tmp_path / "a.db", colour, images=40)
    models = {"tiny": tiny, "mean-colour": colour}
    now, target = "mean-colour", "tiny"
    killed, seconds = 0, dict.fromkeys(models, 3.0)
    with warm(what="reindexing") as run:
        while killed < 20 * EFFORT:
            _, before = rows(tmp_path / "a.db")
            (tmp_path / "target").write_text(target)
            by = chance.choice(("time", "time", "operation"))
            ended = run(tmp_path, by, chance.uniform(0, seconds[target]) if by == "time" else chance.randrange(1, 60))
            assert ended["killed"] or ended["step"] == "end", ended
            killed += ended["killed"]
            if not ended["killed"]:
                seconds[target] = ended["seconds"]
            model_id = after_a_kill(tmp_path, before, colour, tiny)
            now = next(name for name, model in models.items() if model.model_id == model_id)
            if now == target:
                now, target = target, ({*models} - {target}).pop()
            if chance.random() < 0.3:
                noise = np.random.default_rng(killed).integers(0, 256, (20, 20, 3), dtype=np.uint8)
                Image.fromarray(noise).save(tmp_path / "photos" / f"{killed:02d}-more.png")
                with open_store(tmp_path / "a.db", models[now], collection=NAME) as store:
                    ingest_images(tmp_path / "photos", store, models[now], show_progress=False)
        tried["runs of reindex killed"] += killed
        _, before = rows(tmp_path / "a.db")
        (tmp_path / "target").write_text(target)
        assert run(tmp_path)["step"] == "end"
    assert check(tmp_path / "a.db", before, models[target]) == models[target].model_id
    assert describe_store(tmp_path / "a.db").keys() == {NAME}


@pytest.fixture
def server_place(tmp_path: Path, milvus_server: Any, colour: ComposedEmbedding) -> Iterator[Path]:
    client = MilvusClient(milvus_server.uri, timeout=90)
    for name in client.list_collections():
        if name.startswith(NAME):
            client.drop_collection(name)
    fill(tmp_path, milvus_server.uri, colour, images=20, timeout=90)
    (tmp_path / "uri").write_text(milvus_server.uri)
    yield tmp_path
    for name in client.list_collections():
        if name.startswith(NAME):
            client.drop_collection(name)
    client.close()


@pytest.mark.slow
def test_killed_on_a_real_server_one_whole_collection_answers(server_place, milvus_server, colour, tiny, tried):
    """There, nobody knows that the process is gone: the old collection gets its name back after a while."""
    uri, chance = milvus_server.uri, random.Random(7)
    _, before = rows(uri)
    (server_place / "target").write_text("tiny")
    with warm(what="reindexing") as run:
        for _ in range(6 * EFFORT):
            ended = run(server_place, "time", chance.uniform(0.5, 8.0))
            check(uri, before, colour, tiny)
            tried["runs of reindex killed"] += ended["killed"]
        assert run(server_place)["step"] == "end"
    assert check(uri, before, tiny) == tiny.model_id
    assert [name for name in describe_store(uri) if name.startswith(NAME)] == [NAME]
