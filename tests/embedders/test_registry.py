"""A model by its name: which family loads it, and what it takes to add a family."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from llama_index.core.schema import QueryBundle
from mcp_server_mm_retriever import create_server, image_search

from mm_retriever import ComposedEmbedding, ComposedRetriever, ImagePolicy, ingest_images, load_embedder, open_store
from mm_retriever.cli import main
from mm_retriever.embedders import registry
from mm_retriever.embedders.embedder import Content
from mm_retriever.errors import CheckpointError, QueryError
from tests.support.colour_embedding import paint
from tests.support.mean_colour import MeanColour

COLOURS = ("red", "blue", "green", "white")


@pytest.fixture
def family(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one word that makes a module a model family."""
    monkeypatch.setattr(registry, "FAMILIES", (*registry.FAMILIES, "tests.support.mean_colour"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for colour in COLOURS:
        paint(tmp_path / "photos" / f"{colour}.png", colour)
    return tmp_path / "photos"


def cli(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    return int(ended.value.code or 0)


def test_a_family_of_one_module_works_from_the_command_line_to_mcp(family, folder, tmp_path, capsys):
    """Our choice: a new model is one file and one word."""
    db = tmp_path / "colours.db"
    assert cli("index", folder, "--db", db, "--model", "mean-colour") == 0
    capsys.readouterr()
    assert cli("search", "--text", "blue", "--db", db, "--model", "mean-colour", "--json") == 0
    assert Path(json.loads(capsys.readouterr().out)[0]["file_path"]).stem == "blue"
    model = ComposedEmbedding("mean-colour")
    with open_store(db, model) as store:
        assert ingest_images(folder, store, model, show_progress=False).unchanged == 4
        hits = ComposedRetriever(store, model).retrieve(QueryBundle("red", image_path=str(folder / "red.png")))
        assert Path(hits[0].node.image_path).stem == "red"
        search = image_search(store, model, roots=[folder])
        assert create_server(search) is not None
        best = search.search(text="green").pictures[0].id
        assert Path(store.get_nodes([best])[0].image_path).stem == "green"


def test_every_query_reaches_the_model_as_a_query(folder, tmp_path):
    """Models with instructions embed queries otherwise than documents: text, image, and both."""
    model = ComposedEmbedding(MeanColour(), image_policy=ImagePolicy())
    image = str(folder / "red.png")
    with open_store(tmp_path / "a.db", model) as store:
        ingest_images(folder, store, model, show_progress=False)
        assert model.embedder.queries == []
        retriever = ComposedRetriever(store, model)
        retriever.retrieve("blue")
        retriever.retrieve(QueryBundle("", image_path=image))
        retriever.retrieve(QueryBundle("blue", image_path=image))
        retriever.retrieve(QueryBundle("", custom_embedding_strs=["red", "blue"]))
        for text, source in (("blue", None), (None, image), ("blue", image)):
            model.get_query_bundle(text, source)
    kinds = [(content.text, content.image is not None) for content in model.embedder.queries]
    assert kinds[:5] == [("blue", False), ("", True), ("blue", True), ("red", False), ("blue", False)]
    assert kinds[5:] == [("blue", False), ("", True), ("blue", True)]


def test_a_cache_keeps_queries_and_documents_apart(tmp_path):
    """Equal content has two vectors where a model embeds queries otherwise."""

    class Asymmetric(MeanColour):
        def encode(self, contents, *, query=False):
            return super().encode(contents, query=query)[:, :: -1 if query else 1]

    model = ComposedEmbedding(Asymmetric(), cache_dir=tmp_path)
    for _ in range(2):
        document, query = model.get_text_embedding("red"), model.get_query_embedding("red")
        assert np.allclose(document, query[::-1])
        assert document != query


def test_options_reach_the_family(family):
    assert ComposedEmbedding("mean-colour", options={"query_gain": 2.0}).embedder.query_gain == 2.0


def test_the_bundled_model_is_found_by_its_family():
    embedder = load_embedder("tiny", device="cpu")
    vectors = embedder.encode([Content("a red mug")])
    assert vectors.shape == (1, embedder.dimension)
    assert abs(np.linalg.norm(vectors) - 1) < 1e-5
    assert embedder.space.startswith("visualized-bge@")


def test_files_of_no_known_family_are_refused_by_name(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "resnet"}')
    (tmp_path / "model.safetensors").write_bytes(b"")
    reason = r"no known family \(visualized_bge, .*\).*BAAI/bge-visualized-base-en-v1.5"
    with pytest.raises(CheckpointError, match=reason):
        ComposedEmbedding(tmp_path)


def test_an_option_that_the_family_has_not_is_refused_by_its_name():
    """Of the names of Python's arguments, only those of the family of the model are options."""
    with pytest.raises(QueryError, match="'tiny' is of a family that has no option 'text_weight'"):
        load_embedder("tiny", device="cpu", text_weight=0.3)
    with pytest.raises(QueryError, match="no option 'text_weight'"):
        ComposedEmbedding("tiny", options={"text_weight": 0.3}, backend="openvino")
