"""Counts of the values of columns, kept for a while."""

from __future__ import annotations

import pytest
from llama_index.core.schema import TextNode

from mm_retriever.errors import FilterError
from mm_retriever.search_tools.arguments import read_filters
from mm_retriever.search_tools.facets import KeptFacets
from mm_retriever.store import ImageStore


def add(store: ImageStore, number: int, label: str) -> None:
    store.add([TextNode(id_=f"n{number}", text="x", metadata={"label": label}, embedding=[1.0, 0.0])])


def test_counts_are_kept_until_they_are_too_old_each_by_its_filters(tmp_path):
    with ImageStore(tmp_path / "a.db", dimension=2) as store:
        for number in range(4):
            add(store, number, "mug")
        kept, fresh = KeptFacets(store), KeptFacets(store, seconds=0)
        mugs = read_filters({"label": "mug"})
        assert [facets.count().rows for facets in (kept, fresh)] == [4, 4]
        add(store, 4, "cap")
        assert [facets.count().rows for facets in (kept, fresh)] == [4, 5]
        assert [facets.count(mugs).rows for facets in (kept, fresh)] == [4, 4]
        (label,) = fresh.count().facets
        assert dict(label.values) == {"mug": 4, "cap": 1}


def test_filters_that_a_search_refuses_are_not_counted_as_nothing(tmp_path):
    with ImageStore(tmp_path / "a.db", dimension=2) as store:
        add(store, 0, "mug")
        with pytest.raises(FilterError, match="no column 'lable'; there are: label"):
            KeptFacets(store).count(read_filters({"lable": "mug"}))
