"""`ComposedRetriever` on a real Milvus Lite, with the colour embedding of the tests as the model."""

from __future__ import annotations

import asyncio
import math
import shutil
from typing import Any

import numpy as np
import pytest
from llama_index.core.llms import MockLLM
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.schema import ImageNode, NodeWithScore, QueryBundle, TextNode
from llama_index.core.vector_stores.types import FilterOperator, MetadataFilter, MetadataFilters
from PIL import Image

from mm_retriever.errors import FilterError, ImageLoadError, QueryError, StoreMismatchError
from mm_retriever.ingest import ingest_images
from mm_retriever.refinement import Refinement
from mm_retriever.retriever import ComposedRetriever
from mm_retriever.store import open_store
from tests.support.colour_embedding import COLOURS, ColourEmbedding, paint
from tests.support.ingesting import ingest, nodes


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """One image of each colour, red three times over (two copies of one file, one of another size)."""
    folder = tmp_path_factory.mktemp("retriever")
    for colour in COLOURS:
        paint(folder / "photos" / f"{colour}.png", colour)
    shutil.copy(folder / "photos" / "red.png", folder / "photos" / "red-copy.png")
    paint(folder / "photos" / "red-large.png", "red", size=(60, 40))
    paint(folder / "outside.png", "green", size=(50, 50))
    model = ColourEmbedding()
    with open_store(folder / "photos.db", model) as store:
        ingest_images(folder / "photos", store, model, show_progress=False)
        yield store, model, folder / "photos"


def retriever(world: Any, **options: Any) -> ComposedRetriever:
    store, model, _ = world
    return ComposedRetriever(store, model, **options)


def names(found: list[NodeWithScore]) -> list[str]:
    return [one.node.metadata["file_name"] for one in found]


def where(key: str, value: Any, operator: str = "==") -> MetadataFilters:
    return MetadataFilters(filters=[MetadataFilter(key=key, value=value, operator=FilterOperator(operator))])


# ------------------------------------------------------------------------------------------ the three kinds of query


def test_a_text_finds_images(world):
    found = retriever(world, top_k=1).retrieve("something green")
    assert names(found) == ["green.png"]
    assert isinstance(found[0].node, ImageNode)
    assert found[0].score == pytest.approx(1.0)
    assert found[0].node.embedding is None


def test_an_image_finds_images_like_it(world):
    folder = world[2]
    bundle = QueryBundle(query_str="", image_path=str(folder.parent / "outside.png"))
    assert names(retriever(world, top_k=1).retrieve(bundle)) == ["green.png"]


def test_an_image_and_a_text_are_one_query(world):
    """LlamaIndex's own multi-modal retriever ignores the image as soon as there is text."""
    folder = world[2]
    bundle = QueryBundle(query_str="blue", image_path=str(folder / "yellow.png"))
    found = retriever(world, top_k=2).retrieve(bundle)
    assert set(names(found)) == {"blue.png", "yellow.png"}
    assert [one.score for one in found] == pytest.approx([math.sqrt(0.5)] * 2)


def test_a_bundle_that_brings_its_vector_is_searched_by_it(world):
    _, model, _ = world
    before = model.embedded
    bundle = QueryBundle(query_str="green", embedding=model.get_text_embedding("blue"))
    assert names(retriever(world, top_k=1).retrieve(bundle)) == ["blue.png"]
    assert model.embedded == before


def test_several_texts_of_a_bundle_are_averaged_as_llamaindex_does(world):
    bundle = QueryBundle(query_str="ignored", custom_embedding_strs=["green", "blue"])
    assert set(names(retriever(world, top_k=2).retrieve(bundle))) == {"green.png", "blue.png"}


def test_many_queries_are_embedded_together_and_answered_in_their_order(world):
    """Each answer is that of `retrieve`; five queries are one call of the model."""
    _, model, folder = world
    image = str(folder / "yellow.png")
    queries = [
        "green",
        QueryBundle(query_str="", image_path=image),
        QueryBundle(query_str="blue", image_path=image),
        QueryBundle(query_str="x", embedding=model.get_text_embedding("purple")),
        QueryBundle(query_str="x", custom_embedding_strs=["green", "blue"]),
    ]
    one = retriever(world, similarity_top_k=2)
    alone = [names(one.retrieve(query)) for query in queries]
    assert [len(found) for found in alone] == [2] * 5
    assert [names(found) for found in one.retrieve_many(queries)] == alone
    assert [names(found) for found in asyncio.run(one.aretrieve_many(queries))] == alone
    assert one.retrieve_many([]) == []
    liked = retriever(world, top_k=2, refinement=Refinement(images=(image,)))
    assert [names(found) for found in liked.retrieve_many(["", "green"])] == [
        names(liked.retrieve(query)) for query in ("", "green")
    ]
    with pytest.raises(QueryError, match="nothing to search for"):
        one.retrieve_many(["green", " "])


def test_asynchronous_retrieval_gives_the_same_in_every_event_loop(world):
    one = retriever(world, top_k=3)
    expected = names(one.retrieve("red"))

    async def several() -> list[list[NodeWithScore]]:
        return await asyncio.gather(*(one.aretrieve("red") for _ in range(4)))

    for _ in range(2):
        assert [names(found) for found in asyncio.run(several())] == [expected] * 4


def test_it_serves_a_query_engine(world):
    engine = RetrieverQueryEngine.from_args(retriever(world, top_k=1), llm=MockLLM())
    assert names(engine.query("purple").source_nodes) == ["purple.png"]


def test_text_nodes_beside_images_are_found_too(world, tmp_path):
    _, model, folder = world
    with open_store(tmp_path / "mixed.db", model) as store:
        ingest_images([folder / "red.png", TextNode(text="a green note")], store, model, show_progress=False)
        found = ComposedRetriever(store, model, top_k=1).retrieve("green")
        assert found[0].node.get_content() == "a green note"


# ------------------------------------------------------------------------------------------ limits


def test_filters_and_a_lowest_score(world):
    found = retriever(world, filters=where("file_name", ["red.png", "blue.png"], "in")).retrieve("red")
    assert names(found) == ["red.png", "blue.png"]
    assert set(names(retriever(world, min_score=0.9).retrieve("red"))) == {"red.png", "red-copy.png", "red-large.png"}
    assert retriever(world, min_score=1.1).retrieve("red") == []


def test_top_k_is_the_number_of_results(world):
    assert len(retriever(world, top_k=4).retrieve("red")) == 4
    assert len(retriever(world, top_k=16_384).retrieve("red")) == len(COLOURS) + 2
    for bad in (0, -3, 16_385, True, 2.0, "9"):
        with pytest.raises(QueryError, match="from 1 to 16384"):
            retriever(world, top_k=bad)


def test_numbers_of_numpy_are_numbers_of_results(world):
    assert len(retriever(world, top_k=np.int64(2)).retrieve("red")) == 2
    with pytest.raises(QueryError, match="from 1 to 16384"):
        retriever(world, top_k=np.bool_(True))


def test_one_query_is_no_list_of_queries(world):
    """A text would be searched for letter by letter."""
    for query in ("red", QueryBundle("red")):
        with pytest.raises(QueryError, match="takes a list of queries"):
            retriever(world).retrieve_many(query)
    assert len(retriever(world).retrieve_many(text for text in ("red", "blue"))) == 2


# ------------------------------------------------------------------------------------------ without the query image


@pytest.mark.parametrize("text", ["", "blue"])
def test_the_query_image_and_its_copies_are_left_out_on_request(world, text, monkeypatch):
    """By contents: a copy under another name is the same image, one of another size is not."""
    folder = world[2]
    bundle = QueryBundle(query_str=text, image_path=str(folder / "red.png"))
    assert "red.png" in names(retriever(world, top_k=4).retrieve(bundle))
    found = retriever(world, top_k=4, exclude_query_image=True).retrieve(bundle)
    assert len(found) == 4, "others take the free places"
    assert not {"red.png", "red-copy.png"} & set(names(found))
    assert "red-large.png" in names(found)
    monkeypatch.chdir(folder)
    relative = QueryBundle(query_str=text, image_path="red.png")
    assert names(retriever(world, top_k=4, exclude_query_image=True).retrieve(relative)) == names(found)


def test_more_copies_than_results_are_all_left_out(world, tmp_path):
    _, model, folder = world
    for number in range(12):
        (tmp_path / "photos").mkdir(exist_ok=True)
        shutil.copy(folder / "red.png", tmp_path / "photos" / f"{number}.png")
    paint(tmp_path / "photos" / "blue.png", "blue")
    with open_store(tmp_path / "a.db", model) as store:
        ingest_images(tmp_path / "photos", store, model, show_progress=False)
        alone = ComposedRetriever(store, model, top_k=2, exclude_query_image=True)
        bundle = QueryBundle(query_str="", image_path=str(folder / "red.png"))
        assert names(alone.retrieve(bundle)) == ["blue.png"]


def test_a_query_image_that_is_gone_is_left_out_by_its_name(world):
    """A bundle may bring its vector along, and the file need not be on this machine."""
    _, model, _ = world
    bundle = QueryBundle(query_str="", image_path="/not/here/red.png", embedding=model.get_text_embedding("red"))
    assert len(retriever(world, top_k=3, exclude_query_image=True).retrieve(bundle)) == 3


def test_text_queries_are_not_touched_by_it(world):
    assert names(retriever(world, top_k=2, exclude_query_image=True).retrieve("green"))[0] == "green.png"


# ------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize("bundle", ["", "  ", QueryBundle(""), QueryBundle("", image_path="")])
def test_an_empty_query_is_refused(world, bundle):
    with pytest.raises(QueryError, match="nothing to search for"):
        retriever(world).retrieve(bundle)


def test_an_image_that_cannot_be_read_is_an_error(world):
    with pytest.raises(ImageLoadError, match="no such file"):
        retriever(world).retrieve(QueryBundle("", image_path="/nowhere.png"))


def test_a_vector_of_another_model_is_refused(world):
    with pytest.raises(QueryError, match="2 numbers; the collection holds 27"):
        retriever(world).retrieve(QueryBundle("x", embedding=[1.0, 2.0]))


def test_what_is_wrong_with_the_options_is_said_at_once(world):
    with pytest.raises(FilterError):
        retriever(world, filters=where("a/b", 1))
    with pytest.raises(QueryError, match="NaN"):
        retriever(world, min_score=math.nan)
    with pytest.raises(StoreMismatchError, match="opened for 'colours'"):
        ComposedRetriever(world[0], ColourEmbedding(model_name="other"))


# ------------------------------------------------------------------------------------------ copies


@pytest.fixture
def model():
    return ColourEmbedding()


@pytest.fixture
def store(tmp_path, model):
    with open_store(tmp_path / "copies.db", model) as store:
        yield store


@pytest.mark.parametrize("options", [{}, {"exclude_query_image": True}])
def test_copies_are_found_once_and_the_next_results_take_their_places(tmp_path, store, model, options):
    one = paint(tmp_path / "a" / "0.png", "red")
    for n in range(1, 30):
        shutil.copy(one, one.with_name(f"{n}.png"))
    for colour in ("purple", "black", "white"):
        paint(tmp_path / "a" / f"{colour}.png", colour)
    ingest(tmp_path / "a", store, model)
    bundle = model.get_query_bundle("red", None)
    if options:
        bundle = model.get_query_bundle(None, paint(tmp_path / "query.png", "red", size=(5, 5)))
    assert len({hit.node.metadata["digest"] for hit in ComposedRetriever(store, model, top_k=3).retrieve(bundle)}) == 1
    hits = ComposedRetriever(store, model, top_k=3, unique=True, **options).retrieve(bundle)
    assert len({hit.node.metadata["digest"] for hit in hits}) == len(hits) == 3
    assert hits[0].node.metadata["copies_left_out"] > 0
    assert "copies_left_out" not in nodes(store)["0.png"].metadata, "the stored node stays as it was"
    assert len(ComposedRetriever(store, model, top_k=9, unique=True).retrieve(bundle)) == 4


def test_nodes_without_a_digest_are_never_taken_for_copies(store, model):
    vector = model.get_text_embedding("red")
    store.add([ImageNode(id_=name, image_path="/a.png", embedding=vector) for name in ("a", "b")])
    assert len(ComposedRetriever(store, model, unique=True).retrieve(model.get_query_bundle("red"))) == 2


@pytest.mark.parametrize("digest", ["v1", 7, ["a", "b"]])
def test_a_column_of_the_callers_that_is_called_digest_makes_no_copies(store, model, digest):
    vector, metadata = model.get_text_embedding("red"), {"digest": digest}
    store.add([ImageNode(id_=id_, image_path=f"/{id_}.png", embedding=vector, metadata=metadata) for id_ in "ab"])
    assert len(ComposedRetriever(store, model, unique=True).retrieve(model.get_query_bundle("red"))) == 2


def test_the_query_image_is_left_out_where_width_is_a_column_of_the_callers(store, model, tmp_path):
    """It is the width of the thing, not of its image, and ingestion did not see the file."""
    path = paint(tmp_path / "red.png", "red")
    node = ImageNode(image_path=str(path), metadata={"width": 30, "height": 40})
    [node.embedding] = model.embed_nodes([node])
    store.add([node])
    query = model.get_query_bundle(None, Image.open(path))  # decoded before it became the query
    assert ComposedRetriever(store, model, exclude_query_image=True).retrieve(query) == []
