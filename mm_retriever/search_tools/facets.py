"""The values of the columns of a collection, with their numbers of rows, by which a person narrows a search.

Counts are of rows that match the filters, not of results: a search by vector ranks every row.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cachetools import LRUCache
from llama_index.core.vector_stores.types import MetadataFilters

from mm_retriever.errors import FilterError, one_line
from mm_retriever.own_keys import OWN_KEYS
from mm_retriever.search_tools.results import shown_keys
from mm_retriever.store import ImageStore, filter_expression
from mm_retriever.store.columns import row_metadata
from mm_retriever.store.schema import CONTENT_FIELD
from mm_retriever.threads import ForkLock

MOST_ROWS = 20_000
MOST_VALUES = 20
MOST_FACETS = 12
KEPT_SECONDS = 60.0
_MOST_KINDS = 200  # different texts; a column with more is a description, and not offered
_LONGEST = 80
_NOT_OFFERED = frozenset((OWN_KEYS - {"label"}) | {"description", "caption", "title"})


@dataclass(frozen=True)
class Facet:
    """One column.

    Attributes:
        key: its name.
        count: number of rows that have it.
        values: its most frequent values, each with its count, the most frequent first.
        least: the smallest value of a column of numbers.
        most: the largest value of a column of numbers.
    """

    key: str
    count: int
    values: tuple[tuple[Any, int], ...] = ()
    least: float | None = None
    most: float | None = None


@dataclass(frozen=True)
class Facets:
    """The columns of the rows that match.

    Attributes:
        facets: the columns, those of most rows first.
        rows: number of rows that were counted.
        complete: whether all matching rows were counted.
    """

    facets: tuple[Facet, ...]
    rows: int
    complete: bool


def count_facets(store: ImageStore, filters: MetadataFilters | None = None, *, most_rows: int = MOST_ROWS) -> Facets:
    """Return the columns by which a search can be narrowed.

    Args:
        store: from `open_store`.
        filters: only rows that match these count.
        most_rows: limit of the rows that are counted.
    """
    texts: dict[str, Counter[Any]] = {}
    numbers: dict[str, list[float]] = {}
    rows, complete = 0, True
    for page in store.scan([CONTENT_FIELD], filters):
        for row in page:
            if rows == most_rows:
                complete = False
                break
            rows += 1
            _count(row_metadata(row), texts, numbers)
        if not complete:
            break
    facets = [
        Facet(key, len(values), least=min(values), most=max(values))
        for key, values in numbers.items()
        if key not in texts and min(values) < max(values)
    ]
    for key, values in texts.items():
        if len(values) > _MOST_KINDS or (rows > 3 and len(values) == values.total()):
            continue
        facets.append(Facet(key, values.total(), values=tuple(values.most_common(MOST_VALUES))))
    facets.sort(key=lambda facet: (not facet.values, -facet.count, facet.key))
    return Facets(tuple(facets[:MOST_FACETS]), rows, complete)


class KeptFacets:
    """Counts of one store, kept for a while: all users ask for the same ones, and each takes a second.

    Args:
        store: from `open_store`.
        seconds: the age up to which a count is used; later changes of the store are not in it.
    """

    def __init__(self, store: ImageStore, *, seconds: float = KEPT_SECONDS) -> None:
        self._store, self._seconds = store, seconds
        self._kept: LRUCache[str, tuple[float, Facets]] = LRUCache(256)
        self._turn = ForkLock()  # concurrent callers wait for one count

    def count(self, filters: MetadataFilters | None = None) -> Facets:
        """Return a kept or new result of `count_facets`.

        Raises:
            FilterError: no row can meet the filters, for example because a column does not exist.
        """
        if problems := self._store.filter_problems(filters):  # as a search refuses them
            raise FilterError(f"filters: {'; '.join(problems)}")
        expression = filter_expression(filters)
        with self._turn:
            kept = self._kept.get(expression)
            if kept is None or time.monotonic() - kept[0] >= self._seconds:
                kept = self._kept[expression] = time.monotonic(), count_facets(self._store, filters)
        return kept[1]


def _count(metadata: Mapping[str, Any], texts: dict[str, Counter[Any]], numbers: dict[str, list[float]]) -> None:
    for key in shown_keys(metadata, without=_NOT_OFFERED):
        value = metadata[key]
        if isinstance(value, bool) or (isinstance(value, str) and 0 < len(value) <= _LONGEST):
            kinds = texts.setdefault(key, Counter())
            if len(kinds) <= _MOST_KINDS:
                kinds[value if isinstance(value, bool) else one_line(value, _LONGEST)] += 1
        elif isinstance(value, int | float) and value == value:
            numbers.setdefault(key, []).append(value)
