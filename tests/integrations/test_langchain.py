"""The LangChain adapters: LangChain's own standard suites, and what we promise beyond them."""

from __future__ import annotations

import asyncio
import base64
import io
import subprocess
import sys
from dataclasses import dataclass
from datetime import date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any, ClassVar
from uuid import UUID

import numpy as np
import pytest
from langchain_core.documents import Document
from langchain_core.embeddings import DeterministicFakeEmbedding, Embeddings
from langchain_core.indexing import InMemoryRecordManager, index
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables import RunnableLambda, RunnablePassthrough
from langchain_core.tools import BaseTool
from langchain_mm_retriever import (
    ComposedImageRetriever,
    ImageVectorStore,
    RerankCompressor,
    VisualizedBGEEmbeddings,
    image_search_tools,
)
from langchain_tests.integration_tests import (
    EmbeddingsIntegrationTests,
    RetrieversIntegrationTests,
    ToolsIntegrationTests,
    VectorStoreIntegrationTests,
)
from langchain_tests.unit_tests import EmbeddingsUnitTests, ToolsUnitTests
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.schema import ImageNode, NodeWithScore, QueryBundle, TextNode
from llama_index.core.vector_stores.types import MetadataFilter, MetadataFilters
from PIL import Image
from pydantic import Field, ValidationError

from mm_retriever import ComposedRetriever, ImageStore, VisualizedBGEEmbedding, ingest_images, open_store
from mm_retriever.demo.catalogue import draw_product, draw_theme
from mm_retriever.errors import FilterError, ImageLoadError, QueryError
from mm_retriever.search_tools import Conversation, ImageSearch, SearchLimits

ROOT = Path(__file__).resolve().parents[2]
PRODUCTS = {
    "hearts": ("mug", "hearts", "red"),
    "leopard": ("phone case", "leopard", "natural"),
    "stripes": ("cap", "stripes", "blue"),
    "dots": ("sock", "polka dots", "green"),
    "stars": ("tote bag", "stars", "yellow"),
}


@dataclass(frozen=True)
class Shop:
    """Five images and a text in a real store, and the photo of a leopard."""

    store: ImageStore
    model: VisualizedBGEEmbedding
    folder: Path
    leopard: Path


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("langchain")
    for name, (kind, pattern, colour) in PRODUCTS.items():
        draw_product(kind, pattern, colour, 3).save(folder / f"{name}.png")
    leopard = folder / "leopard.jpeg"
    model = VisualizedBGEEmbedding("tiny", device="cpu")
    with open_store(folder / "shop.db", model, hybrid=True) as store:
        ingest_images(folder, store, model, sidecar={"hearts.png": {"sku": "XK-7"}}, show_progress=False)
        text = TextNode(id_="care", text="All mugs are made of porcelain and may go into the dishwasher.")
        ingest_images([text], store, model, show_progress=False)
        draw_theme("leopard", "natural", 1).save(leopard)
        yield Shop(store, model, folder, leopard)


@pytest.fixture
def retriever(shop: Shop) -> ComposedImageRetriever:
    return ComposedImageRetriever(store=shop.store, embeddings=shop.model, k=3)


def names(documents: list[Document]) -> list[str]:
    return [Path(one.metadata["image_path"]).stem if "image_path" in one.metadata else one.id for one in documents]


# ------------------------------------------------------------------------------------------ LangChain's own suites


class _Embeddings:
    @property
    def embeddings_class(self) -> type[Embeddings]:
        return VisualizedBGEEmbeddings

    @property
    def embedding_model_params(self) -> dict[str, Any]:
        return {"model": "tiny", "device": "cpu"}


class TestEmbeddingsUnit(_Embeddings, EmbeddingsUnitTests):
    pass


class TestEmbeddingsIntegration(_Embeddings, EmbeddingsIntegrationTests):
    pass


class _InShop:
    shop: ClassVar[Shop]

    @pytest.fixture(autouse=True, scope="class")
    @classmethod
    def _open_shop(cls, shop: Shop) -> None:
        cls.shop = shop


class TestRetrieverIntegration(_InShop, RetrieversIntegrationTests):
    @property
    def retriever_constructor(self) -> type[BaseRetriever]:
        return ComposedImageRetriever

    @property
    def retriever_constructor_params(self) -> dict[str, Any]:
        return {"store": self.shop.store, "embeddings": self.shop.model}

    @property
    def retriever_query_example(self) -> str:
        return "a red mug with hearts"


class _Tool(_InShop):
    position: ClassVar[int]

    @property
    def tool_constructor(self) -> BaseTool:
        conversation = Conversation()
        conversation.attach("photo", self.shop.leopard)
        return image_search_tools(ImageSearch(self.shop.store, self.shop.model), conversation)[self.position]


class _SearchTool(_Tool):
    position = 0

    @property
    def tool_invoke_params_example(self) -> dict[str, Any]:
        return {"text": "a red mug with hearts", "top_k": 2}


class TestSearchToolUnit(_SearchTool, ToolsUnitTests):
    pass


class TestSearchToolIntegration(_SearchTool, ToolsIntegrationTests):
    pass


class _SimilarTool(_Tool):
    position = 1

    @property
    def tool_invoke_params_example(self) -> dict[str, Any]:
        return {"result": "photo", "change": "as a phone case"}


class TestSimilarToolUnit(_SimilarTool, ToolsUnitTests):
    pass


class TestSimilarToolIntegration(_SimilarTool, ToolsIntegrationTests):
    pass


class _DescribeTool(_Tool):
    position = 2

    @property
    def tool_invoke_params_example(self) -> dict[str, Any]:
        return {"image": "photo"}


class TestDescribeToolUnit(_DescribeTool, ToolsUnitTests):
    pass


class TestDescribeToolIntegration(_DescribeTool, ToolsIntegrationTests):
    pass


class TestVectorStoreIntegration(VectorStoreIntegrationTests):
    """On embeddings of LangChain's own, which know no images."""

    @pytest.fixture
    def vectorstore(self, tmp_path: Path):
        dimension = len(self.get_embeddings().embed_query("dimension"))
        with ImageStore(tmp_path / "a.db", dimension=dimension) as store:
            yield ImageVectorStore(store, self.get_embeddings())


# ------------------------------------------------------------------------------------------ the vector store


def test_a_vector_store_holds_texts_and_images(shop, tmp_path):
    """One collection, searched by either or both; what is stored twice under one id is there once."""
    vectors = ImageVectorStore.from_texts(
        ["porcelain care"],
        VisualizedBGEEmbeddings(shop.model),
        [{"topic": "care"}],
        ids=["care"],
        uri=tmp_path / "a.db",
    )
    with vectors.store:
        images = [
            Document("", id=name, metadata={"image_path": str(shop.folder / f"{name}.png"), "stock": place})
            for place, name in enumerate(PRODUCTS)
        ]
        assert vectors.add_documents(images) == vectors.add_documents(images) == list(PRODUCTS)
        assert vectors.store.count() == 6
        query = {"text": "phone case with this", "image": shop.leopard}
        ((best, score),) = vectors.similarity_search_with_score(query, k=1)
        assert (best.id, best.metadata["stock"], best.page_content) == ("leopard", 1, "leopard.png")
        assert vectors.add_documents(vectors.get_by_ids(["leopard"])) == ["leopard"]
        (node,) = vectors.store.get_nodes(["leopard"])
        assert node.get_content() == ""  # its name is no text of it
        core = ComposedRetriever(vectors.store, shop.model, top_k=1)
        (expected,) = core.retrieve(shop.model.get_query_bundle("phone case with this", shop.leopard))
        assert score == pytest.approx(expected.score)
        relevant = vectors.similarity_search_with_relevance_scores(query, k=1)
        assert relevant[0][1] == pytest.approx((1 + score) / 2)
        assert [one.id for one in vectors.similarity_search("a mug", k=9, filter={"stock": {"$gte": 3}})]
        assert {one.id for one in vectors.similarity_search("a mug", k=9, filters={"topic": "care"})} == {"care"}
        assert len(vectors.max_marginal_relevance_search("a mug", k=3, fetch_k=6)) == 3
        assert vectors.as_retriever(search_kwargs={"k": 1}).invoke("a red mug with hearts")[0].id == "hearts"
        with pytest.raises(QueryError, match="a search takes no 'expr'"):
            vectors.similarity_search("a mug", expr="1 == 1")
        assert vectors.delete(["care", "nobody"])
        assert [one.id for one in vectors.get_by_ids(["hearts", "care"])] == ["hearts"]
        vectors.delete()
        assert vectors.store.count() == 0


def test_images_and_other_embeddings_do_not_go_together(shop, tmp_path):
    """Its text would be embedded in its place, and the image never found."""
    embeddings = DeterministicFakeEmbedding(size=6)
    vectors = ImageVectorStore.from_texts(["words"], embeddings, uri=tmp_path / "a.db")
    with vectors.store:
        image = Document("", id="x", metadata={"image_path": str(shop.leopard)})
        with pytest.raises(QueryError, match="'x' is an image, which DeterministicFakeEmbedding cannot embed"):
            vectors.add_documents([image])
        with pytest.raises(QueryError, match="cannot embed an image"):
            vectors.similarity_search({"image": shop.leopard})
        assert vectors.store.count() == 1


def test_the_indexing_api_keeps_a_vector_store_in_step(shop, tmp_path):
    """Unchanged documents are passed over, changed ones replaced, missing ones removed."""
    records = InMemoryRecordManager("photos")
    records.create_schema()
    vectors = ImageVectorStore.from_texts([], VisualizedBGEEmbeddings(shop.model), uri=tmp_path / "a.db")

    def documents(*names: str, stock: int = 1) -> list[Document]:
        return [
            Document("", metadata={"image_path": str(shop.folder / f"{name}.png"), "source": name, "stock": stock})
            for name in names
        ]

    def run(*given: Document) -> tuple[int, int, int]:
        done = index(list(given), records, vectors, cleanup="full", source_id_key="source", key_encoder="sha256")
        return done["num_added"], done["num_skipped"], done["num_deleted"]

    with vectors.store:
        assert run(*documents("hearts", "dots")) == (2, 0, 0)
        assert run(*documents("hearts", "dots")) == (0, 2, 0)
        assert run(*documents("hearts"), *documents("dots", stock=2)) == (1, 1, 1)
        assert run(*documents("hearts")) == (0, 1, 1)
        assert names(vectors.similarity_search("a mug", k=9)) == ["hearts"]


# ------------------------------------------------------------------------------------------ embeddings


def test_embeddings_are_those_of_the_core(shop):
    """No logic of its own: the same numbers, whether a name or a loaded model is given."""
    embeddings, again = VisualizedBGEEmbeddings(shop.model), VisualizedBGEEmbeddings("tiny", device="cpu")
    images = [shop.folder / "hearts.png", shop.leopard.read_bytes(), Image.open(shop.leopard)]
    texts = ["a red mug", "a sock"]
    assert embeddings.embed_model is shop.model
    assert embeddings.embed_documents(texts) == shop.model.get_text_embedding_batch(texts)
    assert embeddings.embed_query("a red mug") == shop.model.get_query_embedding("a red mug")
    found = embeddings.embed_image(images)
    np.testing.assert_allclose(found, shop.model.get_image_embedding_batch(images), atol=1e-6)
    np.testing.assert_allclose(found[1], found[2], atol=1e-6)
    np.testing.assert_allclose(again.embed_image(images[:1]), found[:1], atol=1e-6)
    np.testing.assert_allclose(
        embeddings.embed_composed(["a phone case with this"], [shop.leopard]),
        [shop.model.get_composed_embedding("a phone case with this", shop.leopard)],
        atol=1e-6,
    )

    async def later() -> list[Any]:
        return [
            await embeddings.aembed_image(images[:1]),
            await embeddings.aembed_composed(["in red"], [shop.leopard]),
        ]

    image, composed = asyncio.run(later())
    np.testing.assert_allclose(image, found[:1], atol=1e-6)
    assert len(composed[0]) == shop.model.dimension


def test_one_image_in_place_of_a_list_is_refused(shop):
    """A path is a sequence of letters: that would be thirty unreadable images."""
    with pytest.raises(QueryError, match=r"give a list of images, \['photo.jpg'\]"):
        VisualizedBGEEmbeddings(shop.model).embed_image("photo.jpg")
    with pytest.raises(ImageLoadError):
        VisualizedBGEEmbeddings(shop.model).embed_image([shop.folder / "nowhere.png"])


# ------------------------------------------------------------------------------------------ the retriever


def test_text_image_and_both_find_what_the_core_finds(shop, retriever):
    leopard = shop.leopard
    assert names(retriever.invoke("a red mug with hearts"))[0] == "hearts"
    assert names(retriever.invoke("", image=str(shop.folder / "dots.png")))[0] == "dots"
    for image in (str(leopard), leopard.read_bytes(), Image.open(leopard)):
        documents = retriever.invoke("phone case with this", image=image, k=1)
        assert names(documents) == ["leopard"]
    assert retriever.invoke({"text": "phone case with this", "image": leopard}, k=1) == documents
    core = ComposedRetriever(shop.store, shop.model, top_k=3)
    expected = core.retrieve(QueryBundle("phone case with this", image_path=str(leopard)))
    found = retriever.invoke("phone case with this", image=leopard)
    assert [one.id for one in found] == [one.node_id for one in expected]
    assert names(asyncio.run(retriever.ainvoke("phone case with this", image=leopard, k=1))) == ["leopard"]


def test_documents_carry_path_metadata_and_what_the_image_is(retriever):
    """A chain that puts documents into a prompt shows the model words, not blank lines."""
    (document,) = retriever.invoke("a red mug with hearts", k=1)
    assert document.page_content == "hearts.png"
    assert Path(document.metadata["image_path"]).is_file()
    assert document.metadata["sku"] == "XK-7"
    assert document.metadata["width"] == 320
    assert "relevance_score" not in document.metadata
    scored = retriever.model_copy(update={"with_score": True}).invoke("a red mug with hearts", k=1)
    assert 0 < scored[0].metadata["relevance_score"] <= 1
    (text,) = retriever.invoke("can mugs go into the dishwasher?", k=1)
    assert text.page_content.startswith("All mugs are made of porcelain")
    assert "image_path" not in text.metadata


def test_filters_and_options_reach_the_core(shop, retriever):
    sku = MetadataFilters(filters=[MetadataFilter(key="sku", value="XK-7")])
    assert names(retriever.invoke("a sock", filters=sku)) == ["hearts"]
    options = {"store": shop.store, "embeddings": VisualizedBGEEmbeddings(shop.model)}
    assert names(ComposedImageRetriever(**options, filters=sku).invoke("a sock")) == ["hearts"]
    assert ComposedImageRetriever(**options, min_score=0.99).invoke("a sock") == []
    assert names(ComposedImageRetriever(**options, mode="hybrid").invoke("XK-7"))[0] == "hearts"
    hearts = str(shop.folder / "hearts.png")
    assert "hearts" not in names(ComposedImageRetriever(**options, exclude_query_image=True).invoke("", image=hearts))


def test_filters_cannot_be_broken_out_of(shop, retriever):
    """LangChain hands them on as they are: the store's own rules hold; an expression is no filter."""
    for value in ('x" or sku like "%', "x' or sku like '%", 'x"] or id in ["y'):
        hostile = MetadataFilters(filters=[MetadataFilter(key="sku", value=value)])
        assert retriever.invoke("a sock", filters=hostile) == []
    with pytest.raises(FilterError, match="is not a key"):
        retriever.invoke("a sock", filters=MetadataFilters(filters=[MetadataFilter(key='sku" != "" or id', value=1)]))
    for raw in ("sku != ''", [MetadataFilter(key="sku", value="XK-7")]):
        with pytest.raises(FilterError, match="filters must be MetadataFilters"):
            retriever.invoke("a sock", filters=raw)


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        ({"sku": "XK-7"}, {"hearts"}),
        ({"sku": {"$ne": "XK-7"}, "file_name": ["dots.png", "hearts.png"]}, {"dots"}),
        ({"width": {"$gte": 320, "$lt": 321}, "file_name": {"$nin": ["leopard.png", "stars.png"]}}, None),
        ({"$or": [{"file_name": "stars.png"}, {"$and": [{"sku": "XK-7"}, {"width": 320}]}]}, {"stars", "hearts"}),
        ({}, None),
    ],
)
def test_filters_are_mappings_too(retriever, filters, expected):
    """The operators as LangChain's other stores spell them."""
    found = set(names(retriever.invoke("a sock", filters=filters, k=9)))
    if expected is not None:
        assert found == expected
    elif filters:
        assert found == {"hearts", "stripes", "dots"}
    else:
        assert len(found) == 6


@pytest.mark.parametrize(
    ("filters", "reason"),
    [
        ({"sku": {"$regex": ".*"}}, r"operator '\$regex' of 'sku': give one of \$eq"),
        ({"$not": [{"sku": "XK-7"}]}, r"\$not is not one of \$and, \$or"),
        ({"$or": {"sku": "XK-7"}}, "give a list of mappings"),
        ({3: "XK-7"}, "name of a metadata column"),
        ({"sku": {"$eq": object()}}, "is no value of a filter"),
    ],
)
def test_mappings_that_are_no_filters_say_why(retriever, filters, reason):
    with pytest.raises(FilterError, match=reason):
        retriever.invoke("a sock", filters=filters)


def test_filters_hold_what_metadata_hold(shop, tmp_path):
    """Bools, dates, paths and sets, as people have them in documents; an empty comparison would be no filter at all."""
    embeddings = VisualizedBGEEmbeddings(shop.model)
    metadata = [
        {"sold": True, "day": date(2024, 1, 2), "n": 1, "size": "2"},
        {"sold": False, "day": datetime(2024, 1, 3, 9, 30), "n": 2, "size": "L"},
    ]
    vectors = ImageVectorStore.from_texts(["a", "b"], embeddings, metadata, ids=["a", "b"], uri=tmp_path / "a.db")
    with vectors.store:
        for filters, expected in (
            ({"sold": True}, {"a"}),
            ({"sold": {"$ne": True}}, {"b"}),
            ({"sold": [False]}, {"b"}),
            ({"day": date(2024, 1, 2)}, {"a"}),
            ({"day": {"$gt": date(2024, 1, 2)}}, {"b"}),
            ({"day": {"$lt": datetime(2024, 1, 3, 10)}}, {"a", "b"}),
            ({"n": {1, 2}}, {"a", "b"}),
            ({"n": {"$in": frozenset([2])}}, {"b"}),
            ({"n": np.int64(1)}, {"a"}),
            ({"n": Decimal(2)}, {"b"}),
            ({"size": [2, "L"]}, {"a", "b"}),
            ({"size": {"$nin": [2, "M"]}}, {"b"}),
        ):
            found = vectors.similarity_search("a", k=9, filter=filters)
            assert {document.id for document in found} == expected, filters
        with pytest.raises(FilterError, match="an empty mapping asks for nothing"):
            vectors.similarity_search("a", filter={"n": {}})


def test_filters_find_images_by_the_place_that_documents_have(shop, retriever, tmp_path):
    """`image_path` is no column of a row: it found nothing, or with $ne everything."""
    hearts, dots = (str(shop.folder / f"{name}.png") for name in ("hearts", "dots"))
    assert names(retriever.invoke("a sock", filters={"image_path": hearts})) == ["hearts"]
    assert set(names(retriever.invoke("a sock", filters={"image_path": [hearts, Path(dots)]}))) == {"hearts", "dots"}
    assert retriever.invoke("a sock", filters={"image_path": "/nowhere.png"}) == []
    others = MetadataFilters(filters=[MetadataFilter(key="image_path", operator="!=", value=hearts)])
    assert set(names(retriever.invoke("a sock", filters=others, k=9))) == {"care", *PRODUCTS} - {"hearts"}
    with pytest.raises(FilterError, match="'image_path' is where images lie"):
        retriever.invoke("a sock", filters={"image_path": {"$gt": hearts}})
    vectors = ImageVectorStore(open_store(tmp_path / "a.db", shop.model), shop.model)
    with vectors.store:
        vectors.add_documents([Document("", id=place, metadata={"image_path": place}) for place in (hearts, dots)])
        vectors.add_texts(["a mug"])
        row = {"doc_id": "", "text": "a row of another program", "_node_content": "", "_node_type": ""}
        vectors.store.client.insert(
            vectors.store.collection_name, [row | {"id": "theirs", "embedding": [0.0] * vectors.store.dim}]
        )
        assert [one.id for one in vectors.similarity_search("a mug", filter={"image_path": dots})] == [dots]


def test_ids_may_be_numbers_and_a_text_is_no_list_of_texts(shop, tmp_path):
    with ImageVectorStore.from_texts(
        ["a", "b"], shop.model, ids=[0, UUID(int=1)], uri=tmp_path / "a.db"
    ).store as store:
        vectors = ImageVectorStore(store, shop.model)
        assert [one.page_content for one in vectors.get_by_ids([UUID(int=1), 0])] == ["b", "a"]
        vectors.delete([0])
        assert vectors.store.count() == 1
        with pytest.raises(QueryError, match="give a list of texts"):
            vectors.add_texts("hello")


def test_vectors_of_other_embeddings_may_be_of_any_length(tmp_path):
    """The longest would be nearest to every query, and scores no inner products of unit vectors."""

    class Lengths(DeterministicFakeEmbedding):
        def embed_documents(self, texts: list[str]) -> list[list[float]]:
            return [[len(text) * x for x in self.embed_query(text)] for text in texts]

    texts = ["mug", "a much longer text about umbrellas"]
    vectors = ImageVectorStore.from_texts(texts, Lengths(size=6), uri=tmp_path / "a.db")
    with vectors.store:
        ((best, score),) = vectors.similarity_search_with_score("mug", k=1)
        assert (best.page_content, score) == ("mug", pytest.approx(1))


def test_documents_and_ids_may_come_from_generators_and_paths_in_any_form(shop, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(shop.leopard.parent))
    vectors = ImageVectorStore(open_store(tmp_path / "a.db", shop.model), VisualizedBGEEmbeddings(shop.model))
    with vectors.store:
        documents = [
            Document("", metadata={"image_path": shop.leopard}),
            Document("", metadata={"image_path": f"~/{shop.leopard.name}"}),
        ]
        vectors.add_documents((one for one in documents), ids=(name for name in "ab"))
        paths = [one.metadata["image_path"] for one in vectors.get_by_ids(name for name in "ab")]
        assert paths == [str(shop.leopard)] * 2
        vectors.delete(name for name in "ab")
        assert vectors.store.count() == 0
        with pytest.raises(QueryError, match="a query of None"):
            vectors.similarity_search(None)
        vectors.add_texts(["red", "blue"], [{"label": "mug"}, None], ids=["c", "d"])
        assert [one.metadata for one in vectors.get_by_ids(["c", "d"])] == [{"label": "mug"}, {}]
        with pytest.raises(QueryError, match="1 metadatas and 2 texts: give one for each"):
            vectors.add_texts(["red", "blue"], [{"label": "mug"}])


def test_messages_and_content_blocks_are_queries(shop, retriever):
    """Text and image as chat models get them, in LangChain's forms, OpenAI's and Anthropic's."""
    data = base64.b64encode(shop.leopard.read_bytes()).decode()
    words = {"type": "text", "text": "phone case with this"}
    for image in (
        {"type": "image", "base64": data, "mime_type": "image/jpeg"},
        {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{data}"}},
        {"type": "image", "source_type": "base64", "data": data, "mime_type": "image/jpeg"},
        {"type": "image", "source": {"type": "base64", "media_type": "image/jpeg", "data": data}},
    ):
        for query in ([words, image], HumanMessage([words, image])):
            assert names(retriever.invoke(query, k=1)) == ["leopard"]
    assert names(retriever.invoke(HumanMessage("a red mug with hearts"), k=1)) == ["hearts"]
    with pytest.raises(QueryError, match="2 images in one query"):
        retriever.invoke([image, image])
    with pytest.raises(QueryError, match="a content block of type 'audio'"):
        retriever.invoke([{"type": "audio", "base64": "AAAA"}])
    with pytest.raises(QueryError, match="give content blocks, or words"):
        retriever.invoke([5])


def test_what_several_queries_find_is_found_once(shop, retriever):
    """A MultiQueryRetriever leaves out equal documents; a score would make each of them differ."""
    found = [document for text in ("a mug", "a cup", "porcelain") for document in retriever.invoke(text, k=6)]
    different = [document for place, document in enumerate(found) if document not in found[:place]]
    assert (len(found), len(different)) == (18, 6)


def test_unknown_arguments_are_refused(shop, retriever):
    with pytest.raises(QueryError, match="takes no 'top_k': give image, k or filters"):
        retriever.invoke("a mug", top_k=3)
    with pytest.raises(ValidationError, match="top_k"):
        ComposedImageRetriever(store=shop.store, embeddings=shop.model, top_k=3)


@pytest.mark.parametrize(
    ("query", "arguments", "reason"),
    [
        ("", {}, "nothing to search for"),
        ("x", {"k": 0}, "from 1 to 16384"),
        ({"text": "x", "picture": "y"}, {}, "give 'text', 'image', or both"),
        ({"image": "x.png"}, {"image": "y.png"}, "give one of them"),
    ],
)
def test_queries_that_cannot_be_asked_say_why(retriever, query, arguments, reason):
    with pytest.raises(QueryError, match=reason):
        retriever.invoke(query, **arguments)


def test_the_retriever_works_in_a_chain(shop, retriever):
    """A chain hands on one value: text and image together."""
    chain = RunnablePassthrough() | retriever | RunnableLambda(names)
    questions = [{"text": "phone case with this", "image": str(shop.leopard)}, {"text": "a red mug with hearts"}]
    assert [found[0] for found in chain.batch(questions)] == ["leopard", "hearts"]


# ------------------------------------------------------------------------------------------ the compressor


class RednessRerank(BaseNodePostprocessor):
    """A real reranker at LlamaIndex's seam: by how red an image is; keeps two, and what it was asked."""

    asked: list[QueryBundle] = Field(default_factory=list)

    def _postprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        self.asked.append(query_bundle)

        def redness(node: NodeWithScore) -> float:
            if not isinstance(node.node, ImageNode):
                return -1.0
            red, green, blue = np.asarray(Image.open(node.node.image_path).convert("RGB")).reshape(-1, 3).mean(axis=0)
            return float(red - (green + blue) / 2) / 255

        ranked = sorted(nodes, key=redness, reverse=True)[:2]
        return [NodeWithScore(node=node.node, score=redness(node)) for node in ranked]


def test_the_compressor_ranks_documents_by_their_images(retriever):
    documents = retriever.invoke("a mug", k=6)
    before = [one.model_copy(deep=True) for one in documents]
    found = RerankCompressor(reranker=RednessRerank()).compress_documents(documents, "the reddest")
    assert names(found)[0] == "hearts"
    assert len(found) == 2
    assert found[0].metadata["relevance_score"] > found[1].metadata["relevance_score"]
    original = next(one for one in before if one.id == found[0].id)
    assert found[0].metadata == original.metadata | {"relevance_score": found[0].metadata["relevance_score"]}
    assert found[0].page_content == original.page_content
    assert documents == before
    later = asyncio.run(RerankCompressor(reranker=RednessRerank()).acompress_documents(documents, "the reddest"))
    assert later == found


def test_the_compressor_passes_the_query_image_on(shop, retriever):
    """As ContextualCompressionRetriever calls it: with the retriever's own query. Bytes become a data URI."""
    reranker = RednessRerank()
    compressor = RerankCompressor(reranker=reranker)
    documents = retriever.invoke("a mug")
    compressor.compress_documents(documents, {"text": "like this", "image": shop.leopard})
    compressor.compress_documents(documents, {"image": shop.leopard.read_bytes()})
    assert [(one.query_str, (one.image_path or "")[:5]) for one in reranker.asked[-2:]] == [
        ("like this", str(shop.leopard)[:5]),
        ("", "data:"),
    ]


def test_documents_of_other_stores_are_ranked_too(shop):
    found = RerankCompressor(reranker=RednessRerank()).compress_documents(
        [
            Document("words"),
            Document("", metadata={"image_path": str(shop.folder / "hearts.png"), "nested": {"a": [1]}}),
        ],
        "red",
    )
    assert [one.page_content for one in found] == ["", "words"]
    assert found[0].metadata["nested"] == {"a": [1]}


# ------------------------------------------------------------------------------------------ the tools


def called(tool: BaseTool, **arguments: Any) -> ToolMessage:
    answer = tool.invoke({"name": tool.name, "args": arguments, "id": "1", "type": "tool_call"})
    assert isinstance(answer, ToolMessage)
    return answer


def test_a_conversation_with_the_tools_gives_words_and_images(shop):
    """Search, then "the first one, as a sock", then a description: each answer names what the next can refer to."""
    conversation = Conversation()
    conversation.attach("photo", shop.leopard)
    search, similar, describe = image_search_tools(ImageSearch(shop.store, shop.model), conversation)
    found = called(search, text="phone case with this", image="photo", top_k=2)
    assert found.status == "success"
    kinds = [block["type"] for block in found.content]
    assert kinds[:3] == ["text", "text", "image"]  # the heading; a line for the first result, and its thumbnail
    assert kinds.count("text") == 3
    image = Image.open(io.BytesIO(base64.b64decode(found.content[2]["base64"])))
    assert found.content[2]["mime_type"] == "image/jpeg"
    assert max(image.size) <= SearchLimits().thumbnail_side
    first = found.artifact["results"][0]
    assert shop.store.get_nodes([first["id"]])[0].metadata["file_name"] == "leopard.png"
    assert [block["type"] for block in found.content_blocks] == kinds  # LangChain's standard blocks
    like = called(similar, result="result 1", change="as a sock")
    assert first["id"] not in [one["id"] for one in like.artifact["results"]]
    told = called(describe, image="result 1")
    assert [block["type"] for block in told.content] == ["text", "image"]


def test_each_thread_has_results_of_its_own(shop):
    """Tools are made once for all users of an app; "result 1" must not be another user's."""
    search, similar, describe = image_search_tools(ImageSearch(shop.store, shop.model))

    def ask(tool: BaseTool, thread: str, **arguments: Any) -> ToolMessage:
        call = {"name": tool.name, "args": arguments, "id": "1", "type": "tool_call"}
        return tool.invoke(call, {"configurable": {"thread_id": thread}})

    first = ask(search, "anna", text="a red mug with hearts", top_k=1).artifact["results"][0]["id"]
    second = ask(search, "bernd", text="a green sock", top_k=1).artifact["results"][0]["id"]
    assert first != second
    for thread, own in (("anna", first), ("bernd", second)):
        assert ask(describe, thread, image="result 1").artifact["id"] == own
    assert ask(similar, "clara", result="result 1").status == "error"

    kept = {"anna": Conversation()}
    kept["anna"].attach("photo", shop.leopard)
    described = image_search_tools(ImageSearch(shop.store, shop.model), lambda thread: kept[thread])[2]
    assert ask(described, "anna", image="photo").status == "success"


def test_a_mistake_of_the_model_comes_back_as_a_message(shop):
    """An agent's loop goes on; the message says what to do instead."""
    search, similar, _ = image_search_tools(ImageSearch(shop.store, shop.model))
    for tool, arguments, reason in [
        (search, {}, "nothing to search for"),
        (search, {"text": "x", "top_k": -1}, "from 1 to"),
        (search, {"text": "x", "filters": [{"key": "a", "operator": "like"}]}, "operator"),
        (search, {"image": "/etc/passwd"}, ""),
        (similar, {"result": "result 7"}, "search first"),
        (similar, {}, "result: Field required"),
        (search, {"text": "x", "filter": {"label": "mug"}}, "no argument 'filter'; did you mean 'filters'?"),
        (search, {"text": "x", "topK": 2}, "no argument 'topK'; did you mean 'top_k'?"),
    ]:
        answer = called(tool, **arguments)
        assert answer.status == "error", arguments
        assert reason in str(answer.content)
        assert "root:" not in str(answer.content)


def test_the_schema_tells_a_model_what_the_arguments_mean(shop):
    for tool in image_search_tools(ImageSearch(shop.store, shop.model)):
        schema = tool.tool_call_schema.model_json_schema()
        assert tool.description
        assert all(field.get("description") for field in schema["properties"].values()), tool.name


# ------------------------------------------------------------------------------------------ the package


def test_without_langchain_the_error_names_the_extra():
    """A fresh interpreter in which langchain_core cannot be found."""
    code = (
        "import sys\n"
        f"sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'integrations')!r}]\n"
        "sys.modules['langchain_core'] = None\n"
        "try:\n"
        "    import langchain_mm_retriever\n"
        "except ImportError as error:\n"
        "    print(type(error).__name__, error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("MissingExtraError")
    assert 'pip install "mm-retriever[langchain]"' in done.stdout


def test_the_core_does_not_know_langchain():
    """Hosts import us, never the other way."""
    for path in (ROOT / "mm_retriever").rglob("*.py"):
        assert "langchain" not in path.read_text(encoding="utf-8").replace("LangChain", ""), path
