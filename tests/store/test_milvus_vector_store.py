"""An app that was written for LlamaIndex's MilvusVectorStore, on our store.

Truth: the tests of llama-index-vector-stores-milvus that run on Milvus Lite (release 0.8, before they used mocks), told
in our words. Four things differ on purpose: `clear()` leaves an empty collection, which takes nodes again, `get_nodes`
fetches vectors only where they are asked for, and a store without vectors or without their index is refused.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator

import pytest
from llama_index.core.schema import NodeRelationship, RelatedNodeInfo, TextNode
from llama_index.core.vector_stores.types import BasePydanticVectorStore, VectorStoreQuery, VectorStoreQueryMode
from llama_index.vector_stores.milvus import MilvusVectorStore
from llama_index.vector_stores.milvus.utils import BaseSparseEmbeddingFunction

from mm_retriever.errors import StoreError
from mm_retriever.store import ImageStore

NAME = "test_collection"


class TwoTerms(BaseSparseEmbeddingFunction):
    """Every text has the same two terms, so that words decide nothing."""

    def encode_queries(self, queries: list[str]) -> list[dict[int, float]]:
        return [{1: 0.5, 2: 0.3} for _ in queries]

    def encode_documents(self, documents: list[str]) -> list[dict[int, float]]:
        return [{1: 0.5, 2: 0.3} for _ in documents]


def node(name: str, vector: list[float], source: str) -> TextNode:
    relationships = {NodeRelationship.SOURCE: RelatedNodeInfo(node_id=source)}
    return TextNode(id_=name, text=f"{name} text", embedding=vector, relationships=relationships)


def opposite() -> list[TextNode]:
    return [node("n1", [0.5] * 64, "d1"), node("n2", [-0.5] * 64, "d2")]


@pytest.fixture
def store(tmp_path) -> Iterator[ImageStore]:
    """Opened by the names of MilvusVectorStore."""
    with ImageStore(
        uri=str(tmp_path / "a.db"),
        dim=64,
        collection_name=NAME,
        embedding_field="embedding",
        id_field="id",
        similarity_metric="COSINE",
        consistency_level="Strong",
        index_management="create_if_not_exists",
        overwrite=True,
    ) as opened:
        yield opened


def rows(store: ImageStore) -> int:
    return store.client.query(NAME, output_fields=["count(*)"])[0]["count(*)"]


def test_it_is_a_vector_store_of_llamaindex(store):
    assert isinstance(store, MilvusVectorStore)
    assert isinstance(store, BasePydanticVectorStore)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_nodes_go_by_document_and_by_id(store, asynchronous):
    def call(method: str, *args, **kwargs):
        if not asynchronous:
            return getattr(store, method)(*args, **kwargs)
        return asyncio.run(getattr(store, {"add": "async_add"}.get(method, f"a{method}"))(*args, **kwargs))

    call("add", opposite())
    call("delete", ref_doc_id="d1")
    assert rows(store) == 1
    call("delete", ref_doc_id="d2")
    assert rows(store) == 0
    call("add", opposite())
    call("delete_nodes", node_ids=["n1"])
    assert [found.node_id for found in call("get_nodes", node_ids=["n1", "n2"])] == ["n2"]
    call("clear")
    assert rows(store) == 0


def test_nodes_come_back_as_they_were(store):
    given = opposite()
    store.add(given)
    assert store.get_nodes(node_ids=["n1", "n2"], with_vectors=True) == given
    assert sorted(found.node_id for found in store.get_nodes(node_ids=["n2", "n1"])) == ["n1", "n2"]
    assert store.get_nodes(node_ids=["n1"])[0].embedding is None


@pytest.mark.parametrize(("sign", "nearest"), [(1, "n1"), (-1, "n2")])
def test_a_query_finds_the_nearest(store, sign, nearest):
    store.add(opposite())
    query = VectorStoreQuery(query_embedding=[sign * 0.5] * 64, similarity_top_k=1)
    for result in (store.query(query), asyncio.run(store.aquery(query=query))):
        assert [(found.node_id, found.get_content()) for found in result.nodes] == [(nearest, f"{nearest} text")]


def test_a_diverse_query_fetches_more_than_it_returns(store):
    store.add([node(f"n{number}", [0.5] * 63 + [0.2 * number], "d") for number in range(3)])
    query = VectorStoreQuery(query_embedding=[0.5] * 64, similarity_top_k=2, mode=VectorStoreQueryMode.MMR)
    assert store.query(query, mmr_prefetch_k=3).ids == ["n2", "n1"]


def test_a_hybrid_store_takes_a_sparse_function_of_llamaindex(tmp_path):
    options = {
        "dim": 64,
        "collection_name": NAME,
        "enable_sparse": True,
        "hybrid_ranker": "RRFRanker",
        "hybrid_ranker_params": {"k": 60},
        "sparse_embedding_function": TwoTerms(),
    }
    query = VectorStoreQuery(
        query_embedding=[0.5] * 64, query_str="words", similarity_top_k=1, mode=VectorStoreQueryMode.HYBRID
    )
    with ImageStore(tmp_path / "a.db", **options) as store:
        store.add(opposite())
        assert store.query(query).ids == ["n1"]
    with ImageStore(tmp_path / "a.db", **options) as again:
        assert again.query(query).ids == ["n1"]
    with pytest.raises(StoreError, match=re.escape("={'k': 7}: this store has {'k': 60}")):
        ImageStore(tmp_path / "a.db", **options | {"hybrid_ranker_params": {"k": 7}})
    with pytest.raises(StoreError, match=r"sparse_embedding_function='bm25'.*BaseSparseEmbeddingFunction"):
        ImageStore(tmp_path / "a.db", **options | {"sparse_embedding_function": "bm25"})


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ({"enable_dense": False}, "enable_dense=False: this store has True"),
        (
            {"index_management": "no_validation"},
            "index_management='no_validation': this store has 'create_if_not_exists'",
        ),
    ],
)
def test_a_store_without_vectors_or_without_their_index_is_refused(tmp_path, option, says):
    with pytest.raises(StoreError, match=re.escape(says)):
        ImageStore(tmp_path / "a.db", dim=64, collection_name=NAME, **option)
    assert not (tmp_path / "a.db").exists()


def test_the_asynchronous_client_asks_the_same_collection(store):
    store.add(opposite())
    (counted,) = asyncio.run(store.aclient.query(NAME, output_fields=["count(*)"]))
    assert counted["count(*)"] == rows(store) == 2


def test_an_existing_collection_says_its_metric(store):
    """Unit vectors rank alike by both metrics, so there is nothing to ask the caller; a metric that is named holds."""
    store.add(opposite())
    for metric in ({}, {"metric": "auto"}, {"similarity_metric": "COSINE"}):
        with ImageStore(store.uri, collection_name=NAME, create=False, **metric) as again:
            assert (again.similarity_metric, again.count()) == ("COSINE", 2)
    with pytest.raises(StoreError, match="measures with COSINE, IP is asked for"):
        ImageStore(store.uri, collection_name=NAME, metric="IP")
