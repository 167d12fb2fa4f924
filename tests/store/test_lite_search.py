"""Searches of a Milvus Lite file give what Milvus Lite's own code gives, whatever was written, replaced and removed."""

from __future__ import annotations

from types import SimpleNamespace

import milvus_lite.engine.collection
import numpy as np
import pytest
from llama_index.core.schema import ImageNode
from llama_index.core.vector_stores.types import (
    FilterOperator,
    MetadataFilter,
    MetadataFilters,
    VectorStoreQuery,
    VectorStoreQueryMode,
)
from milvus_lite.search.filter.eval import hybrid_backend
from milvus_lite.storage.segment import Segment

from mm_retriever.errors import StoreError
from mm_retriever.store import ImageStore, open_store, recall_store
from mm_retriever.store.schema import build_params, index_for, search_params

DIMENSION = 8
MODEL = SimpleNamespace(dimension=DIMENSION, model_id="eight numbers")
CHEAP = MetadataFilters(filters=[MetadataFilter(key="price", operator=FilterOperator.LT, value=3)])
RARE = MetadataFilters(filters=[MetadataFilter(key="name", value="n7")])
MIXED = MetadataFilters(filters=[MetadataFilter(key="mixed", value="text")])


def nodes(random, numbers) -> list[ImageNode]:
    vectors = random.normal(size=(len(numbers), DIMENSION))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return [
        ImageNode(
            id_=f"{number:05}",
            image_path=f"/{number}.png",
            metadata={"price": int(number % 7), "name": f"n{number}", "mixed": "text" if number % 2 else 4},
            embedding=vector.tolist(),
        )
        for number, vector in zip(numbers, vectors, strict=True)
    ]


def answers(store: ImageStore) -> list[tuple[list[str], list[float]]]:
    random = np.random.default_rng(9)
    found = []
    for filters in (None, CHEAP, RARE, MIXED):
        for top_k in (9, 2_000):
            vector = random.normal(size=DIMENSION)
            query = VectorStoreQuery(
                query_embedding=(vector / np.linalg.norm(vector)).tolist(), similarity_top_k=top_k, filters=filters
            )
            result = store.query(query)
            found.append((result.ids, result.similarities))
    return found


def whole_nodes(store: ImageStore) -> list[str]:
    """Some by their ids, and all of a kind, with their vectors."""
    some = store.get_nodes([f"{number:05}" for number in range(0, 400, 50)], with_vectors=True)
    return [node.to_json() for node in [*some, *store.get_nodes(filters=RARE, with_vectors=True)]]


def assert_as_milvus_lite_answers(store: ImageStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own functions are kept by ours, as functions that stand for others keep them."""
    ours = answers(store)
    with monkeypatch.context() as patch:
        for owner, name in (
            (milvus_lite.engine.collection, "execute_search_with_index"),
            (hybrid_backend, "_augment_table"),
            (Segment, "row_to_dict"),
            (milvus_lite.engine.collection, "project_record"),
        ):
            patch.setattr(owner, name, getattr(owner, name).__wrapped__)
        theirs, their_nodes = answers(store), whole_nodes(store)
    assert whole_nodes(store) == their_nodes
    for (ids, scores), (their_ids, their_scores) in zip(ours, theirs, strict=True):
        assert ids == their_ids
        np.testing.assert_allclose(scores, their_scores, atol=1e-6)


@pytest.mark.parametrize("index", ["FLAT", pytest.param("HNSW", marks=pytest.mark.slow)])
def test_answers_are_those_of_milvus_lite_after_every_kind_of_change(tmp_path, monkeypatch, index):
    """The truth is Milvus Lite's own search over the same rows."""
    random = np.random.default_rng(3)
    with open_store(tmp_path / "a.db", MODEL, index=index) as store:
        store.add(nodes(random, range(400)))
        assert_as_milvus_lite_answers(store, monkeypatch)  # in memory
        store.flush()
        assert_as_milvus_lite_answers(store, monkeypatch)  # in one file
        store.add(nodes(random, range(370, 640)))  # some replaced in memory
        store.delete_nodes([f"{number:05}" for number in range(0, 210, 3)])  # removed in memory
        store.add(nodes(random, range(0, 30, 3)))  # and stored again
        assert_as_milvus_lite_answers(store, monkeypatch)
        store.flush()
        assert_as_milvus_lite_answers(store, monkeypatch)  # in two files, with removals on the disk
        store.delete_nodes(["00001"])
        assert_as_milvus_lite_answers(store, monkeypatch)
        assert store.count() == 640 - 70 + 10 - 1
    with open_store(tmp_path / "a.db", MODEL) as store:
        assert_as_milvus_lite_answers(store, monkeypatch)  # opened again


def test_what_is_kept_goes_with_the_rows_that_it_is_of(tmp_path):
    """A cleared or replaced collection has none of the old rows, and a key that comes later is found."""
    random = np.random.default_rng(4)
    with open_store(tmp_path / "a.db", MODEL) as store:
        store.add(nodes(random, range(400)))
        store.flush()
        assert len(answers(store)[1][0]) == 400
        store.clear()
        assert answers(store)[1][0] == []
        later = nodes(random, range(300))
        for node in later:
            node.metadata["price"] = 6
        store.add(later)
        store.flush()
        assert answers(store)[2][0] == []  # none is cheap now
        assert len(answers(store)[1][0]) == 300


def test_modes_that_fetch_vectors_or_words_still_answer(tmp_path):
    """Our choice: they go the same way."""
    random = np.random.default_rng(5)
    with open_store(tmp_path / "a.db", MODEL, hybrid=True) as store:
        store.add(nodes(random, range(300)))
        store.flush()
        for mode in (VectorStoreQueryMode.MMR, VectorStoreQueryMode.HYBRID):
            query = VectorStoreQuery(query_embedding=[1.0] + [0.0] * 7, query_str="n7", similarity_top_k=3, mode=mode)
            assert len(store.query(query).ids) == 3


def test_recall_is_measured_on_the_rows_themselves(tmp_path):
    """A scan of every row finds all of its nearest; of an empty collection there is nothing to tell."""
    random = np.random.default_rng(6)
    with open_store(tmp_path / "a.db", MODEL, index="HNSW_SQ", collection="coarse") as store:
        store.add(nodes(random, range(600)))
        store.flush()
    with open_store(tmp_path / "a.db", MODEL) as store:
        store.add(nodes(random, range(600)))
    open_store(tmp_path / "a.db", MODEL, collection="empty").close()
    measured = recall_store(tmp_path / "a.db")
    assert measured["mm_retriever"].recall == 1
    assert measured["mm_retriever"].queries == 100
    assert 0.5 < measured["coarse"].recall <= 1
    assert "HNSW_SQ finds" in str(measured["coarse"])
    assert str(measured["empty"]) == "FLAT: no rows to measure"


def test_the_index_goes_by_place_and_size(tmp_path):
    """Our choice: exact as long as it is fast, then by memory: 3.2, 0.9 and 0.86 kB for 768 numbers."""
    assert index_for(None, lite=True, self_hosted=True) == "FLAT"
    assert index_for(1_000_000, lite=True, self_hosted=True) == "HNSW"
    chosen = [index_for(rows, lite=False, self_hosted=True) for rows in (None, 10**6, 10**7, 10**8)]
    assert chosen == ["HNSW", "HNSW", "HNSW_SQ", "IVF_RABITQ"]
    assert index_for(10**9, lite=False, self_hosted=False) == "AUTOINDEX"
    assert build_params("IVF_RABITQ", 10**8)["nlist"] == 40_000
    assert search_params("DISKANN", 9)["search_list"] == 100
    with open_store(tmp_path / "a.db", MODEL, rows=10**6) as store:
        assert store.index_type == "HNSW"
    with open_store(tmp_path / "a.db", MODEL) as store:  # what is there stays
        assert store.index_type == "HNSW"
    with pytest.raises(StoreError, match="'DISKANN' needs a Milvus server"):
        open_store(tmp_path / "b.db", MODEL, index="DISKANN")


def test_of_equal_rows_more_results_begin_with_those_of_fewer(tmp_path):
    """Copies of an image have one vector: page after page shows each of them once."""
    random = np.random.default_rng(5)
    copies = nodes(random, range(200))
    near, far = copies[0].embedding, copies[1].embedding
    for node in copies:
        node.embedding = far if int(node.node_id) % 3 else near
    with open_store(tmp_path / "a.db", MODEL, index="FLAT") as store:
        store.add(copies)
        store.flush()
        asked = VectorStoreQuery(query_embedding=near, similarity_top_k=200)
        whole = store.query(asked).ids
        assert sorted(whole) == [node.node_id for node in copies]
        for top_k in (7, 12, 13, 14, 15, 23, 24, 25, 70, 90):
            asked.similarity_top_k = top_k
            assert store.query(asked).ids == whole[:top_k]
