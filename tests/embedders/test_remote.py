"""A model on a server: the vectors are those of the same model on this machine, and no other answer is taken for one.

The real server is Starlette around the bundled model; the scripted one says what no real one would.
"""

from __future__ import annotations

import base64
import json
import pickle
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mm_retriever import ComposedEmbedding, ComposedRetriever, VisualizedBGEEmbedding, ingest_images, open_store
from mm_retriever.embedders.embedder import Content, Embedder
from mm_retriever.embedders.registry import load_embedder
from mm_retriever.embedders.remote import RemoteEmbedding
from mm_retriever.errors import CopyError, ModelServerError, QueryError
from tests.support.colour_embedding import paint
from tests.support.llm_server import Reply, ScriptedServer
from tests.support.model_server import INSTRUCTED, ModelServer, serving

KEY = "sk-very-secret"


@pytest.fixture(scope="module")
def local() -> Embedder:
    return load_embedder("tiny", device="cpu")


@pytest.fixture(scope="module")
def running(local: Embedder) -> Iterator[ModelServer]:
    with serving(local) as served:
        yield served


@pytest.fixture
def served(running: ModelServer) -> ModelServer:
    running.requests.clear()
    return running


@pytest.fixture
def scripted() -> Iterator[ScriptedServer]:
    with ScriptedServer() as script:
        yield script


def noise(seed: int, size: tuple[int, int] = (40, 30)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def remote(url: str, **options: Any) -> RemoteEmbedding:
    return RemoteEmbedding(url, "served", **{"retry_wait_s": 0.0, "timeout_s": 20.0} | options)


# ------------------------------------------------------------------------------------------ a real server


@pytest.mark.parametrize("batch_texts", [False, True])
def test_vectors_are_those_of_the_same_model_here(served: ModelServer, local: Embedder, batch_texts: bool) -> None:
    """Truth: the local model; texts, images and pairs, mixed, in their order."""
    model = remote(served.url, batch_texts=batch_texts)
    images = [noise(seed) for seed in range(3)]
    kinds: list[tuple[str, Image.Image | None]] = [
        ("a red mug", None), ("", images[0]), ("in blue", images[1]), ("Tee", None), ("", images[2]), ("x " * 300, None)
    ]  # fmt: skip
    contents, expected = [
        [Content(text, None if image is None else embedder.prepare(image)) for text, image in kinds]
        for embedder in (model, local)
    ]
    vectors = model.encode(contents)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(vectors, local.encode(expected), atol=1e-6)
    assert model.dimension == local.dimension
    assert ["input" in request for request in served.requests].count(True) == batch_texts
    assert len(served.requests) == (4 if batch_texts else 6)


def test_images_are_sent_as_the_very_pixels_unless_jpeg_is_chosen(served: ModelServer, local: Embedder) -> None:
    """Truth: PNG is lossless; an image that is larger than `max_pixels` is shrunk to it."""
    model = remote(served.url, max_pixels=600)
    assert model.prepare(noise(1, (20, 30))).shape == (30, 20, 3)
    assert model.prepare(noise(1, (40, 60))).shape == (30, 20, 3)
    assert model.prepare(noise(1, (6000, 1))).shape[:2] == (1, 1897)
    pixels = model.prepare(noise(2))
    model.encode([Content(image=pixels)])
    assert served.content(served.requests[0]["messages"][0]["content"]).image is not None
    jpeg = remote(served.url, image_format="jpeg")
    assert jpeg.encode([Content(image=pixels)])[0] @ model.encode([Content(image=pixels)])[0] > 0.9
    assert jpeg.note != model.note


def test_queries_and_documents_have_their_own_instructions(served: ModelServer, local: Embedder) -> None:
    """Truth: the system's message; an instruction makes another space, and text goes as messages."""
    model = remote(served.url, query_instruction="Find", document_instruction="Keep", batch_texts=True)
    for query, word in ((True, "Find"), (False, "Keep")):
        vector = model.encode([Content("mug")], query=query)
        np.testing.assert_allclose(vector, local.encode([Content(f"{word}{INSTRUCTED}mug")]), atol=1e-6)
    plain, other = remote(served.url), remote(served.url, query_instruction="Search")
    assert len({model.space, plain.space, other.space, remote(served.url, batch_texts=True).space}) == 4
    assert plain.space == remote(served.url + "/", timeout_s=1.0, image_format="jpeg").space


def test_shorter_vectors_are_asked_for_and_have_length_1(served: ModelServer, local: Embedder) -> None:
    """Truth: Matryoshka vectors are the first numbers, normalised."""
    model = remote(served.url, dimensions=16)
    assert (model.dimension, served.requests) == (16, [])
    first = local.encode([Content("mug")])[:, :16]
    np.testing.assert_allclose(model.encode([Content("mug")]), first / np.linalg.norm(first), atol=1e-6)


def test_it_indexes_and_searches_as_any_embedding(served: ModelServer, tmp_path: Path) -> None:
    """Our choice: `ComposedEmbedding(name, base_url=...)`; the store knows the model by name and not by address."""
    model = ComposedEmbedding("served", base_url=served.url, cache_dir=tmp_path / "vectors")
    here = VisualizedBGEEmbedding("tiny", device="cpu")
    for colour in ("red", "blue", "green"):
        paint(tmp_path / "photos" / f"{colour}.png", colour)
    with open_store(tmp_path / "remote.db", model) as store:
        assert ingest_images(tmp_path / "photos", store, model, show_progress=False).indexed == 3
        hits = ComposedRetriever(store, model, top_k=3).retrieve(
            model.get_query_bundle("mug", tmp_path / "photos/red.png")
        )
    with open_store(tmp_path / "local.db", here) as store:
        ingest_images(tmp_path / "photos", store, here, show_progress=False)
        own = ComposedRetriever(store, here, top_k=3).retrieve(
            here.get_query_bundle("mug", tmp_path / "photos/red.png")
        )
    assert [hit.score for hit in hits] == pytest.approx([hit.score for hit in own], abs=1e-5)
    count = len(served.requests)
    again = ComposedEmbedding("served", base_url=served.url, options={"dimensions": here.dimension})
    with open_store(tmp_path / "remote.db", again) as store:
        assert store.count() == 3
    assert len(served.requests) == count
    assert "served, server" in again.model_note


def test_a_server_that_goes_away_ends_an_ingestion_and_none_is_lost(scripted: ScriptedServer, tmp_path: Path) -> None:
    """Our choice: no image is skipped for it; the next run goes on. An image that the server refuses is skipped."""
    for colour in ("red", "blue", "green"):
        paint(tmp_path / "photos" / f"{colour}.png", colour)
    refused: list[str] = []

    def refusing(request: dict[str, Any]) -> Reply:
        part = request["messages"][0]["content"][0]
        if part["type"] == "image_url" and refused in ([], [part["image_url"]["url"]]):
            refused[:] = [part["image_url"]["url"]]
            return 400, b'{"error": "this image?"}'
        return vectors([0.0, 1.0])

    scripted.reply = refusing
    options = {"attempts": 2, "retry_wait_s": 0.0}
    model = ComposedEmbedding("served", base_url=scripted.url, options=options)
    with open_store(tmp_path / "a.db", model) as store:
        scripted.reply = lambda _: (503, b"down")
        with pytest.raises(ModelServerError, match="status 503"):
            ingest_images(tmp_path / "photos", store, model, show_progress=False)
        scripted.reply = refusing
        report = ingest_images(tmp_path / "photos", store, model, show_progress=False)
    assert (report.indexed, len(report.skipped)) == (2, 1)
    assert "this image?" in str(report.skipped[0])


# ------------------------------------------------------------------------------------------ a server that says anything


def vectors(*rows: Any, **more: Any) -> Reply:
    return 200, json.dumps({"data": [{"index": i, "embedding": row} for i, row in enumerate(rows)]} | more).encode()


def two(first: Any, second: Any) -> Reply:
    return 200, json.dumps({"data": [first, second]}).encode()


HOSTILE = [
    (lambda: (200, b"[]"), "no vectors in the answer"),
    (lambda: (200, b'{"data": {}}'), "no vectors in the answer"),
    (lambda: vectors([1.0], [1.0]), "2 vectors in the answer for 1 contents"),
    (lambda: vectors(), "0 vectors in the answer"),
    (lambda: vectors([]), "a vector is a list of numbers"),
    (lambda: vectors("AAAA"), "a vector is a list of numbers, not 'AAAA'"),
    (lambda: vectors({"0": 1}), "a vector is a list of numbers"),
    (lambda: vectors(None), "a vector is a list of numbers"),
    (lambda: vectors(["1", 2]), "other than numbers"),
    (lambda: vectors([True, 2]), "other than numbers"),
    (lambda: vectors([[1.0]]), "other than numbers"),
    (lambda: vectors([float("nan"), 1]), "NaN"),
    (lambda: vectors([float("inf"), 1]), "NaN or infinity"),
    (lambda: vectors([10**400, 1]), "NaN or infinity"),
    (lambda: vectors([0, 0.0, -0.0]), "a vector of zeros"),
    (lambda: vectors([1.0, 0.0]), "a vector of 2 numbers, and 3 are expected"),
    (lambda: (200, b'{"data": [{"index": 7, "embedding": [1, 2, 3]}]}'), "an index 7"),
    (lambda: (200, b'{"data": [7]}'), "a vector is a list of numbers, not None"),
    (lambda: (200, b'{"data": ' + b"[" * 200_000), "no JSON"),
    (lambda: (200, b'{"data": [{"embedding": [' + b"9" * 5000 + b"]}]}"), "no JSON"),
    (lambda: (200, b"<html>"), "no JSON"),
    (lambda: (200, b"\xff\xfe\x00"), "no JSON"),
    (lambda: (200, b'{"data": [{"embedding": [' + b"1," * 4_500_000 + b"1]}]}"), "larger than"),
    (lambda: (200, b'{"error": {"message": "no\\nimage", "code": 422}}'), "answered with an error: no image"),
    (lambda: (200, b'{"object": "error", "message": "no image", "code": 400}'), "answered with an error: no image"),
    (lambda: (200, b'{"detail": "no image"}'), "answered with an error: no image"),
    (lambda: (200, b'{"errors": ["no image"]}'), "answered with an error: .*no image"),
    (lambda: (307, b""), "redirects"),
    (lambda: (404, b'{"detail": "Not Found"}'), "no such model or no such address.*Not Found.*usually in /v1"),
    (lambda: (401, json.dumps({"error": {"message": f"bad key {KEY}"}}).encode()), r"API key.*bad key \*\*\*"),
]


@pytest.mark.parametrize(("reply", "says"), HOSTILE)
def test_an_answer_that_is_not_the_vectors_is_an_error(
    scripted: ScriptedServer, reply: Callable[[], Reply], says: str
) -> None:
    """A wrong vector that looks right would be worse. One line, in which the key is not."""
    scripted.reply = lambda _: reply()
    model = remote(scripted.url, dimensions=3, api_key=KEY, attempts=1)
    with pytest.raises(ModelServerError, match=says) as caught:
        model.encode([Content("mug")])
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 800
    assert KEY not in f"{caught.value} {caught.value.__cause__} {model!r} {model.server!r}"
    assert scripted.requests[0]["authorization"] == f"Bearer {KEY}"


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (({"index": 0, "embedding": [1]}, {"index": 0, "embedding": [2]}), "an index 0"),
        (({"index": 0, "embedding": [1]}, {"embedding": [2]}), "an index None"),
        (({"index": 0, "embedding": [1]}, {"index": True, "embedding": [2]}), "an index True"),
        (({"index": 0, "embedding": [1]}, {"index": -1, "embedding": [2]}), "an index -1"),
        (({"index": 0, "embedding": [1]}, {"index": 1, "embedding": [2, 3]}), "different lengths"),
    ],
)
def test_each_vector_of_a_batch_comes_once(scripted: ScriptedServer, data: tuple[Any, Any], says: str) -> None:
    scripted.reply = lambda _: two(*data)
    with pytest.raises(ModelServerError, match=says):
        remote(scripted.url, batch_texts=True).encode([Content("a"), Content("b")])


def test_any_status_of_success_is_one(scripted: ScriptedServer) -> None:
    """RFC 9110: 200 to 299."""
    scripted.reply = lambda _: (201, vectors([3.0, 4.0])[1])
    assert RemoteEmbedding(scripted.url, "m").encode([Content("mug")]).tolist() == [pytest.approx([0.6, 0.8])]


def test_vectors_are_put_in_order_by_their_index_and_scaled_to_length_1(scripted: ScriptedServer) -> None:
    """Truth: the index of OpenAI's protocol; numbers too large or small to be squared have a direction too."""
    scripted.reply = lambda _: two({"index": 1, "embedding": [0, 3e-300]}, {"index": 0, "embedding": [-1e300, 0]})
    found = remote(scripted.url, batch_texts=True).encode([Content("a"), Content("b")])
    assert found.tolist() == [[-1, 0], [0, 1]]


def test_vectors_in_base64_are_read(scripted: ScriptedServer) -> None:
    """Truth: OpenAI's protocol, 32-bit floats in little-endian order. Servers are asked for them by `extra_body`."""
    numbers = [[0.6, -0.8], [0.0, 2.0]]
    coded = [base64.b64encode(struct.pack("<2f", *row)).decode() for row in numbers]
    scripted.reply = lambda _: two({"index": 1, "embedding": coded[1]}, {"index": 0, "embedding": coded[0]})
    model = remote(scripted.url, batch_texts=True, extra_body={"encoding_format": "base64"})
    assert np.allclose(model.encode([Content("a"), Content("b")]), [[0.6, -0.8], [0, 1]])
    assert scripted.requests[0]["encoding_format"] == "base64"
    for wrong in ("no base64!", coded[0][:-4], ""):
        scripted.reply = lambda _, wrong=wrong: two(
            {"index": 0, "embedding": wrong}, {"index": 1, "embedding": coded[1]}
        )
        with pytest.raises(ModelServerError, match=r"gave no vectors: "):
            model.encode([Content("a"), Content("b")])


def test_answers_that_come_in_another_order_are_put_in_theirs(scripted: ScriptedServer) -> None:
    """Truth: each text says which vector it gets; those of the first come last."""

    def slow(request: dict[str, Any]) -> Reply:
        number = int(request["messages"][0]["content"][0]["text"])
        time.sleep(0.002 * (9 - number))
        return vectors([float(row == number) for row in range(10)])

    scripted.reply = slow
    found = remote(scripted.url, concurrency=10).encode([Content(str(row)) for row in range(10)])
    assert np.array_equal(found, np.eye(10))


def test_overload_is_asked_again_as_the_server_says_and_then_given_up(scripted: ScriptedServer) -> None:
    """Truth: the clock, the requests, and RFC 9110's Retry-After."""
    replies: list[Reply] = [(503, b"busy"), (429, b"{}"), vectors([0, 1])]
    scripted.reply = lambda _: replies.pop(0)
    scripted.headers = {"Retry-After": "0.3"}
    started = time.monotonic()
    assert remote(scripted.url).encode([Content("a")]).tolist() == [[0, 1]]
    assert time.monotonic() - started >= 0.6
    scripted.headers = {"Retry-After": "3600"}
    scripted.reply = lambda _: (503, b"busy")
    with pytest.raises(
        ModelServerError, match=r"in 1 request .*the server failed, status 503.*busy.*3600 s of patience"
    ):
        remote(scripted.url).encode([Content("a")])
    scripted.headers = {}
    with pytest.raises(ModelServerError, match="in 3 requests"):
        remote(scripted.url, attempts=3).encode([Content("a")])


def test_one_that_fails_ends_the_others(scripted: ScriptedServer) -> None:
    """Our choice: what was not sent is not, and what would be tried again is given up."""

    def failing(request: dict[str, Any]) -> Reply:
        if request["messages"][0]["content"][0]["text"] == "0":
            return 400, b'{"error": "no"}'
        return 503, b"{}"

    scripted.reply = failing
    with pytest.raises(ModelServerError, match="refused the request"):
        remote(scripted.url, attempts=9, retry_wait_s=0.05, concurrency=4).encode([Content(str(n)) for n in range(99)])
    assert len(scripted.requests) < 30


def test_a_server_that_does_not_answer_is_given_up_in_time(scripted: ScriptedServer) -> None:
    """Truth: the clock; the server is silent for a minute."""
    over = threading.Event()

    def silent(_: dict[str, Any]) -> Reply:
        over.wait(60)
        return vectors([1])

    scripted.reply = silent
    started = time.monotonic()
    with pytest.raises(ModelServerError, match=r"in 2 requests .*within 0.2 s"):
        remote(scripted.url, timeout_s=0.2, attempts=2).encode([Content("a")])
    assert time.monotonic() - started < 30
    over.set()


# ------------------------------------------------------------------------------------------ keys, copies, options


def test_a_key_is_in_no_pickle_dict_or_event(served: ModelServer) -> None:
    model = ComposedEmbedding("served", base_url=served.url, api_key=KEY)
    for thing in (model, model.embedder):
        with pytest.raises(CopyError, match="api_key"):
            pickle.dumps(thing)
    described = model.to_dict()
    assert KEY not in f"{described} {model!r} {model.to_payload() if hasattr(model, 'to_payload') else ''}"
    with pytest.raises(CopyError, match="api_key="):
        ComposedEmbedding.from_dict(described)
    assert ComposedEmbedding.from_dict(described, api_key=KEY).model_id == model.model_id


def test_without_a_key_copies_ask_the_same_server(served: ModelServer) -> None:
    model = ComposedEmbedding("served", base_url=served.url, options={"query_instruction": "Find", "dimensions": 16})
    for copied in (pickle.loads(pickle.dumps(model)), ComposedEmbedding.from_dict(model.to_dict())):
        assert copied.model_id == model.model_id
        assert copied.get_query_embedding("mug") == pytest.approx(model.get_query_embedding("mug"), abs=1e-6)
    embedder = pickle.loads(pickle.dumps(model.embedder))
    assert embedder.space == model.model_id


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"base_url": "gpu:8000"}, "'gpu:8000' is no address of a server: give one like"),
        ({"base_url": "ftp://gpu/v1"}, "is no address"),
        ({"base_url": "http://gpu:99999/v1"}, "is no address"),
        ({"base_url": "http://gpu/v1?key=1"}, "is no address"),
        ({"base_url": f"http://me:{KEY}@gpu/v1"}, "give a key as api_key"),
        ({"device": "cuda"}, "'m' runs on a server, which chooses its device"),
        ({"revision": "main"}, "revision='main' is of a hub repository"),
        ({"options": {"window": 3}}, "no option 'window'; there are .*dimensions"),
        ({"options": {"dimensions": 0}}, "dimensions=0: at least 1"),
        ({"options": {"image_format": "gif"}}, "image_format='gif': there are 'png' and 'jpeg'"),
        ({"options": {"extra_body": {"x": float("nan")}}}, "extra_body goes into JSON"),
        ({"options": {"api_key": KEY}}, "arguments of their own"),
        ({"base_url": None, "api_key": KEY}, "api_key goes with base_url"),
    ],
)
def test_what_does_not_go_together_is_one_line(options: dict[str, Any], says: str) -> None:
    with pytest.raises(QueryError, match=says) as caught:
        ComposedEmbedding("m", **{"base_url": "http://127.0.0.1:9/v1"} | options)
    assert KEY not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_class_of_one_family_asks_no_server() -> None:
    with pytest.raises(QueryError, match="runs on this machine; ComposedEmbedding asks a server"):
        VisualizedBGEEmbedding("m", base_url="http://127.0.0.1:9/v1")
