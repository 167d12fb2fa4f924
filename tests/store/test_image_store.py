"""`ImageStore` on a real Milvus Lite."""

from __future__ import annotations

import asyncio
import logging
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from llama_index.core import MockEmbedding, VectorStoreIndex
from llama_index.core.ingestion import IngestionPipeline
from llama_index.core.llms import MockLLM
from llama_index.core.schema import Document, ImageDocument, ImageNode, NodeRelationship, RelatedNodeInfo, TextNode
from llama_index.core.vector_stores.types import (
    FilterOperator,
    MetadataFilter,
    MetadataFilters,
    VectorStoreQuery,
    VectorStoreQueryMode,
)
from llama_index.vector_stores.milvus import MilvusVectorStore

from mm_retriever.errors import FilterError, NodeError, QueryError, StoreError, StoreMismatchError
from mm_retriever.store import ImageStore, open_store
from mm_retriever.store import collection as module
from tests.support.colour_embedding import ColourEmbedding, paint

MODEL = SimpleNamespace(dimension=3, model_id="three numbers")


def node(id_: str, vector: list[float] | None = None, source: str | None = None, **metadata: Any) -> ImageNode:
    relationships = {NodeRelationship.SOURCE: RelatedNodeInfo(node_id=source)} if source else {}
    return ImageNode(
        id_=id_,
        image_path=f"/photos/{id_}.jpg",
        metadata=metadata,
        relationships=relationships,
        embedding=vector or [1.0, 0.0, 0.0],
    )


def asked(store: ImageStore, vector: list[float] | None = None, top_k: int = 10, **options: Any) -> list[str]:
    return store.query(query(vector, top_k, **options)).ids or []


def query(vector: list[float] | None = None, top_k: int = 10, **options: Any) -> VectorStoreQuery:
    return VectorStoreQuery(query_embedding=vector or [1.0, 0.0, 0.0], similarity_top_k=top_k, **options)


def where(key: str, value: Any, operator: str = "==") -> MetadataFilters:
    return MetadataFilters(filters=[MetadataFilter(key=key, value=value, operator=FilterOperator(operator))])


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    with open_store(tmp_path_factory.mktemp("store") / "shared.db", MODEL) as opened:
        yield opened


@pytest.fixture
def store(shared):
    shared.clear()
    return shared


# ------------------------------------------------------------------------------------------ opening


def test_what_was_stored_is_there_after_reopening(tmp_path):
    """Milvus Lite leaves a reopened collection unloaded, where every query fails; `open_store` loads it."""
    path = tmp_path / "made" / "on the way" / "photos.db"
    with open_store(path, MODEL) as first:
        first.add([node("a", [0.0, 1.0, 0.0])])
    with open_store(str(path), MODEL) as second:
        assert asked(second, [0.0, 1.0, 0.0]) == ["a"]
        assert second.count() == 1


def test_a_relative_path_is_the_same_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with open_store("photos.db", MODEL) as first, open_store(tmp_path / "photos.db", MODEL) as second:
        first.add([node("a")])
        assert asked(second) == ["a"]


def test_two_stores_on_one_file_and_the_first_closed(tmp_path):
    """The file stays open for as long as any store of this process uses it."""
    first, second = open_store(tmp_path / "a.db", MODEL), open_store(tmp_path / "a.db", MODEL, collection="other")
    first.close()
    first.close()
    second.add([node("a")])
    assert asked(second) == ["a"]
    second.close()
    with pytest.raises(StoreError, match="is closed; open it again"):
        second.query(query())


@pytest.mark.parametrize(
    ("other", "options", "difference"),
    [
        (SimpleNamespace(dimension=4, model_id="three numbers"), {}, "holds vectors of 3 numbers, the model gives 4"),
        (SimpleNamespace(dimension=3, model_id="others"), {}, "the model 'three numbers', the model given is 'others'"),
        (MODEL, {"metric": "COSINE"}, "measures with IP, COSINE is asked for"),
        (MODEL, {"index": "HNSW"}, "has a FLAT index, HNSW is asked for"),
    ],
)
def test_a_collection_of_another_kind_is_refused_with_both_values_and_the_way_out(tmp_path, other, options, difference):
    """Milvus itself says nothing until the first search, or nothing at all."""
    with open_store(tmp_path / "a.db", MODEL) as opened:
        opened.add([node("a")])
    with pytest.raises(StoreMismatchError, match=difference) as caught:
        open_store(tmp_path / "a.db", other, **options)
    assert "another collection name, or overwrite=True" in str(caught.value)
    with open_store(tmp_path / "a.db", other, collection="second", **options) as beside:
        assert beside.count() == 0
    with open_store(tmp_path / "a.db", other, overwrite=True, **options) as anew:
        assert anew.count() == 0


def test_a_collection_of_plain_llamaindex_is_taken_with_a_warning(tmp_path, caplog):
    """It keeps no model name: that is said, and everything works. Its nodes come back as they were stored."""
    path = str(tmp_path / "plain.db")
    plain = MilvusVectorStore(uri=path, dim=3, collection_name="mm_retriever", use_async_client=False)
    plain.add([node("a", year=1), TextNode(id_="t", text="words", embedding=[0.0, 1.0, 0.0])])
    plain.client.close()
    with caplog.at_level(logging.WARNING), open_store(path, MODEL) as opened:
        assert "does not say which model" in caplog.text
        found = opened.query(query())
        assert [type(one) for one in found.nodes] == [ImageNode, TextNode]
        assert found.nodes[1].get_content() == "words"
        assert asked(opened, filters=where("year", 1)) == ["a"]


def test_a_collection_of_another_schema_is_refused(tmp_path):
    path = str(tmp_path / "plain.db")
    plain = MilvusVectorStore(
        uri=path, dim=3, collection_name="mm_retriever", embedding_field="vector", use_async_client=False
    )
    plain.client.close()
    with pytest.raises(StoreMismatchError, match="made by another program: it lacks the fields embedding"):
        open_store(path, MODEL)


def test_a_collection_whose_index_was_never_made_is_repaired(tmp_path):
    """A process can die between the two requests that make a collection and its index."""
    with open_store(tmp_path / "a.db", MODEL) as opened:
        opened.add([node("a")])
        opened.client.release_collection("mm_retriever")
        opened.client.drop_index("mm_retriever", "embedding")
    with open_store(tmp_path / "a.db", MODEL) as again:
        assert asked(again) == ["a"]


def test_the_constructor_takes_the_names_of_llamaindex_and_refuses_what_would_not_hold(tmp_path):
    """Truth: the signature of MilvusVectorStore. An option that this store does not follow must not be swallowed."""
    path = tmp_path / "a.db"
    names = {"collection_name": "photos", "dim": 3, "similarity_metric": "COSINE", "embedding_field": "embedding"}
    with ImageStore(uri=path, token="", overwrite=True, upsert_mode=True, batch_size=7, **names) as opened:
        opened.add([node(str(number)) for number in range(20)])
        assert (opened.collection_name, opened.dim, opened.similarity_metric) == ("photos", 3, "COSINE")
        assert (opened.count(), opened.batch_size, opened.hybrid) == (20, 7, False)
    with ImageStore(path, collection_name="photos", create=False, metric=None) as again:
        assert (again.dim, again.similarity_metric, again.count()) == (3, "COSINE", 20)
    for options in ({"embedding_field": "vector"}, {"upsert_mode": False}, {"index_config": {"index_type": "IVF"}}):
        with pytest.raises(StoreError, match=f"{next(iter(options))}=.*: this store has"):
            ImageStore(path, **names | options)
    with pytest.raises(StoreError, match="takes no 'colection'"):
        ImageStore(path, dim=3, colection="photos")
    with pytest.raises(StoreError, match="how many numbers a vector has"):
        ImageStore(path)
    with ImageStore(tmp_path / "hybrid.db", dim=3, enable_sparse=True) as hybrid:
        assert hybrid.hybrid


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"index": "HSNW"}, "index 'HSNW' is not one of auto, FLAT"),
        ({"metric": "euclid"}, "metric 'euclid' is not one of IP, COSINE"),
        ({"metric": "L2"}, "L2 ranks unit vectors in the same order"),
        ({"collection": "my photos"}, "collection 'my photos'"),
        ({"collection": "../x"}, "collection '../x'"),
        ({"timeout": 0}, "timeout 0"),
    ],
)
def test_names_that_milvus_lite_would_take_in_silence_are_refused(tmp_path, options, reason):
    with pytest.raises(StoreError, match=reason):
        open_store(tmp_path / "a.db", MODEL, **options)
    assert not (tmp_path / "a.db").exists()


@pytest.mark.parametrize("options", [{"metric": "cosine", "index": "flat"}, {"index": "AUTO"}, {"index": "hnsw"}])
def test_index_and_metric_in_small_letters(tmp_path, options):
    with open_store(tmp_path / "a.db", MODEL, **options) as opened:
        opened.add([node("a"), node("b", [0.0, 3.0, 4.0])])
        found = opened.query(query([0.0, 0.6, 0.8]))
        assert found.ids == ["b", "a"]
        assert found.similarities[0] == pytest.approx(1.0 if opened.similarity_metric == "COSINE" else 5.0)


# ------------------------------------------------------------------------------------------ writing


def test_storing_an_id_again_replaces_its_row_whole(store):
    """Milvus Lite's upsert would leave the old column there."""
    store.add([node("a", colour="red", year=1)])
    store.add([node("a", [0.0, 1.0, 0.0], year=2)])
    assert store.count() == 1
    assert store.query(query([0.0, 1.0, 0.0])).similarities == [1.0]
    assert asked(store, filters=where("colour", "red")) == []
    assert asked(store, filters=where("year", 2)) == ["a"]


def test_of_two_nodes_with_one_id_in_a_batch_the_later_stays(store):
    """On a server the same id twice in one upsert would be two rows."""
    assert store.add([node("a", year=1), node("b"), node("a", year=2)]) == ["a", "b", "a"]
    assert store.count() == 2
    assert store.get_nodes(["a"])[0].metadata == {"year": 2}


def test_one_bad_node_and_none_is_stored(store):
    nodes = [node(str(number)) for number in range(600)]
    nodes[550].embedding = [np.nan, 0.0, 0.0]
    with pytest.raises(NodeError, match="node '550'"):
        store.add(nodes)
    assert store.count() == 0


def test_many_batches_and_pages(store, monkeypatch):
    """More rows than one write and one page of a scan; ids in no order."""
    monkeypatch.setattr(module, "_PAGE_ROWS", 100)
    order = np.random.default_rng(0).permutation(700)
    store.add([node(f"{number:03d}", year=int(number) % 7) for number in order])
    assert store.count() == 700
    pages = list(store.scan(["year"]))
    assert [len(page) for page in pages] == [100] * 7
    assert [row["id"] for page in pages for row in page] == [f"{number:03d}" for number in range(700)]
    assert store.count(where("year", 3)) == len(store.get_nodes(filters=where("year", 3))) == 100
    store.delete_nodes(filters=where("year", 3))
    assert store.count() == 600


def test_scan_may_delete_what_it_passes(store, monkeypatch):
    monkeypatch.setattr(module, "_PAGE_ROWS", 10)
    store.add([node(f"{number:03d}") for number in range(35)])
    for page in store.scan():
        store.delete_nodes([row["id"] for row in page])
    assert store.count() == 0


def test_clear_leaves_a_store_that_works_and_knows_its_model(tmp_path):
    with open_store(tmp_path / "a.db", MODEL) as opened:
        opened.add([node("a")])
        opened.clear()
        assert (opened.count(), asked(opened)) == (0, [])
        opened.add([node("b")])
        assert asked(opened) == ["b"]
    with pytest.raises(StoreMismatchError, match="holds vectors of the model 'three numbers'"):
        open_store(tmp_path / "a.db", SimpleNamespace(dimension=3, model_id="others"))


# ------------------------------------------------------------------------------------------ nothing gets out

NASTY_IDS = [
    'x"] or year > 0 or id in ["y',
    "it's",
    'say "no"',
    "back\\slash",
    "\\",
    "line\nbreak",
    "漢字",
    "%",
    "a b",
    "'",
]


@pytest.fixture
def nasty(store):
    """Every id is also a document's; beside them lies a row that no query below may reach."""
    store.add([node(one, source=one, year=1) for one in NASTY_IDS] + [node("bystander", source="other", year=1)])
    return store


def test_ids_select_their_own_rows_only(nasty):
    """Truth: the rows themselves. LlamaIndex's MilvusVectorStore pastes ids between double quotes."""
    for value in NASTY_IDS:
        assert asked(nasty, doc_ids=[value]) == [value]
        assert asked(nasty, node_ids=[value]) == [value]
        assert asked(nasty, filters=where("id", value)) == [value]
        assert asked(nasty, filters=where("ref_doc_id", value)) == [value]
        assert [hit.node_id for hit in nasty.get_nodes([value])] == [value]
        assert list(nasty.columns([value], ["year"])) == [value]


@pytest.mark.parametrize(
    "delete",
    [
        lambda store, value: store.delete(value),
        lambda store, value: store.delete_nodes([value]),
        lambda store, value: store.delete_nodes([value, "bystander"], where("doc_id", value)),
        lambda store, value: store.delete_nodes(filters=where("doc_id", value)),
    ],
    ids=["delete", "delete_nodes", "both", "filters"],
)
def test_deleting_takes_away_its_own_rows_only(nasty, delete):
    left = {*NASTY_IDS, "bystander"}
    for value in NASTY_IDS:
        delete(nasty, value)
        left.remove(value)
        assert {row["id"] for page in nasty.scan() for row in page} == left


def test_an_injection_matches_nothing(nasty):
    """Truth: LlamaIndex's own translation of filters, which lets these through; here they are just texts."""
    for value in ['zzz" or year > 0 or owner like "q', "zzz' or year > 0 or owner like 'q", 'q"] or id != ""']:
        assert asked(nasty, filters=where("owner", value)) == []
        assert asked(nasty, filters=where("owner", value, "text_match") if "%" not in value else None) == []
        assert asked(nasty, doc_ids=[value]) == asked(nasty, node_ids=[value]) == []
        nasty.delete(value)
        nasty.delete_nodes([value])
    assert nasty.count() == len(NASTY_IDS) + 1


def test_deleting_without_saying_what_is_refused(nasty):
    """An empty filter must not mean everything."""
    for call in (
        lambda: nasty.delete_nodes(),
        lambda: nasty.delete_nodes(filters=MetadataFilters(filters=[])),
        lambda: nasty.get_nodes(),
    ):
        with pytest.raises(FilterError, match="needs node_ids or filters"):
            call()
    with pytest.raises(QueryError, match="needs the id of a document"):
        nasty.delete("")
    nasty.delete_nodes([])
    assert nasty.count() == len(NASTY_IDS) + 1


def test_an_empty_list_of_documents_matches_nothing(nasty):
    """Our choice: a caller who may see no document must not see all. (No node_ids is what a VectorStoreIndex sends.)"""
    assert asked(nasty, doc_ids=[]) == []
    assert len(asked(nasty, top_k=100, node_ids=[])) == len(NASTY_IDS) + 1


def test_raw_expressions_are_refused(nasty):
    for options in ({"string_expr": "id != ''"}, {"milvus_scalar_filters": []}, {"mmr_threshold": 0.5}):
        with pytest.raises(QueryError, match="conditions are given as filters"):
            nasty.query(query(), **options)
    with pytest.raises(QueryError):
        nasty.add([], milvus_partition_name="x")


INJECTIONS = (
    'z"] or year > 0 or id in ["y',
    'zzz" or year > 0 or owner like "q',
    "zzz' or year > 0 or owner like 'q",
    'z") or (id != "',
    "z\\",
)


@pytest.mark.parametrize("mode", ["default", "mmr", "hybrid", "text_search", "sparse"])
def test_no_mode_of_query_lets_an_injection_out(tmp_path, mode):
    """Each mode sends its expression by a request of its own: each is closed by itself."""
    with open_store(tmp_path / "a.db", MODEL, hybrid=True) as opened:
        opened.add([node("a", owner="lid", year=1), node("b", owner="lid", year=2)])
        for value in INJECTIONS:
            for restriction in (
                {"doc_ids": [value]},
                {"node_ids": [value]},
                {"filters": where("owner", value)},
                {"filters": where("ref_doc_id", value)},
                {"filters": where("owner", [value], "in")},
            ):
                assert asked(opened, mode=VectorStoreQueryMode(mode), query_str="lid", **restriction) == []
        only_b = asked(opened, mode=VectorStoreQueryMode(mode), query_str="lid", filters=where("year", 2))
        assert only_b == ["b"]


def test_an_index_over_the_store_hands_on_no_expression(nasty):
    """The ways of LlamaIndex' own index to the store: removing, and options that reach Milvus as they are."""
    index = VectorStoreIndex.from_vector_store(nasty, MockEmbedding(3))
    for value in INJECTIONS:
        index.delete_ref_doc(value)
        index.delete_nodes([value])
        assert index.as_retriever(doc_ids=[value]).retrieve("x") == []
    assert nasty.count() == len(NASTY_IDS) + 1
    for options in ({"string_expr": "id != ''"}, {"milvus_scalar_filters": []}, {"expr": "id != ''"}):
        with pytest.raises(QueryError, match="never as expressions"):
            index.as_retriever(vector_store_kwargs=options).retrieve("x")


# ------------------------------------------------------------------------------------------ searching


def test_results_come_best_first_with_their_scores_and_without_vectors(store):
    store.add([node("far", [-1.0, 0.0, 0.0]), node("near", [0.6, 0.8, 0.0]), node("same")])
    found = store.query(query(top_k=2))
    assert found.ids == ["same", "near"]
    assert found.similarities == pytest.approx([1.0, 0.6])
    assert all(one.embedding is None for one in found.nodes)


@pytest.mark.parametrize("top_k", [0, -1, 16_385, True, 2.5])
def test_top_k_outside_what_milvus_takes_is_refused(store, top_k):
    with pytest.raises(QueryError, match="from 1 to 16384"):
        store.query(query(top_k=top_k))


@pytest.mark.parametrize(
    ("vector", "reason"),
    [(None, "without a vector"), ([1.0], "1 numbers; the collection holds 3"), ([np.nan, 0, 0], "NaN")],
)
def test_a_query_vector_of_another_kind_is_refused(store, vector, reason):
    with pytest.raises(QueryError, match=reason):
        store.query(VectorStoreQuery(query_embedding=vector))


def test_modes_that_need_text_search_are_refused(store):
    with pytest.raises(QueryError, match="searches by vector"):
        store.query(query(mode=VectorStoreQueryMode.HYBRID))


def test_maximal_marginal_relevance_takes_less_of_the_same(store):
    """Truth: llama_index's own get_top_k_mmr_embeddings on these vectors, by hand: b is a's double, c is not."""
    store.add([node("a", [0.9, 0.1, 0.0]), node("b", [0.9, 0.11, 0.0]), node("c", [0.7, -0.7, 0.0])])
    assert asked(store, [1.0, 0.0, 0.0], 2) == ["b", "a"] or asked(store, [1.0, 0.0, 0.0], 2) == ["a", "b"]
    found = store.query(query([1.0, 0.0, 0.0], 2, mode=VectorStoreQueryMode.MMR), mmr_threshold=0.5)
    assert "c" in found.ids
    assert all(one.embedding is None for one in found.nodes)


def test_get_nodes_keeps_the_order_asked_for(store):
    store.add([node("a"), node("b"), node("c")])
    assert [one.node_id for one in store.get_nodes(["c", "missing", "a", "c"])] == ["c", "a"]
    assert [one.node_id for one in store.get_nodes(["c", "a"], where("id", "a"))] == ["a"]


def test_ids_may_come_from_a_generator_or_an_array(store):
    store.add([node("a"), node("b"), node("c")])
    assert [one.node_id for one in store.get_nodes(id_ for id_ in "cab")] == ["c", "a", "b"]
    assert [one.node_id for one in store.get_nodes(np.array(["b", "a"]))] == ["b", "a"]
    assert len(store.query(query(top_k=np.int64(2))).ids) == 2
    store.delete_nodes((id_ for id_ in "ab"), where("id", "a"))
    store.delete_nodes(id_ for id_ in "bx")
    assert [one.node_id for one in store.get_nodes(["a", "b", "c"])] == ["c"]
    with pytest.raises(FilterError, match="a list of ids is needed"):
        store.get_nodes("c")


# ------------------------------------------------------------------------------------------ threads and event loops


def test_one_store_serves_two_event_loops_in_a_row(store):
    """A MilvusVectorStore fails in the second with 'Event loop is closed'."""

    async def everything(id_: str) -> list[str]:
        await store.async_add([node(id_, source=id_), node("spare")])
        await store.adelete_nodes(["spare"])
        found = await asyncio.gather(*(store.aquery(query()) for _ in range(5)))
        assert len(await store.aget_nodes([id_])) == 1
        return found[0].ids

    assert asyncio.run(everything("a")) == ["a"]
    assert set(asyncio.run(everything("b"))) == {"a", "b"}
    asyncio.run(store.adelete("a"))
    asyncio.run(store.aclear())
    assert store.count() == 0


def test_many_threads_write_and_read_at_once(store):
    """Milvus Lite takes one writer at a time; every thread finds its own rows."""

    def work(number: int) -> list[str]:
        mine = [node(f"{number}-{one}", owner=number) for one in range(40)]
        for start in range(0, 40, 10):
            store.add(mine[start : start + 10])
            asked(store)
        return sorted(asked(store, top_k=100, filters=where("owner", number)))

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(work, range(8)))
    assert results == [sorted(f"{number}-{one}" for one in range(40)) for number in range(8)]
    assert store.count() == 320


def test_opening_one_file_from_many_threads_at_once(tmp_path):
    with ThreadPoolExecutor(6) as pool:
        stores = list(pool.map(lambda _: open_store(tmp_path / "a.db", MODEL), range(6)))
    stores[0].add([node("a")])
    assert [asked(one) for one in stores] == [["a"]] * 6
    for one in stores:
        one.close()


# ------------------------------------------------------------------------------------------ inside LlamaIndex


@pytest.fixture(scope="module")
def colours(tmp_path_factory):
    embed_model = ColourEmbedding()
    folder = tmp_path_factory.mktemp("colours")
    with open_store(folder / "colours.db", embed_model) as opened:
        for name in ("red", "green", "blue"):
            path = paint(folder / f"{name}.png", name)
            vector = embed_model.get_image_embedding(str(path))
            opened.add([ImageNode(id_=name, image_path=str(path), metadata={"name": name}, embedding=vector)])
        yield opened, embed_model, folder


def test_an_existing_app_searches_it_as_any_vector_store(colours):
    opened, embed_model, folder = colours
    index = VectorStoreIndex.from_vector_store(opened, embed_model)
    retriever = index.as_retriever(similarity_top_k=2)
    assert retriever.retrieve("a green thing")[0].node.metadata["name"] == "green"
    assert asyncio.run(retriever.aretrieve("a blue thing"))[0].node.metadata["name"] == "blue"
    filtered = index.as_retriever(filters=where("name", "red"))
    assert [one.node.metadata["name"] for one in filtered.retrieve("green")] == ["red"]
    bundle = embed_model.get_query_bundle("blue", folder / "red.png")
    assert {one.node.metadata["name"] for one in retriever.retrieve(bundle)} == {"red", "blue"}


def test_an_existing_engine_answers_from_it(colours):
    opened, embed_model, _ = colours
    engine = VectorStoreIndex.from_vector_store(opened, embed_model).as_query_engine(llm=MockLLM(), similarity_top_k=1)
    response = engine.query("something red")
    assert [one.node.metadata["name"] for one in response.source_nodes] == ["red"]


def test_an_ingestion_pipeline_writes_into_it(tmp_path):
    """Nodes of the pipeline, text and images, arrive with their vectors and are found by text."""
    embed_model = ColourEmbedding()
    document = ImageDocument(image_path=str(paint(tmp_path / "red.png", "red")), metadata={"kind": "image"})
    with open_store(tmp_path / "a.db", embed_model) as opened:
        IngestionPipeline(transformations=[embed_model], vector_store=opened).run(
            documents=[Document(text="a green text", metadata={"kind": "text"}), document]
        )
        found = opened.query(query(embed_model.get_text_embedding("green"), 1))
        assert found.nodes[0].get_content() == "a green text"
        assert opened.get_nodes(filters=where("kind", "image"))[0].image_path == str(tmp_path / "red.png")


def test_deleting_a_document_through_the_index(tmp_path):
    embed_model = ColourEmbedding()
    with open_store(tmp_path / "a.db", embed_model) as opened:
        index = VectorStoreIndex.from_vector_store(opened, embed_model)
        index.insert(Document(text="red words", id_='the "first"'))
        index.insert(Document(text="green words", id_="second"))
        index.delete_ref_doc('the "first"')
        (left,) = opened.get_nodes(filters=where("doc_id", "second"))
        assert left.get_content() == "green words"
        assert opened.count() == 1
