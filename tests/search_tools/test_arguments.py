"""Filters and numbers as a language model gives them."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from llama_index.core.schema import TextNode
from llama_index.core.vector_stores.types import MetadataFilter, MetadataFilters

from mm_retriever.errors import FilterError, QueryError
from mm_retriever.search_tools import ImageSearch, read_filters
from mm_retriever.store import filter_expression, open_store
from tests.support.colour_embedding import ColourEmbedding


@pytest.mark.parametrize(
    "filters",
    [
        [{"key": "label", "operator": "==", "value": "mug"}],
        [{"key": "label", "value": "mug"}],
        {"key": "label", "operator": "=", "value": "mug"},
        {"label": "mug"},
        '[{"key": "label", "operator": "eq", "value": "mug"}]',
        {"condition": "or", "filters": [{"label": "mug"}, {"label": "kettle"}]},
        [{"key": "label", "operator": "in", "value": ["mug", "kettle"]}],
        [{"key": "label", "operator": "in", "value": ["mug", 5, True, None]}],
        [{"key": "label", "operator": "equals", "value": "mug"}],
        [{"key": "label", "operator": "contains", "value": "mu"}],
        [{"key": "label", "operator": "not_in", "value": '["umbrella", "phone case"]'}],
    ],
)
def test_filters_are_taken_in_every_form_that_can_mean_one_thing_only(search, filters):
    found = search.search("leopard", filters=filters)
    assert [image.label for image in found.results] == ["mug"] * 4


@pytest.mark.parametrize(
    ("filters", "message"),
    [
        ("label is mug", "not JSON"),
        (["label"], "give a list of conditions"),
        ([{"key": "label", "operator": "~", "value": "x"}], "give one of =="),
        ([{"operator": "==", "value": "x"}], "a condition has key"),
        ([{"key": 3, "value": "x"}], "name of a metadata column"),
        ([{"key": "label", "value": {"a": 1}}], "give text, a number"),
        ([{"key": "label", "operator": "==", "value": ["a", "b"]}], "takes one value; use in"),
        ([{"key": "label", "operator": ">", "value": "m"}], "no date like 2024-01-31"),
        ({"condition": "xor", "filters": []}, "give and, or, not"),
        ([{"key": "label == '' or 1", "value": "x"}], "is not a key"),
        ([[[[[{"a": 1}]]]]], "nested"),
        ([{"a": 1}] * 100, "more than 64"),
    ],
)
def test_other_filters_are_refused_with_what_to_write(search, filters, message):
    with pytest.raises(FilterError, match=message):
        search.search("leopard", filters=filters)


@pytest.mark.parametrize(
    ("filters", "years"),
    [
        ({"year": {"$gte": 2021}}, {2021, 2022}),
        ({"year": {"$gt": 2020, "$lt": 2022}}, {2021}),
        ({"$or": [{"year": 2020}, {"year": {"$in": [2022]}}]}, {2020, 2022}),
        ({"$and": [{"year": {"$ne": 2020}}, {"label": "mug"}]}, {2021, 2022}),
        ({"year": {"$exists": True}}, {2020, 2021, 2022}),
        (MetadataFilter(key="year", value=2021), {2021}),
        (MetadataFilters(filters=[MetadataFilter(key="year", value=2021)]), {2021}),
    ],
)
def test_filters_in_the_forms_of_document_databases_and_of_llamaindex_are_taken(tmp_path, filters, years):
    """Language models write the first; programs that call `ImageSearch` have the others."""
    model = ColourEmbedding()
    with open_store(tmp_path / "a.db", model) as store:
        store.add(
            TextNode(
                id_=str(year),
                text="red",
                embedding=model.get_text_embedding("red"),
                metadata={"year": year, "label": "mug"},
            )
            for year in (2020, 2021, 2022)
        )
        found = ImageSearch(store, model).search("red", filters=filters)
    assert {image.metadata["year"] for image in found.results} == years


@pytest.mark.parametrize("operator", ["in", "nin"])
def test_a_text_with_commas_is_no_list(search, operator):
    """It may be one label or several: the first would find nothing, without a word."""
    with pytest.raises(FilterError, match="takes a list"):
        search.search("leopard", filters=[{"key": "label", "operator": operator, "value": "mug, kettle"}])
    search.search("leopard", filters=[{"key": "label", "operator": operator, "value": ["mug, kettle"]}])


@pytest.mark.parametrize("top_k", [np.int64(2), "2", 2.0])
def test_a_number_of_results_of_any_kind(search, top_k):
    assert len(search.search("leopard", top_k=top_k).results) == 2


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["key", "operator", "value", "filters", "condition", "label"]), inner, max_size=3
        )
    ),
    max_leaves=8,
)


@given(JSON_VALUES)
def test_whatever_json_a_model_sends_as_filters_is_taken_or_refused(value):
    """Nothing but a filter or a FilterError comes out, and a filter is one that the store can express or refuse."""
    try:
        filters = read_filters(value)
        filter_expression(filters)
    except FilterError:
        pass


@pytest.mark.parametrize("value", ['mug" or id != "', "mug' or id != '", 'x"] or id in ["', "\\", '" or true or "'])
@pytest.mark.parametrize("operator", ["==", "in", "contains", "any", "all", "text_match", ">"])
def test_a_model_cannot_break_out_of_its_filters(search, value, operator):
    """The value of a condition is a text, whoever wrote it; the wildcards of text_match are refused."""
    wanted = [value] if operator in ("in", "any", "all") else value
    condition = {"key": "year" if operator == ">" else "label", "operator": operator, "value": wanted}
    refusals = {"any": "never matches", "all": "never matches", ">": "is not a number"}
    if "\\" in value:
        refusals |= {"text_match": "wildcards", "contains": "never matches"}
    if operator in refusals:
        with pytest.raises(FilterError, match=refusals[operator]):
            search.search("leopard", filters=[condition])
    else:
        assert search.search("leopard", filters=[condition]).results == ()
    for key in (value, "$meta", "_node_content", "embedding", f"label != '' or {value}"):
        with pytest.raises(FilterError, match="cannot filter"):
            search.search("leopard", filters=[{"key": key, "operator": "==", "value": "x"}])


@pytest.mark.parametrize("image", ["result" + " " * 100_000 + "x", "result 1 of" + " " * 100_000, "#" * 100_000])
def test_a_long_argument_keeps_nobody_waiting(search, talk, image):
    """The pattern for result numbers took 12 s for 40,000 blanks, and no other thread ran meanwhile."""
    start = time.process_time()
    with pytest.raises(QueryError):
        search.describe(image, conversation=talk)
    assert time.process_time() - start < 0.5


@pytest.mark.parametrize("operator", ["==", "!=", "contains", "text_match", "<", "in"])
def test_where_files_lie_cannot_be_found_out_by_filters(search, operator):
    """A thousand questions of "does the path contain this" would tell what is not shown."""
    for key in ("file_path", "mm_file_path"):
        for filters in ([{"key": key, "operator": operator, "value": "/home"}], {"filters": [{key: "/home"}]}):
            with pytest.raises(FilterError, match="where a file lies is not told"):
                search.search("mug", filters=filters)


@pytest.mark.parametrize("value", ["[" * 100_000, '{"year": 1' + "0" * 5000 + "}", [[[[[[[[1]]]]]]]], {"a": 10**5000}])
def test_filters_too_deep_or_too_large_are_refused_in_words(search, value):
    with pytest.raises(FilterError, match=r"nested|digits|64 bits"):
        search.search("mug", filters=value)


def test_nothing_found_says_which_keys_there_are(search):
    found = search.search("mug", filters={"label": "mauve"})
    assert found.results == ()
    assert "label" in found.heading
    assert "file_name" in found.heading


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        ({"colour": "mauve"}, r"no column 'colour'; there are: .*label"),
        ({"key": "colour", "operator": "!=", "value": "mauve"}, "no column 'colour'"),  # would match everything
        ({"Label": "mug"}, "did you mean 'label'"),
        ({"key": "label", "operator": ">", "value": 5}, "holds text, which > does not compare with the number 5"),
    ],
)
def test_a_filter_that_no_image_can_meet_is_refused(search, condition, message):
    """A model takes no results, or all of them, for an answer; it must be told."""
    with pytest.raises(FilterError, match=message):
        search.search("mug", filters=condition)


@pytest.mark.parametrize(("asked", "given"), [(None, 9), (2, 2), ("3", 3), (4.0, 4), (10**9, 12)])
def test_the_number_of_results_is_bounded(search, asked, given):
    """The store holds twelve; the most by default is twenty."""
    assert len(search.search("leopard", top_k=asked).results) == given


@pytest.mark.parametrize("asked", [0, -1, "many", True, 2.5, [3]])
def test_a_number_that_is_none_is_refused(search, asked):
    with pytest.raises(QueryError, match="top_k"):
        search.search("leopard", top_k=asked)


def test_a_search_for_nothing_and_a_text_too_long_are_refused(search):
    with pytest.raises(QueryError, match="nothing to search for"):
        search.search("  ")
    with pytest.raises(QueryError, match="5000 characters"):
        search.search("x" * 5_000)
    with pytest.raises(QueryError, match="give text"):
        search.search(["a"])  # type: ignore[arg-type]
