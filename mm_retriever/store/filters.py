"""Metadata filters: LlamaIndex's `MetadataFilters` to a Milvus expression that a value cannot break out of.

Owns which keys and values may stand in an expression, and what a filter means when a key is missing or its values
have mixed types. Knows nothing of connections: `filter_expression` is a pure function.

What a filter means (Milvus Lite and Milvus servers agree, and a property test holds it):

- A missing key, None and an empty list are the same: nothing. It satisfies `!=`, `nin` and `is_empty`, and no other
  operator; the empty text satisfies `is_empty` too.
- Numbers compare by value (1 == 1.0); a stored bool is the number 1 or 0. Text compares by code point.
- A number and a text are never equal, and neither is less than the other; a list equals and precedes nothing.
- `contains`, `any` and `all` look into lists only; `text_match` finds a substring of a text, case and all.
- NOT matches where none of its filters match, exactly: also where the key is missing or of another type.

What Milvus cannot express is refused with a `FilterError`, never dropped and never approximated.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from llama_index.core.vector_stores.types import FilterCondition, FilterOperator, MetadataFilter, MetadataFilters

from mm_retriever.errors import FilterError, shown

ID_FIELD = "id"
DOC_ID_FIELD = "doc_id"
TEXT_FIELD = "text"
VECTOR_FIELD = "embedding"
WORDS_FIELD = "_words"
SPARSE_FIELD = "_sparse"
CONTENT_FIELD = "_node_content"
TYPE_FIELD = "_node_type"

OWN_TEXT_COLUMNS = {
    ID_FIELD: ID_FIELD,
    DOC_ID_FIELD: DOC_ID_FIELD,
    "document_id": DOC_ID_FIELD,  # the names that other LlamaIndex stores give to the same thing
    "ref_doc_id": DOC_ID_FIELD,
    TEXT_FIELD: TEXT_FIELD,
}
RESERVED_KEYS = frozenset(
    {*OWN_TEXT_COLUMNS, VECTOR_FIELD, WORDS_FIELD, SPARSE_FIELD, CONTENT_FIELD, TYPE_FIELD, "_seq", "_partition"}
)

MAX_DEPTH = 16
MAX_CONDITIONS = 4096
"""Conditions and values of one filter together."""

MAX_FILTER_TEXT = 2**20
"""Characters of all the texts in one filter."""

MAX_TEXT_BYTES = 65_535
"""Of a text, of a node as JSON, and of all its metadata columns together: what a Milvus column holds."""

MAX_INTEGER = 2**63 - 1

_EXACT_INTEGER = 2**53

_KEY = re.compile(r"\w[\w .-]{0,127}")
_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}")
_KEYWORDS = frozenset(("and", "or", "not", "in", "like", "is", "null", "exists", "iso", "interval", "true", "false"))
_ESCAPES = str.maketrans({"\\": "\\\\", '"': '\\"', "\n": "\\n", "\r": "\\r", "\t": "\\t"})

_COMPARISONS = {
    FilterOperator.GT: ">",
    FilterOperator.GTE: ">=",
    FilterOperator.LT: "<",
    FilterOperator.LTE: "<=",
}
_COMPLEMENTS = {FilterOperator.NE: FilterOperator.EQ, FilterOperator.NIN: FilterOperator.IN}
_LIST_OPERATORS = (FilterOperator.CONTAINS, FilterOperator.ANY, FilterOperator.ALL)


def filter_expression(filters: MetadataFilters | None) -> str:
    """Return the Milvus expression that matches the same rows, "" for no filter at all.

    Args:
        filters: conditions on the metadata columns, and on `id`, `doc_id` (also `ref_doc_id`) and `text`.

    Raises:
        FilterError: a key or value that must not, or an operator that cannot, be expressed.
    """
    if filters is None:
        return ""
    if not isinstance(filters, MetadataFilters):
        raise FilterError(f"filters must be MetadataFilters, got {type(filters).__name__}")
    return _group(filters, negated=False, depth=1, budget=_Budget()) if filters.filters else ""


def quoted(text: str) -> str:
    """Return a Milvus string literal that stands for exactly this text, whatever is in it."""
    if not isinstance(text, str):
        raise FilterError(f"text is needed, got {shown(text)}")
    try:
        size = len(str.encode(text))  # str's own methods: a subclass has no say in what is written
    except UnicodeEncodeError:
        raise FilterError(f"{text[:60]!r} holds half a surrogate pair, which is not Unicode text") from None
    if size > MAX_TEXT_BYTES:
        raise FilterError(f"a text of {size} bytes in a filter: at most {MAX_TEXT_BYTES} are taken")
    return f'"{str.translate(text, _ESCAPES)}"'


def one_of(column: str, values: Iterable[str]) -> str:
    """Return `column in [...]` for one of the store's own text columns."""
    if isinstance(values, str):  # its characters would be taken for ids
        raise FilterError(f"a list of ids is needed, got the text {shown(values)}")
    return f"{column} in [{', '.join(map(quoted, values))}]"


def joined(expressions: Sequence[str], operator: str) -> str:
    """Return the expressions joined as a balanced tree: a server limits how deep one may nest."""
    if len(expressions) == 1:
        return expressions[0]
    middle = len(expressions) // 2
    return f"({joined(expressions[:middle], operator)} {operator} {joined(expressions[middle:], operator)})"


def all_of(*expressions: str) -> str:
    """Return the expression that all of these hold; an empty one asks for nothing."""
    parts = [expression for expression in expressions if expression]
    return joined(parts, "and") if parts else ""


def key_problem(key: object) -> str | None:
    """Return why a metadata key cannot be a column that filters name, or None if it can."""
    if not isinstance(key, str):
        return f"a key must be text, not {type(key).__name__}"
    if key in RESERVED_KEYS:
        return f"{key!r} is a column of the store itself; choose another name"
    if not _KEY.fullmatch(key):
        return f"{key[:60]!r} is not a key: up to 128 letters, digits, '_', ' ', '.' and '-', the first no punctuation"
    return None


def takes_lists(key: str) -> bool:
    """Whether lists may be stored under the key: Milvus' list functions take plain ASCII identifiers only."""
    return _IDENTIFIER.fullmatch(key) is not None and key.lower() not in _KEYWORDS


# ---------------------------------------------------------------------------------------------- groups


def _group(group: MetadataFilters, *, negated: bool, depth: int, budget: _Budget) -> str:
    """One group, with NOT pushed down to the leaves: only a leaf can be negated exactly (see `_Leaf.negation`)."""
    if depth > MAX_DEPTH:
        raise FilterError(f"filters nested more than {MAX_DEPTH} deep")
    if not group.filters:
        raise FilterError("an empty group of filters inside another says nothing; leave it out")
    try:
        condition = FilterCondition(group.condition or "and")
    except ValueError:
        raise FilterError(f"{group.condition!r} is not a filter condition; use and, or, not") from None
    inner = negated != (condition is FilterCondition.NOT)
    every = inner if condition is FilterCondition.NOT else negated != (condition is FilterCondition.AND)
    parts = []
    for item in group.filters:
        budget.spend(item.value if isinstance(item, MetadataFilter) else None)
        if isinstance(item, MetadataFilters):
            parts.append(_group(item, negated=inner, depth=depth + 1, budget=budget))
        elif isinstance(item, MetadataFilter):
            parts.append(_condition(item, negated=inner, budget=budget))
        else:
            raise FilterError(f"{type(item).__name__} is not a filter")
    return joined(parts, "and" if every else "or")


def _condition(item: MetadataFilter, *, negated: bool, budget: _Budget) -> str:
    try:
        operator = FilterOperator(item.operator)
    except ValueError:
        raise FilterError(f"{item.operator!r} is not a filter operator") from None
    if operator in _COMPLEMENTS:
        operator, negated = _COMPLEMENTS[operator], not negated
    leaf = _leaf(_column(item.key), operator, item.value, budget)
    return leaf.negation() if negated else leaf.test


# ---------------------------------------------------------------------------------------------- leaves


class _Budget:
    """What one filter may still say: a model that writes filters must not keep the server busy for minutes."""

    def __init__(self) -> None:
        self._conditions, self._characters = MAX_CONDITIONS, MAX_FILTER_TEXT

    def spend(self, value: object) -> None:
        """Count one more condition or value."""
        self._conditions -= 1
        self._characters -= len(value) if isinstance(value, str) else 0
        if self._conditions < 0:
            raise FilterError(f"more than {MAX_CONDITIONS} conditions and values in one filter")
        if self._characters < 0:
            raise FilterError(f"more than {MAX_FILTER_TEXT} characters in one filter")


@dataclass(frozen=True)
class _Column:
    name: str
    expression: str
    own: bool  # a text column of the schema, present in every row

    def has_text(self) -> str:
        return f'({self.expression} like "%")'  # true of every text, false of everything else

    def require_metadata(self, operator: FilterOperator) -> None:
        if self.own:
            raise FilterError(f"{self.name!r} is a text column: {operator.value!r} does not apply to it")


@dataclass(frozen=True)
class _Leaf:
    """One condition.

    Attributes:
        test: true where the condition holds, false or unknown elsewhere.
        guards: what makes `test` certain. Milvus Lite calls a comparison with a missing value or another type
            unknown, and NOT unknown is unknown; a server calls it false. Behind its guards it is false on both.
    """

    test: str
    guards: tuple[str, ...]

    def negation(self) -> str:
        return f"(not {joined([*self.guards, self.test], 'and')})" if self.guards else f"(not ({self.test}))"


def _column(key: str) -> _Column:
    if isinstance(key, str):
        key = str.__str__(key)  # a subclass has no say in what is written
    if isinstance(key, str) and key in OWN_TEXT_COLUMNS:
        return _Column(key, OWN_TEXT_COLUMNS[key], own=True)
    if (problem := key_problem(key)) is not None:
        raise FilterError(f"cannot filter: {problem}")
    return _Column(key, f"$meta[{quoted(key)}]", own=False)


def _leaf(column: _Column, operator: FilterOperator, value: object, budget: _Budget) -> _Leaf:
    exists = () if column.own else (f"(exists {column.expression})",)
    if operator is FilterOperator.EQ:
        return _Leaf(f"({column.expression} == {_scalar(column, operator, value)})", exists)
    if operator in _COMPARISONS:
        literal = _scalar(column, operator, value)
        test = f"({column.expression} {_COMPARISONS[operator]} {literal})"
        return _Leaf(test, (*exists, *_same_type(column, value)))
    if operator is FilterOperator.IN:
        values = _values(operator, value, budget)
        tests = [f"({column.expression} == {_scalar(column, operator, one)})" for one in values]
        return _Leaf(joined(tests, "or"), exists)
    if operator is FilterOperator.TEXT_MATCH:
        return _Leaf(f"({column.expression} like {_substring(value)})", exists)
    if operator is FilterOperator.IS_EMPTY:
        if value is not None:
            raise FilterError(f"is_empty takes no value (None), got {shown(value)}")
        empty = f'({column.expression} == "")'
        return _Leaf(empty if column.own else f"((not (exists {column.expression})) or {empty})", ())
    if operator in _LIST_OPERATORS:
        return _list_leaf(column, operator, value, exists, budget)
    if operator is FilterOperator.TEXT_MATCH_INSENSITIVE:
        raise FilterError("text_match_insensitive: Milvus compares text by case; store a lower-cased column instead")
    raise FilterError(f"operator {operator.value!r} cannot be expressed in Milvus")


def _same_type(column: _Column, value: object) -> tuple[str, ...]:
    if column.own:
        return ()
    if isinstance(value, str):
        return (column.has_text(),)
    no_list = (f"(array_length({column.name}) == 0)",) if takes_lists(column.name) else ()  # no empty list is stored
    return (f"(not {column.has_text()})", *no_list)


def _list_leaf(
    column: _Column, operator: FilterOperator, value: object, exists: tuple[str, ...], budget: _Budget
) -> _Leaf:
    column.require_metadata(operator)
    if not takes_lists(column.name):
        raise FilterError(f"{operator.value!r} needs a key of ASCII letters, digits and '_', got {column.name!r}")
    values = [value] if operator is FilterOperator.CONTAINS else _values(operator, value, budget)
    # Not json_contains: Milvus Lite's takes no minus. A server finds 1.0 in a list only as 1.0, so both are looked for.
    spellings = [_spellings(column, operator, one) for one in values]
    if operator is FilterOperator.ALL:
        tests = [f"json_contains_any({column.name}, [{', '.join(one)}])" for one in spellings]
    else:
        tests = [f"json_contains_any({column.name}, [{', '.join(literal for one in spellings for literal in one)}])"]
    # Milvus Lite reads a text that looks like a JSON list as a list: a text is none
    return _Leaf(joined([f"(not {column.has_text()})", *tests], "and"), exists)


def _spellings(column: _Column, operator: FilterOperator, value: object) -> list[str]:
    literals = [_scalar(column, operator, value)]
    if isinstance(value, int | float) and abs(value) <= _EXACT_INTEGER and value == int(value):
        literals.append(float.__repr__(float(value)) if isinstance(value, int) else int.__repr__(int(value)))
    return literals


def _values(operator: FilterOperator, value: object, budget: _Budget) -> Sequence[object]:
    if not isinstance(value, list | tuple):
        raise FilterError(f"{operator.value!r} needs a list of values, got {shown(value)}")
    if not value:
        raise FilterError(f"{operator.value!r} with an empty list: leave the filter out, or say what is meant")
    for one in value:
        budget.spend(one)
    return value


def _scalar(column: _Column, operator: FilterOperator, value: object) -> str:
    """One text or number as a literal."""
    if isinstance(value, str):
        return quoted(value)
    if column.own:
        raise FilterError(f"{column.name!r} is a text column and cannot be compared with {shown(value)}")
    if isinstance(value, bool):  # stored as 1 or 0
        return "1" if value else "0"
    if isinstance(value, int):
        if not -MAX_INTEGER <= value <= MAX_INTEGER:
            raise FilterError(f"{shown(value)} does not fit into 64 bits")
        return int.__repr__(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise FilterError(f"{value!r} is not a number that can be compared")
        return float.__repr__(value)
    if value is None:
        raise FilterError(f"{column.name!r} {operator.value} None: use the operator is_empty")
    raise FilterError(f"{column.name!r} {operator.value}: text or a number is needed, got {type(value).__name__}")


def _substring(value: object) -> str:
    if not isinstance(value, str):
        raise FilterError(f"text_match needs text, got {shown(value)}")
    if any(sign in value for sign in "%_\\"):
        # Milvus Lite has no escape for its wildcards that works on every row
        raise FilterError(f"text_match of {value!r}: '%', '_' and '\\' are wildcards that Milvus cannot search for")
    return quoted(f"%{value}%")
