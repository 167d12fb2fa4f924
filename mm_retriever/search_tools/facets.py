"""Which values the columns of a collection have, and how many rows have each: what a person narrows a search by.

Counts are of rows that match the filters, not of results: the nearest of a search by vector have no end.
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
_MOST_KINDS = 200  # different texts; a column of more is a description and nothing to choose from
_LONGEST = 80
_NOT_OFFERED = frozenset((OWN_KEYS - {"label"}) | {"description", "caption", "title"})


@dataclass(frozen=True)
class Facet:
    """One column.

    Attributes:
        key: its name.
        count: how many of the rows have it.
        values: its most frequent values, each with its count, the most frequent first.
        least: of a column of numbers.
        most: the same.
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
        facets: those that more rows have come first.
        rows: how many rows were counted.
        complete: whether these are all that match.
    """

    facets: tuple[Facet, ...]
    rows: int
    complete: bool


def count_facets(store: ImageStore, filters: MetadataFilters | None = None, *, most_rows: int = MOST_ROWS) -> Facets:
    """Return the columns that a search can be narrowed by.

    Args:
        store: from `open_store`.
        filters: only rows that match these count.
        most_rows: how many rows are looked at.
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
    """Counts of one store, kept for a while: everyone who looks at it asks for the same ones, and each takes a second.

    Args:
        store: from `open_store`.
        seconds: how old a count may be; what was stored or removed since then is not in it.
    """

    def __init__(self, store: ImageStore, *, seconds: float = KEPT_SECONDS) -> None:
        self._store, self._seconds = store, seconds
        self._kept: LRUCache[str, tuple[float, Facets]] = LRUCache(256)
        self._turn = ForkLock()  # who asks while another counts waits for that count

    def count(self, filters: MetadataFilters | None = None) -> Facets:
        """Return what `count_facets` returned not long ago, or returns now.

        Raises:
            FilterError: filters that no row can meet as they are written, for example on a column that does not exist.
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
