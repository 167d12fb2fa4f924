"""Filters: what they mean is held against a pure-Python evaluator, on the same rows in a real Milvus Lite."""

from __future__ import annotations

import math
from collections import Counter
from itertools import accumulate
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from llama_index.core.vector_stores.types import (
    FilterCondition,
    FilterOperator,
    MetadataFilter,
    MetadataFilters,
    VectorStoreQuery,
)

from mm_retriever.errors import FilterError
from mm_retriever.store import ImageStore, filter_expression, open_store
from tests.effort import EFFORT
from tests.metadata_filters import NASTY, PINNED_ROWS, filters, found, group, matches, metadata, row_nodes, where

MODEL = SimpleNamespace(dimension=3, model_id="three numbers")
Op = FilterOperator


# ------------------------------------------------------------------------------------------ the property


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory):
    with open_store(tmp_path_factory.mktemp("filters") / "rows.db", MODEL) as opened:
        yield opened


def put(store: ImageStore, rows: list[dict[str, Any]]) -> None:
    store.clear()
    store.add(row_nodes(rows))


@settings(max_examples=150 * EFFORT, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(metadata(), max_size=8), item=filters)
@example(rows=[], item=group(group(where("mixed", ">", 4)), condition="not"))
@example(rows=[], item=group(group(where("mixed", ">", "4")), condition="not"))
@example(rows=[], item=group(where("mixed", "contains", "5"), condition="not"))
@example(rows=[], item=group(group(where("year", ">", 0), condition="not"), condition="not"))
def test_a_filter_matches_what_its_definition_says(
    store: ImageStore, tried: Counter[str], rows: list[dict[str, Any]], item: MetadataFilters
):
    """Truth: `tests.metadata_filters.matches`, in plain Python; missing keys and mixed types included."""
    rows = PINNED_ROWS + rows
    put(store, rows)
    tried["filters"] += 1
    assert found(store, item) == {number for number, row in enumerate(rows) if matches(item, row)}


@pytest.mark.parametrize("text", NASTY)
def test_every_text_is_found_by_itself_and_by_nothing_else(store: ImageStore, text: str):
    """Our choice: a literal stands for exactly its text. Through the public query, with a vector."""
    put(store, [{"owner": one} for one in NASTY])
    item = group(where("owner", "==", text))
    result = store.query(VectorStoreQuery(query_embedding=[1.0, 0.0, 0.0], similarity_top_k=100, filters=item))
    assert [node.metadata["owner"] for node in result.nodes] == [text]


def test_the_conditions_of_llamaindex_mean_what_its_own_store_says(store: ImageStore):
    """Truth: llama_index.core.vector_stores.utils.build_metadata_filter_fn, where it is defined (no mixed types)."""
    from llama_index.core.vector_stores.utils import build_metadata_filter_fn

    rows = [{"year": 1, "owner": "ann"}, {"year": 2, "owner": "bob"}, {"year": 3}, {"owner": ""}, {}]
    put(store, rows)
    leaves = [
        where("year", "==", 2), where("year", "!=", 2), where("year", ">=", 2), where("year", "<", 3),
        where("owner", "in", ["ann", "x"]), where("owner", "nin", ["ann", "x"]), where("owner", "text_match", "o"),
        where("owner", "is_empty"),
    ]  # fmt: skip
    for condition in ("and", "or", "not"):
        for first in leaves:
            for second in leaves:
                item = group(first, second, condition=condition)
                reference = build_metadata_filter_fn(lambda number: rows[int(number)], item)
                assert found(store, item) == {n for n in range(len(rows)) if reference(str(n))}, item


# ------------------------------------------------------------------------------------------ nothing gets out


@pytest.mark.parametrize(
    "key",
    ["year > 0 or owner", "year]", 'x" or id', "a'b", "a\\b", "a\nb", "$meta", "a[0]", "", " a", "-a", "x" * 129,
     "a/b", "a~b", "_node_content", "_node_type", "embedding", "_seq", "count(*)"],
)  # fmt: skip
def test_a_key_that_is_no_name_is_refused(key: str):
    """Our choice; the first is the injection through keys that the MilvusVectorStore of LlamaIndex lets through."""
    with pytest.raises(FilterError, match="cannot filter"):
        filter_expression(group(where(key, "==", 1)))


@pytest.mark.parametrize(
    ("item", "reason"),
    [
        (where("a", "==", None), "use the operator is_empty"),
        (where("a", "in", []), "empty list"),
        (where("a", "nin", []), "empty list"),
        (where("a", "any", []), "empty list"),
        (where("a", "in", "text"), "needs a list"),
        (where("a", "all", 1), "needs a list"),
        (where("a", "==", ["x"]), "text or a number is needed"),
        (where("a", ">", ["x"]), "text or a number is needed"),
        (where("a", "==", math.nan), "not a number that can be compared"),
        (where("a", "<", math.inf), "not a number that can be compared"),
        (where("a", "==", 2**63), "64 bits"),
        (where("a", "is_empty", 1), "takes no value"),
        (where("a", "text_match", 5), "needs text"),
        (where("a", "text_match", "50%"), "wildcards"),
        (where("a", "text_match", "a_b"), "wildcards"),
        (where("a", "text_match", "a\\b"), "wildcards"),
        (where("a", "text_match_insensitive", "x"), "compares text by case"),
        (where("file path", "contains", "x"), "ASCII letters"),
        (where("in", "contains", "x"), "ASCII letters"),
        (where("id", "contains", "x"), "text column"),
        (where("ref_doc_id", "==", 5), "text column"),
        (where("a", "==", "\ud800"), "surrogate"),
        (where("a", "==", "x" * 65_536), "at most"),
        (MetadataFilters(filters=[]), "says nothing"),
    ],
)
def test_what_cannot_be_expressed_is_refused(item: MetadataFilter | MetadataFilters, reason: str):
    """Our choice: refused with the reason, where LlamaIndex's MilvusVectorStore drops the filter or sends it broken."""
    with pytest.raises(FilterError, match=reason):
        filter_expression(MetadataFilters(filters=[item]))


def test_no_filter_is_the_empty_expression():
    assert filter_expression(None) == filter_expression(MetadataFilters(filters=[])) == ""


def test_deep_and_wide_filters_are_refused_before_they_reach_milvus():
    """Our choice: a server overflows on deeply nested expressions; wide ones are joined as a balanced tree."""
    item = group(where("a", "==", 1))
    for _ in range(16):
        item = group(item)
    with pytest.raises(FilterError, match="nested more than 16 deep"):
        filter_expression(item)
    with pytest.raises(FilterError, match="more than 4096"):
        filter_expression(group(where("a", "in", list(range(4097)))))
    with pytest.raises(FilterError, match="more than 4096"):
        filter_expression(group(*[where("a", "==", 1)] * 4097))
    wide = filter_expression(group(where("a", "in", list(range(4000)))))
    assert max(accumulate({"(": 1, ")": -1}.get(sign, 0) for sign in wide)) <= 14


@pytest.mark.parametrize("operator", ["in", "nin", "any", "all"])
def test_a_filter_of_many_or_long_values_is_refused_before_it_is_built(operator: str):
    """A model can write 50 MB of filter in one call; the server would be busy for minutes."""
    with pytest.raises(FilterError, match="more than 4096"):
        filter_expression(group(where("tags", operator, list(range(5000)))))
    with pytest.raises(FilterError, match="more than 1048576 characters"):
        filter_expression(group(where("tags", operator, ["x" * 60_000] * 20)))


@pytest.mark.parametrize("operator", ["==", ">", "contains", "is_empty"])
def test_a_number_of_more_digits_than_python_writes_is_refused_in_words(operator: str):
    item = MetadataFilter.model_construct(key="a", value=10**5000, operator=Op(operator))
    with pytest.raises(FilterError, match="a value of type int"):
        filter_expression(MetadataFilters.model_construct(filters=[item], condition=FilterCondition.AND))


def test_ids_are_a_list_of_texts(store: ImageStore):
    """A text is a sequence too: `delete_nodes("abc")` would remove the rows a, b and c."""
    put(store, [{}])
    for call in (
        lambda: store.delete_nodes("row 0"),
        lambda: store.get_nodes("row 0"),
        lambda: store.delete_nodes([5]),
        lambda: store.query(VectorStoreQuery(query_embedding=[1.0, 0, 0], similarity_top_k=1, node_ids=[None])),
        lambda: store.query(VectorStoreQuery(query_embedding=[1.0, 0, 0], similarity_top_k=1, doc_ids="row 0")),
    ):
        with pytest.raises(FilterError, match="is needed, got"):
            call()
    assert store.count() == 1


def test_a_wide_filter_works(store: ImageStore):
    put(store, [{"year": 3999}, {"year": 4000}])
    assert found(store, group(where("year", "in", list(range(4000))))) == {0}


def test_unvalidated_filters_get_no_further(store: ImageStore):
    """Objects that skip pydantic's validation are checked all the same."""
    strange = [
        MetadataFilters.model_construct(filters=["id != ''"], condition=FilterCondition.AND),
        MetadataFilters.model_construct(filters=[where("a", "==", 1)], condition="xor"),
        MetadataFilters(filters=[]).model_copy(
            update={"filters": [MetadataFilter.model_construct(key="a", value=1, operator="~")]}
        ),
        MetadataFilters(filters=[]).model_copy(
            update={"filters": [MetadataFilter.model_construct(key="a", value={"x": 1}, operator=Op.EQ)]}
        ),
        MetadataFilters(filters=[]).model_copy(
            update={"filters": [MetadataFilter.model_construct(key=5, value=1, operator=Op.EQ)]}
        ),
        "id != ''",
    ]
    for item in strange:
        with pytest.raises(FilterError):
            filter_expression(item)  # type: ignore[arg-type]
    text_condition = MetadataFilters.model_construct(filters=[where("a", "==", 1)], condition="not")
    assert filter_expression(text_condition) == filter_expression(group(where("a", "==", 1), condition="not"))


def test_a_subclass_of_a_number_or_text_prints_as_its_value():
    """An enum or numpy scalar must not bring its own repr into an expression."""

    class Evil(str):
        def translate(self, table):
            return '" or id != "'

    class Loud(int):
        def __str__(self):
            return "1 or id != ''"

    class Sly(str):
        def __str__(self):
            return "year) > 0 or (id"

        def __format__(self, form):
            return str(self)

    for operator in (Op.CONTAINS, Op.GT, Op.EQ):
        item = MetadataFilter.model_construct(key=Sly("tags"), value=1, operator=operator)
        sly = MetadataFilters.model_construct(filters=[item], condition=FilterCondition.AND)
        assert "year" not in filter_expression(sly)
    for value in (Evil("x"), Loud(1)):
        item = MetadataFilter.model_construct(key="a", value=value, operator=Op.EQ)
        expression = filter_expression(MetadataFilters.model_construct(filters=[item], condition=FilterCondition.AND))
        assert "id" not in expression
