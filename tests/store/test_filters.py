"""Filters: what they mean is held against a pure-Python evaluator, on the same rows in a real Milvus Lite."""

from __future__ import annotations

import logging
import math
from collections import Counter
from itertools import accumulate
from pathlib import Path
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
from tests.support.effort import EFFORT
from tests.support.metadata_filters import (
    NASTY,
    PINNED_ROWS,
    filters,
    found,
    group,
    matches,
    metadata,
    row_nodes,
    where,
)

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


@settings(max_examples=50 * EFFORT, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(metadata(), max_size=8), items=st.lists(filters, min_size=3, max_size=5))
@example(
    rows=[],
    items=[
        group(group(where("mixed", ">", 4)), condition="not"),
        group(group(where("mixed", ">", "4")), condition="not"),
        group(where("mixed", "contains", "5"), condition="not"),
        group(group(where("year", ">", 0), condition="not"), condition="not"),
    ],
)
def test_a_filter_matches_what_its_definition_says(
    store: ImageStore, tried: Counter[str], rows: list[dict[str, Any]], items: list[MetadataFilters]
):
    """Truth: `tests.support.metadata_filters.matches`, in plain Python; missing keys and mixed types included."""
    rows = PINNED_ROWS + rows
    put(store, rows)  # takes longer than all the filters
    for item in items:
        tried["filters"] += 1
        assert found(store, item) == {number for number, row in enumerate(rows) if matches(item, row)}, item


def test_every_text_is_found_by_itself_and_by_nothing_else(store: ImageStore):
    """Our choice: a literal stands for exactly its text. Through the public query, with a vector."""
    put(store, [{"owner": text} for text in NASTY])
    for text in NASTY:
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


@pytest.mark.parametrize(
    ("stored", "matching", "others"),
    [
        (2020, ["2020", 2020, 2020.0, "2020.0", "+2020", "2.02e3"], ["202", 2021, "2020 ", "2020-01-01"]),
        ("2020", ["2020", 2020, 2020.0], ["2020.0", "+2020", 202]),
        ("2020.0", ["2020.0", 2020, 2020.0], ["2020"]),
        ("007", ["007"], ["7", 7, "07"]),  # a code: leading zeros tell it from others
        (7, ["007", "7", 7], ["07x"]),
        (1.5, ["1.5", "1.50", 1.5], ["1,5", 15]),
        ("1.10", ["1.10"], ["1.1"]),  # as texts, two versions
        (True, ["true", "TRUE", "1", 1], ["yes", "false", 0]),
        ("True", ["true", "TRUE"], ["1", 1, "false"]),
        (2**53 + 1, [2**53 + 1, "9007199254740993"], [2**53, float(2**53), "9007199254740992"]),
        (-1, ["-1", -1, "-1.0"], ["1", "+1"]),
    ],
)
def test_a_value_that_reads_as_a_number_is_one(store: ImageStore, stored: Any, matching: list[Any], others: list[Any]):
    """Our choice, in every operator of equality and its complement: who filters cannot see how a column is stored."""
    put(store, [{"year": stored, "tags": [stored]}, {"year": "a", "tags": ["a"]}])
    for value in matching:
        assert found(store, group(where("year", "==", value))) == {0}, value
        assert found(store, group(where("year", "!=", value))) == {1}, value
        assert found(store, group(where("year", "in", [value]))) == {0}, value
        assert found(store, group(where("year", "nin", [value]))) == {1}, value
        assert found(store, group(where("tags", "contains", value))) == {0}, value
        assert found(store, group(where("tags", "any", [value]))) == {0}, value
        assert found(store, group(where("tags", "all", [value]))) == {0}, value
        assert found(store, group(where("tags", "contains", value), condition="not")) == {1}, value
    for value in others:
        assert found(store, group(where("year", "==", value))) == set(), value
        assert found(store, group(where("year", "!=", value))) == {0, 1}, value


def test_order_compares_numbers_with_numbers_and_dates_as_text(store: ImageStore):
    """Truth: ISO dates sort as text; a text that reads as a number compares with numbers too."""
    put(store, [{"year": 2019, "taken": "2019-12-31"}, {"year": 2020, "taken": "2020-01-01T10:00"}, {"year": "1"}])
    for value in (2020, "2020", 2019.5, "2019.5"):
        older = {0, 2} if isinstance(value, str) else {0}  # a text compares with a text too, a number does not
        assert found(store, group(where("year", ">=", value))) == {1}
        assert found(store, group(where("year", "<", value))) == older
        assert found(store, group(group(where("year", "<", value), condition="not"))) == {0, 1, 2} - older
    assert found(store, group(where("taken", ">=", "2020-01-01"))) == {1}
    assert found(store, group(where("taken", "<", "2020-01-01"))) == {0}


def test_none_and_empty_lists_mean_what_they_say(store: ImageStore):
    """LlamaIndex's own Milvus store: `in []` matches nothing."""
    put(store, [{"owner": "ann"}, {"owner": ""}, {"owner": None}, {}])
    assert found(store, group(where("owner", "in", []))) == set()
    assert found(store, group(where("owner", "nin", []))) == {0, 1, 2, 3}
    assert found(store, group(where("owner", "==", None))) == {2, 3}
    assert found(store, group(where("owner", "!=", None))) == {0, 1}
    assert found(store, group(where("owner", "is_empty"))) == {1, 2, 3}
    put(store, [{"tags": ["a"]}])
    assert found(store, group(where("tags", "any", []))) == set()


# ------------------------------------------------------------------------------------------ what cannot be meant so


def test_what_the_columns_do_not_bear_out_is_said(store: ImageStore):
    """Our choice: Milvus answers a mistyped column with nothing, or with everything."""
    put(store, [{"label": "mug", "width": 5, "tags": ["a"], "digest": "x"}, {"price": "5.00"}, {"price": 7}])
    for item, says in (
        (where("Label", "==", "mug"), "no column 'Label'; there are: label, price, tags, width; did you mean 'label'?"),
        (where("colour", "!=", "red"), "no column 'colour'; there are: label, price, tags, width"),
        (where("widht", "is_empty"), "no column 'widht'; there are: label, price, tags, width; did you mean 'width'?"),
        (where("label", ">", 5), "column 'label' holds text, which > does not compare with the number 5"),
        (where("label", "<=", "5"), "column 'label' holds text, which <= does not compare with the number '5'"),
        (where("width", ">", "2020-01-01"), "column 'width' holds numbers, which > does not compare with the text"),
        (where("tags", "==", "a"), "column 'tags' holds lists, which == never matches; use contains"),
        (where("label", "contains", "m"), "column 'label' holds text, which contains never matches; use text_match"),
        (
            where("width", "==", "$5"),
            "column 'width' holds numbers, which == does not compare with the text '$5'; give a",
        ),
        (where("width", "in", ["a", "b"]), "column 'width' holds numbers, which in does not compare with the text 'a'"),
        (
            where("label", "contains", "a_b"),
            "column 'label' holds text, which contains never matches by a text with '_'",
        ),
        (where("width", "text_match", "m"), "column 'width' holds numbers, which text_match never matches"),
    ):
        for condition in ("and", "not"):
            [problem] = store.filter_problems(group(group(item, condition=condition), condition="or"))
            assert problem.startswith(says)
    for item in (
        where("label", "==", 5), where("price", "==", "$5"), where("width", "!=", "mug"),
        where("width", "in", ["5", "mug"]), where("width", "==", "true"), where("price", ">", 5),
        where("label", ">=", "2020-01-01"), where("digest", "==", "y"), where("file_path", "!=", "y"),
        where("id", "==", "y"),
        where("tags", "any", ["b"]), where("width", ">", "5"), where("tags", "==", None), where("tags", "is_empty"),
    ):  # fmt: skip
        assert store.filter_problems(group(item)) == []
    assert store.filter_problems(None) == store.filter_problems(MetadataFilters(filters=[])) == []
    store.clear()
    assert store.filter_problems(group(where("label", "==", "mug"))) == []


def test_a_column_of_one_row_among_thousands_exists(tmp_path: Path):
    """Truth: the rows. The columns are sampled; what the sample lacks is asked for before anything is said."""
    rows: list[dict[str, Any]] = [{"label": "mug", "year": "old"} for _ in range(1_500)]
    rows[1_400] |= {"rare": 1, "year": 2020, "tags": ["a"]}
    with open_store(tmp_path / "a.db", MODEL) as opened:
        opened.add(row_nodes(rows))
    with open_store(tmp_path / "a.db", MODEL) as opened:
        for item in (where("rare", ">", 0), where("year", ">", 0), where("tags", "contains", "b")):
            assert opened.filter_problems(group(item)) == []
        assert opened.filter_problems(group(where("rarer", ">", 0)))


def test_a_python_filter_that_nothing_can_meet_is_answered_and_logged_once(
    store: ImageStore, caplog: pytest.LogCaptureFixture
):
    """An application that runs must not begin to fail; what it asks in vain is in its log."""
    put(store, [{"label": "mug"}])
    query = VectorStoreQuery(
        query_embedding=[1.0, 0.0, 0.0], similarity_top_k=1, filters=group(where("Label", "!=", "mug"))
    )
    with caplog.at_level(logging.WARNING, logger="mm_retriever"):
        assert [len(store.query(query).ids or []) for _ in range(3)] == [1, 1, 1]
        assert store.count(group(where("label", "==", "mug"))) == 1
    assert [record.getMessage() for record in caplog.records] == [
        "filter on collection 'mm_retriever': no column 'Label'; there are: label; did you mean 'label'?"
    ]


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
        (where("a", "<", None), "use the operator is_empty"),
        (where("a", "all", []), "empty list"),
        (where("a", "in", "text"), "needs a list"),
        (where("a", "all", 1), "needs a list"),
        (where("a", "==", ["x"]), "text or a number is needed, got list; for one of several values use in"),
        (where("a", ">", ["x"]), "text or a number is needed"),
        (where("a", "==", math.nan), "not a number that can be compared"),
        (where("a", "<", math.inf), "not a number that can be compared"),
        (where("a", "==", 2**63), "64 bits"),
        (where("a", "==", 2.0**63), "told from the largest integers"),
        (where("a", "<", -(2.0**63)), "told from the largest integers"),
        (where("a", "is_empty", 1), "takes no value"),
        (where("a", "text_match", 5), "needs text"),
        (where("a", "text_match", "50%"), "wildcards"),
        (where("a", "text_match", "a_b"), "wildcards"),
        (where("a", "text_match", "a\\b"), "wildcards"),
        (where("a", "text_match_insensitive", "x"), "compares text by case"),
        (where("file path", "contains", "x"), "ASCII letters"),
        (where("in", "contains", "x"), "ASCII letters"),
        (where("id", "contains", "x"), "text column"),
        (where("ref_doc_id", ">", 5), "text column"),
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
    assert max(accumulate({"(": 1, ")": -1}.get(sign, 0) for sign in wide)) <= 16


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
