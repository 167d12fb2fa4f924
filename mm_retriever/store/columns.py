"""Which metadata columns a collection has and what they hold, to report filters that no row can meet.

Milvus keeps metadata as dynamic columns and answers a filter on a missing column with nothing, or with everything.
`Columns` learns the columns from a sample of the rows and from rows as they are written; before it reports a column as
missing, it searches for a row that has it. Knows nothing of connections.
"""

from __future__ import annotations

import difflib
import json
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, TypeAlias

from llama_index.core.vector_stores.types import FilterCondition, FilterOperator, MetadataFilter, MetadataFilters

from mm_retriever.errors import FilterError, shown
from mm_retriever.own_keys import BOOKKEEPING_KEYS
from mm_retriever.store.filters import (
    COMPARISONS,
    LIST_OPERATORS,
    equals_number,
    filter_expression,
    read_number,
    wildcards,
)
from mm_retriever.store.schema import CONTENT_FIELD, OWN_TEXT_COLUMNS, RESERVED_KEYS, key_problem, takes_lists

Kind: TypeAlias = Literal["numbers", "text", "lists"]

SAMPLE_ROWS = 1_000
BOOKKEEPING = frozenset({"file_path", *BOOKKEEPING_KEYS})
"""Columns that ingestion writes for itself: messages do not name them, and filters on them are not reported."""

LAST = "~"
"""Sorts after everything that may follow a date (digits, "-", ":", "T", blanks): appended, it ends a day or a month."""

_NAMED = 24  # columns that a message names
_EQUALITY = (FilterOperator.EQ, FilterOperator.NE, FilterOperator.IN, FilterOperator.NIN)

Fetch: TypeAlias = Callable[[str, int], Sequence[Mapping[str, Any]]]
"""Rows that match an expression, at most so many, with `CONTENT_FIELD` where they have one."""


class Columns:
    """The metadata columns of one collection; may be used by many threads."""

    def __init__(self, fetch: Fetch, declared: frozenset[str] = frozenset()) -> None:
        self._fetch, self._declared = fetch, declared
        self._kinds: dict[str, set[Kind]] = {}
        self._sampled = False
        self._lock = threading.Lock()
        self._checked: set[tuple[str, str, str]] = set()

    def written(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Learn the columns of rows that are written."""
        with self._lock:
            for row in rows:
                self._note({key: value for key, value in row.items() if key not in RESERVED_KEYS})

    def forget(self) -> None:
        """Forget all columns, when the rows are removed."""
        with self._lock:
            self._kinds, self._sampled = {}, False

    @property
    def names(self) -> list[str]:
        """The known columns, sorted, without ingestion's own."""
        self._sample()
        with self._lock:
            return sorted(self._kinds.keys() - BOOKKEEPING - self._declared)

    def check(self, filters: MetadataFilters) -> None:
        """Refuse a filter on a declared column, which Milvus would take for a dynamic one that no row has.

        Raises:
            FilterError: names the column.
        """
        for item, _ in _leaves(filters) if self._declared else ():
            if item.key in self._declared:
                raise FilterError(self._of_another_program(item.key))

    def problems(self, filters: MetadataFilters | None) -> list[str]:
        """Return the conditions that no row can meet, a sentence each; none for an empty store."""
        if filters is None or not filters.filters:
            return []
        problems = (self._problem(item, alternatives) for item, alternatives in _leaves(filters))
        return list(dict.fromkeys(problem for problem in problems if problem is not None))

    def new_problems(self, filters: MetadataFilters) -> list[str]:
        """As `problems`, but none where columns, operators and value types were all checked before."""
        conditions = {
            (item.key, str(item.operator), f"{type(item.value).__name__} {_equals_no_number([item])!r}")
            for item, _ in _leaves(filters)
        }
        if conditions <= self._checked:
            return []
        problems = self.problems(filters)
        if self.names:  # an empty store has nothing to check against
            self._checked |= conditions
        return problems

    # ------------------------------------------------------------------------------------------ one condition

    def _problem(self, item: MetadataFilter, alternatives: Sequence[MetadataFilter]) -> str | None:
        key, operator = item.key, FilterOperator(item.operator)
        if key in OWN_TEXT_COLUMNS or key in BOOKKEEPING or key_problem(key) is not None:
            return None
        if key in self._declared:
            return self._of_another_program(key)
        if not self._has(key, None):
            return self._unknown(key)
        if operator in COMPARISONS:
            return self._order_problem(key, operator, item.value)
        wanted = _wanted(alternatives)
        kinds = self._known(key)
        if wanted and not wanted & kinds and not any(self._has(key, kind) for kind in wanted):
            if operator is FilterOperator.CONTAINS and "text" in kinds and (signs := wildcards(item.value)):
                return (
                    f"column {key!r} holds {self._described(key)}, which contains never matches by a text with {signs}"
                    f", a wildcard of Milvus: give a part of {shown(item.value)} without it"
                )
            advice = "contains" if "lists" in kinds else "text_match" if "text" in kinds else "== or in"
            return f"column {key!r} holds {self._described(key)}, which {operator.value} never matches; use {advice}"
        text = _equals_no_number(alternatives)
        if text is not None and self._has(key, "numbers") and not self._has(key, "text"):
            return (
                f"column {key!r} holds {self._described(key)}, which {operator.value} does not compare with the text "
                f"{shown(text)}; give a number"
            )
        return None

    def _order_problem(self, key: str, operator: FilterOperator, value: object) -> str | None:
        number = read_number(value) if isinstance(value, str) else value
        kinds: list[Kind] = ["text"] if isinstance(value, str) else []
        kinds += ["numbers"] if number is not None else []
        if isinstance(value, str) and number is not None and not self._has(key, "numbers"):
            kinds = []  # "9" > "10" as texts is never meant
        if any(self._has(key, kind) for kind in kinds):
            return None
        given = f"the text {shown(str(value).removesuffix(LAST))}" if number is None else f"the number {shown(value)}"
        return f"column {key!r} holds {self._described(key)}, which {operator.value} does not compare with {given}"

    def _of_another_program(self, key: str) -> str:
        names = ", ".join(self.names[:_NAMED]) or "none"
        return (
            f"column {key!r} is a field of another program's schema, which filters do not find: store the nodes in a "
            f"new collection (get_nodes with_vectors=True, add), where it is a column; there are: {names}"
        )

    def _unknown(self, key: str) -> str | None:
        names = self.names
        if not names and not self._fetch("", 1):
            return None
        if not names:
            return f"no column {key!r}; there are none"
        near = [name for name in names if name.casefold() == key.casefold()]
        near = near or difflib.get_close_matches(key, names, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        rest = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        return f"no column {key!r}; there are: {', '.join(names[:_NAMED])}{rest}{hint}"

    def _described(self, key: str) -> str:
        kinds = sorted(self._known(key))
        return " and ".join(kinds) if kinds else "nothing"

    # ------------------------------------------------------------------------------------------ what is known

    def _known(self, key: str) -> set[Kind]:
        with self._lock:
            return set(self._kinds.get(key, ()))

    def _has(self, key: str, kind: Kind | None) -> bool:
        """Whether any row has the column with values of this kind; searches for one where the sample has none."""
        self._sample()
        known = self._known(key)
        if kind in known or (kind is None and known):
            return True
        if kind == "lists" and not takes_lists(key):
            return False
        if not self._fetch(_exists(key, kind), 1):
            return False
        with self._lock:
            self._kinds.setdefault(key, set()).update([kind] if kind else [])
        if kind is None:
            for each in ("numbers", "text", "lists"):
                self._has(key, each)
        return True

    def _sample(self) -> None:
        with self._lock:
            if self._sampled:
                return
        rows = self._fetch("", SAMPLE_ROWS)
        with self._lock:
            self._sampled = True
            for row in rows:
                self._note(row_metadata(row))

    def _note(self, metadata: Mapping[str, Any]) -> None:
        for key, value in metadata.items():
            kind = _kind(value)
            if kind is not None and key_problem(key) is None:
                self._kinds.setdefault(key, set()).add(kind)


def _kind(value: object) -> Kind | None:
    if isinstance(value, str):
        return "text"
    if isinstance(value, int | float):
        return "numbers"
    return "lists" if isinstance(value, list | tuple) and value else None


def row_metadata(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the metadata of a row with `CONTENT_FIELD`; empty where another program wrote it."""
    try:
        metadata = json.loads(row.get(CONTENT_FIELD) or "{}").get("metadata")
    except (ValueError, AttributeError, RecursionError):
        return {}
    return metadata if isinstance(metadata, Mapping) else {}


def _exists(key: str, kind: Kind | None) -> str:
    """The expression for rows that have the column with a value of this kind."""

    def where(operator: FilterOperator, value: Any = None) -> MetadataFilter | MetadataFilters:
        return MetadataFilter(key=key, operator=operator, value=value)

    present = where(FilterOperator.NE, None)
    if kind is None:
        return filter_expression(MetadataFilters(filters=[present]))
    if kind == "text":
        return filter_expression(MetadataFilters(filters=[where(FilterOperator.TEXT_MATCH, "")]))
    numbers = MetadataFilters(
        filters=[where(FilterOperator.GTE, 0), where(FilterOperator.LT, 0)], condition=FilterCondition.OR
    )
    if kind == "numbers":
        return filter_expression(numbers)
    neither = MetadataFilters(filters=[where(FilterOperator.TEXT_MATCH, ""), numbers], condition=FilterCondition.NOT)
    return filter_expression(MetadataFilters(filters=[present, neither]))


def _leaves(group: MetadataFilters, depth: int = 0) -> Iterator[tuple[MetadataFilter, Sequence[MetadataFilter]]]:
    """Each condition, with those on the same column in the same OR."""
    leaves = [item for item in group.filters if isinstance(item, MetadataFilter)]
    alternatives: dict[str, list[MetadataFilter]] = {}
    if group.condition == FilterCondition.OR:
        for item in leaves:
            alternatives.setdefault(item.key, []).append(item)
    for item in leaves:
        yield item, alternatives.get(item.key, [item])
    if depth < 32:
        for inner in group.filters:
            if isinstance(inner, MetadataFilters):
                yield from _leaves(inner, depth + 1)


def _equals_no_number(alternatives: Sequence[MetadataFilter]) -> str | None:
    """The first text of these equalities, if all of their values are texts that no number equals."""
    values: list[object] = []
    for item in alternatives:
        if item.operator not in (FilterOperator.EQ, FilterOperator.IN):
            return None
        values += item.value if isinstance(item.value, list | tuple) else [item.value]
    texts = [value for value in values if isinstance(value, str) and not equals_number(value)]
    return texts[0] if texts and len(texts) == len(values) else None


def _wanted(alternatives: Sequence[MetadataFilter]) -> set[Kind]:
    """The kinds of values that any of the conditions may match; empty if they may match any kind."""
    kinds: set[Kind] = set()
    for item in alternatives:
        operator = FilterOperator(item.operator)
        if operator in LIST_OPERATORS:
            kinds.add("lists")
        elif operator is FilterOperator.TEXT_MATCH:
            kinds.add("text")
        elif operator in _EQUALITY and item.value is not None:
            kinds.update(("numbers", "text"))
        else:
            return set()
    return kinds
