"""Whose vectors a collection holds: which models it opens for, and opening it without one."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from pymilvus import DataType, MilvusClient

from mm_retriever import ComposedRetriever, embed_to_shards, ingest_images
from mm_retriever.errors import FilterError, QueryError, StoreError, StoreMismatchError
from mm_retriever.store import describe_store, open_store, open_stored, same_model
from mm_retriever.store.inspection import recall_store, store_columns, verify_store
from tests.store.test_image_store import MODEL, asked, node, where
from tests.support.colour_embedding import ColourEmbedder

WEIGHTS, OTHERS = "0123456789ab", "ba9876543210"


@pytest.mark.parametrize(
    ("stored", "given", "same"),
    [
        (f"tiny@{WEIGHTS}/float32", f"visualized-bge@{WEIGHTS}.abcdef", True),
        (f"tiny@{WEIGHTS}/bfloat16", f"tiny@{WEIGHTS}/float32", True),
        (f"my copy@{WEIGHTS}/float32", f"BAAI/bge-visualized@{WEIGHTS}/float32", True),
        (f"my@copy@{WEIGHTS}/float16", f"visualized-bge@{WEIGHTS}.abcdef", True),
        (f"copy@{WEIGHTS}", f"BAAI/bge-m3@{WEIGHTS}", True),
        (f"tiny@{WEIGHTS}/float32", f"tiny@{OTHERS}/float32", False),
        (f"visualized-bge@{WEIGHTS}.abcdef", f"visualized-bge@{WEIGHTS}.fedcba", False),
        ("colours", "colours", True),
        ("colours", "others", False),
        ("colours", f"visualized-bge@{WEIGHTS}.abcdef", False),
        (f"{WEIGHTS}/float32", f"{WEIGHTS}/bfloat16", False),
    ],
)
def test_vectors_compare_where_the_weights_are_the_same(stored, given, same):
    """Our choice: name, place and float format are no part of it; what earlier versions wrote is understood."""
    assert same_model(stored, given) is same
    assert same_model(given, stored) is same


@pytest.mark.parametrize(
    ("given", "named"), [("tiny", "'tiny'"), (ColourEmbedder(), "a ColourEmbedder"), (None, "a NoneType")]
)
def test_what_is_no_embed_model_is_named_with_the_way_out(given, named, tmp_path):
    store = open_store(str(tmp_path / "shop.db"), MODEL)
    for use in (
        lambda: open_store(str(tmp_path / "new.db"), given),
        lambda: ComposedRetriever(store, given),
        lambda: ingest_images(tmp_path, store, given),
        lambda: embed_to_shards(tmp_path, tmp_path / "shards", given),
    ):
        with pytest.raises(QueryError, match=rf"embed_model is {named}, not a ComposedEmbedding: give ComposedEmb"):
            use()
    assert not (tmp_path / "new.db").exists()


def test_a_collection_of_an_earlier_version_opens_under_a_copy_of_its_model_and_says_what_differs(tmp_path):
    """Earlier versions kept `name@weights/dtype` and no note."""
    earlier = SimpleNamespace(dimension=3, model_id=f"tiny@{WEIGHTS}/bfloat16")
    with open_store(tmp_path / "a.db", earlier) as store:
        store.add([node("a")])
    now = SimpleNamespace(dimension=3, model_id=f"visualized-bge@{WEIGHTS}.abcdef", model_note="copy, float32")
    with open_store(tmp_path / "a.db", now) as store:
        assert asked(store) == ["a"]
    other = SimpleNamespace(dimension=3, model_id=f"visualized-bge@{OTHERS}.abcdef", model_note="base, float32")
    with pytest.raises(StoreMismatchError, match=rf"'tiny@{WEIGHTS}/bfloat16', .* \(base, float32\)"):
        open_store(tmp_path / "a.db", other)
    with open_store(tmp_path / "b.db", now) as store:
        assert store.count() == 0
    assert describe_store(tmp_path / "b.db")["mm_retriever"]["model_note"] == "copy, float32"


def test_what_is_not_there_is_refused_and_not_made_where_nothing_is_to_be_made(tmp_path):
    """A mistyped name must not become an empty collection that answers every search with nothing."""
    with open_store(tmp_path / "photos.db", MODEL) as store:
        store.add([node("a")])
    for open_again in (lambda **options: open_store(**options, embed_model=MODEL, create=False), open_stored):
        with pytest.raises(StoreError, match=r"no collection 'typo' .* there are: 'mm_retriever' \(1 rows\)"):
            open_again(uri=tmp_path / "photos.db", collection="typo")
        with pytest.raises(StoreError, match=r"no store .*photo\.db'; there are 'photos\.db' in its folder"):
            open_again(uri=tmp_path / "photo.db")
    with pytest.raises(StoreError, match="no store"):
        describe_store(tmp_path / "none" / "photo.db")
    assert [path.name for path in tmp_path.glob("*.db")] == ["photos.db"]
    assert not (tmp_path / "none").exists()
    assert describe_store(tmp_path / "photos.db").keys() == {"mm_retriever"}


class Sparse:
    model_id = "sparse"

    def encode_documents(self, texts):
        return [{1: 1.0} for _ in texts]

    encode_queries = encode_documents


@pytest.mark.parametrize("options", [{}, {"metric": "COSINE"}, {"hybrid": True}, {"hybrid": Sparse()}])
def test_a_store_is_opened_without_its_models_to_count_and_remove(tmp_path, options):
    """Removing rows needs no vectors, so it must not load a model of gigabytes, nor be told metric and words."""
    with open_store(tmp_path / "a.db", MODEL, **options) as store:
        store.add([node("a"), node("b")])
    with open_stored(tmp_path / "a.db") as store:
        assert (store.model_id, store.dim, store.similarity_metric) == (MODEL.model_id, 3, options.get("metric", "IP"))
        store.delete_nodes(["a"])
        assert store.count() == 1
        if isinstance(options.get("hybrid"), Sparse):
            with pytest.raises(QueryError, match="without its sparse model 'sparse'"):
                store.add([node("c")])
    with open_store(tmp_path / "a.db", MODEL, **options) as store:
        assert asked(store) == ["b"]


_TEXT = {"datatype": DataType.VARCHAR, "max_length": 100}
_FIELDS = {
    "id": _TEXT | {"is_primary": True},
    "doc_id": _TEXT,
    "text": _TEXT,
    "embedding": {"datatype": DataType.FLOAT_VECTOR, "dim": 3},
}


def made_by_another_program(path: str, fields: dict[str, Any], metric: str, rows: list[dict[str, Any]]) -> None:
    client = MilvusClient(path)
    schema = MilvusClient.create_schema(enable_dynamic_field=True)
    for name, options in (_FIELDS | fields).items():
        schema.add_field(name, **options)
    index = client.prepare_index_params()
    kind = "SPARSE_INVERTED_INDEX" if "embedding" in fields else "FLAT"
    index.add_index("embedding", index_type=kind, metric_type=metric)
    client.create_collection("theirs", schema=schema, index_params=index)
    client.insert("theirs", rows)
    client.close()


@pytest.mark.parametrize(
    ("fields", "metric", "says"),
    [
        ({"id": {"datatype": DataType.INT64, "is_primary": True}}, "IP", "lacks the field id of type VARCHAR"),
        ({"id": _TEXT, "pk": _TEXT | {"is_primary": True}}, "IP", "lacks ids that are given: id is not its primary"),
        ({"doc_id": {"datatype": DataType.INT64}}, "IP", "lacks the field doc_id of type VARCHAR"),
        ({"text": {"datatype": DataType.JSON}}, "IP", "lacks the field text of type VARCHAR"),
        ({"embedding": {"datatype": DataType.SPARSE_FLOAT_VECTOR}}, "IP", "field embedding of type FLOAT_VECTOR"),
        ({}, "L2", "measures with L2, and only IP and COSINE are served"),
    ],
)
def test_a_collection_whose_fields_are_of_other_kinds_is_another_programs(tmp_path, fields, metric, says):
    """Opening one was a KeyError, or its rows were read as ours; `info` ended with it, whatever stood beside."""
    path = str(tmp_path / "a.db")
    with open_store(path, MODEL, collection="ours") as ours:
        ours.add([node("a", year=1)])
    made_by_another_program(path, fields, metric, [])
    with pytest.raises(StoreMismatchError, match=says):
        open_store(path, MODEL, collection="theirs")
    assert store_columns(path) == {"ours": ["year"], "theirs": "made by another program"}
    assert verify_store(path)["theirs"] == recall_store(path)["theirs"] == "made by another program"


def test_filters_on_fields_that_another_program_declared_are_refused(tmp_path):
    """As MilvusVectorStore declares `scalar_field_names`.

    A filter on dynamic columns finds nothing there, and its negation every row, which `delete_nodes` then removed. A
    row without a value for such a field was taken for a damaged one.
    """
    path = str(tmp_path / "a.db")
    row = {"doc_id": "", "text": "t", "embedding": [1.0, 0, 0]}
    rows = [row | {"id": f"of {year}", "year": year} for year in (1, 2)]
    made_by_another_program(path, {"year": {"datatype": DataType.INT64, "nullable": True}}, "IP", rows)
    with open_store(path, MODEL, collection="theirs") as store:
        store.add([node("a", colour="red")])
        for use in (
            lambda: asked(store, filters=where("year", 1)),
            lambda: store.count(where("year", 1, "!=")),
            lambda: store.delete_nodes(filters=where("year", 1, "!=")),
        ):
            with pytest.raises(FilterError, match=r"'year' is a field of another program's .*; there are: colour"):
                use()
        assert store.filter_problems(where("year", 1))[0].startswith("column 'year' is a field of another program")
        assert asked(store, filters=where("colour", "red")) == ["a"]
        assert store.count() == 3
        assert not store.verify().damaged
