"""Where Milvus is, and what its failures become."""

from __future__ import annotations

import socket
import time
from types import SimpleNamespace

import pytest
from llama_index.core.schema import ImageNode
from llama_index.core.vector_stores.types import VectorStoreQuery

from mm_retriever.errors import StoreError, StoreUnavailableError
from mm_retriever.store import open_store
from tests.support.processes import ends, free_port, lite_server

MODEL = SimpleNamespace(dimension=3, model_id="three numbers")
QUERY = VectorStoreQuery(query_embedding=[1.0, 0.0, 0.0], similarity_top_k=5)


def node(id_: str, **metadata) -> ImageNode:
    return ImageNode(id_=id_, image_path=f"/{id_}.png", metadata=metadata, embedding=[1.0, 0.0, 0.0])


# ------------------------------------------------------------------------------------------ places


@pytest.mark.parametrize(
    ("place", "reason"),
    [
        ("photos", "try 'photos.db'"),
        ("photos.DB", "in small letters"),
        ("photos.db/", "in small letters"),
        ("milvus.example.com:19530", "neither a server"),
        ("ftp://milvus.example.com", "neither a server"),
        ("file:///data/photos.db", "without a scheme"),
        ("sqlite:///photos.db", "without a scheme"),
        ("", "neither a server"),
        ("a\0b.db", "NUL byte"),
    ],
)
def test_a_place_that_milvus_would_misread_is_refused_with_the_rule(place, reason, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StoreError, match=reason):
        open_store(place, MODEL)
    assert list(tmp_path.iterdir()) == []


def test_a_file_where_milvus_lite_keeps_a_folder_is_left_alone(tmp_path):
    (tmp_path / "old.db").write_bytes(b"SQLite format 3\0")
    with pytest.raises(StoreError, match="as Milvus Lite 2 wrote it"):
        open_store(tmp_path / "old.db", MODEL)
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot make the folder"):
        open_store(tmp_path / "file" / "x.db", MODEL)
    assert (tmp_path / "old.db").read_bytes() == b"SQLite format 3\0"


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    with open_store("~/photos.db", MODEL):
        assert (tmp_path / "photos.db").is_dir()


# ------------------------------------------------------------------------------------------ servers


@pytest.fixture
def silent_port():
    """A port that accepts connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.mark.parametrize("kind", ["nobody there", "no answer"])
def test_a_server_that_does_not_answer_is_an_error_within_the_timeout(kind, silent_port, capfd):
    port = free_port() if kind == "nobody there" else silent_port
    start = time.monotonic()
    with pytest.raises(StoreUnavailableError, match="no answer from Milvus") as caught:
        open_store(f"http://root:secret@127.0.0.1:{port}", MODEL, timeout=1.5, token="user:hidden")
    assert time.monotonic() - start < 6
    assert isinstance(caught.value, ConnectionError)
    assert "secret" not in str(caught.value)
    assert "hidden" not in str(caught.value)
    assert f"127.0.0.1:{port}" in str(caught.value)
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.slow
def test_a_killed_server_is_an_error_and_a_restarted_one_goes_on(tmp_path):
    """What was acknowledged is there; the collection, which a restart leaves unloaded, is loaded by the first query."""
    port = free_port()
    server = lite_server(tmp_path / "data", port)
    try:
        with open_store(f"http://127.0.0.1:{port}", MODEL, timeout=3) as store:
            assert store.index_type == "HNSW"
            store.add([node("a", year=1)])
            assert store.query(QUERY).ids == ["a"]
            ends(server)
            for call in (lambda: store.query(QUERY), lambda: store.add([node("b")]), lambda: store.delete_nodes(["a"])):
                start = time.monotonic()
                with pytest.raises(StoreUnavailableError, match="no answer"):
                    call()
                assert time.monotonic() - start < 12
            server = lite_server(tmp_path / "data", port)
            assert store.query(QUERY).ids == ["a"]
            store.add([node("b")])
            assert store.count() == 2
    finally:
        ends(server)
