"""Metadata filters: LlamaIndex's `MetadataFilters` to a Milvus expression that a value cannot break out of.

Owns which keys and values may stand in an expression, and what a filter means when a key is missing or its values
have mixed types. Knows nothing of connections: `filter_expression` is a pure function.

What a filter means (Milvus Lite and Milvus servers agree, and a property test holds it):

- A missing key, None and an empty list are the same: nothing. It satisfies `!=`, `nin`, `is_empty` and `== None`, and
  no other operator; the empty text satisfies `is_empty` too.
- Numbers compare by value (1 == 1.0); a stored bool is the number 1 or 0. Text compares by code point.
- A text that reads as a number ("2020", "1.50", "-3e2") also equals that number: the writer of a filter cannot see
  whether a column holds 2020 or "2020". "true" and "false" read as 1 and 0, and equal each other in any of the usual
  cases. A number also equals the texts that spell it plainly: 2020 equals "2020" and "2020.0", but not "02020".
- `>` and its like compare a number with numbers, a text with texts, and a text that reads as a number with both.
- `in []` matches nothing and `nin []` everything; a list equals and precedes nothing.
- `contains`, `any` and `all` look into lists only; `text_match` finds a substring of a text, case and all.
- NOT matches where none of its filters match, exactly: also where the key is missing or of another type.

What Milvus cannot express is refused with a `FilterError`, never dropped and never approximated.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from llama_index.core.vector_stores.types import FilterCondition, FilterOperator, MetadataFilter, MetadataFilters

from mm_retriever.errors import FilterError, shown
from mm_retriever.own_keys import own_columns
from mm_retriever.store.schema import ID_FIELD, MAX_INTEGER, MAX_TEXT_BYTES, OWN_TEXT_COLUMNS, key_problem, takes_lists

MAX_DEPTH = 16
MAX_CONDITIONS = 4096
"""Conditions and values of one filter together."""

MAX_FILTER_TEXT = 2**20
"""Characters of all the texts in one filter."""

_EXACT_INTEGER = 2**53

_ESCAPES = str.maketrans({"\\": "\\\\", '"': '\\"', "\n": "\\n", "\r": "\\r", "\t": "\\t"})

_NUMBER = re.compile(r"[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")
_LONGEST_NUMBER = 400  # characters: more than any float needs
_TRUE, _FALSE = ("true", "True", "TRUE"), ("false", "False", "FALSE")
_TRUTH = dict.fromkeys(_TRUE, _TRUE) | dict.fromkeys(_FALSE, _FALSE)
_COMPOSED = own_columns("file_name", "label")  # ingestion stores them composed; a Mac gives names decomposed
_NOWHERE = f'({ID_FIELD} < "")'  # true of no row: no text comes before the empty one

COMPARISONS = {FilterOperator.GT: ">", FilterOperator.GTE: ">=", FilterOperator.LT: "<", FilterOperator.LTE: "<="}
LIST_OPERATORS = (FilterOperator.CONTAINS, FilterOperator.ANY, FilterOperator.ALL)
_COMPLEMENTS = {FilterOperator.NE: FilterOperator.EQ, FilterOperator.NIN: FilterOperator.IN}


def filter_expression(filters: MetadataFilters | None) -> str:
    """Return the Milvus expression that matches the same rows, "" for no filter at all.

    Filters name metadata columns, and `id`, `doc_id` (also `ref_doc_id`) and `text`.

    Raises:
        FilterError: a key, value or operator that cannot be expressed.
    """
    if filters is None:
        return ""
    if not isinstance(filters, MetadataFilters):
        raise FilterError(f"filters must be MetadataFilters, got {type(filters).__name__}")
    return _group(filters, negated=False, depth=1, budget=_Budget()) if filters.filters else ""


def quoted(text: str) -> str:
    """Return a Milvus string literal that stands for exactly this text, whatever it contains."""
    if not isinstance(text, str):
        raise FilterError(f"text is needed, got {shown(text)}")
    try:
        size = len(str.encode(text))  # str's own methods: a subclass cannot change what is written
    except UnicodeEncodeError:
        raise FilterError(f"{text[:60]!r} holds half a surrogate pair, which is not Unicode text") from None
    if size > MAX_TEXT_BYTES:
        raise FilterError(f"a text of {size} bytes in a filter: at most {MAX_TEXT_BYTES} are taken")
    return f'"{str.translate(text, _ESCAPES)}"'


def id_list(ids: Iterable[str]) -> list[str]:
    """Return ids as a list, also those of a generator, which can be read only once."""
    if isinstance(ids, str):  # its characters would be taken for ids
        raise FilterError(f"a list of ids is needed, got the text {shown(ids)}")
    return list(ids)


def one_of(column: str, values: Iterable[str]) -> str:
    """Return `column in [...]` for one of the store's own text columns."""
    return f"{column} in [{', '.join(map(quoted, id_list(values)))}]"


def joined(expressions: Sequence[str], operator: str) -> str:
    """Return the expressions joined as a balanced tree: a server limits how deep one may nest."""
    if len(expressions) == 1:
        return expressions[0]
    middle = len(expressions) // 2
    return f"({joined(expressions[:middle], operator)} {operator} {joined(expressions[middle:], operator)})"


def all_of(*expressions: str) -> str:
    """Return the conjunction of these expressions; empty ones are left out."""
    parts = [expression for expression in expressions if expression]
    return joined(parts, "and") if parts else ""


def read_number(text: str) -> int | float | None:
    """Return the number that a text spells; None if it spells none, or one that no column can hold."""
    if len(text) > _LONGEST_NUMBER or _NUMBER.fullmatch(text) is None:
        return None
    if text.lstrip("+-").isdigit():
        whole = int(text)
        return whole if -MAX_INTEGER <= whole <= MAX_INTEGER else None
    number = float(text)
    return number if math.isfinite(number) else None


def wildcards(value: object) -> str:
    """Return the wildcards of Milvus' `like` that a text has, for a message; "" for none."""
    return " or ".join(repr(sign) for sign in "%_\\" if isinstance(value, str) and sign in value)


def equals_number(text: str) -> bool:
    """Return whether some number equals a text in a filter: "5", "1e3", "true"."""
    return text in _TRUTH or read_number(text) is not None


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
    """The rest of one filter's limits, so that a filter written by a model cannot keep a server busy for minutes."""

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

    @property
    def has_text(self) -> str:
        return f'({self.expression} like "%")'  # true of every text, false of everything else


@dataclass(frozen=True)
class _Test:
    """One way in which a condition may hold: true where it does, false or unknown elsewhere.

    Attributes:
        test: the expression.
        guards: expressions that make `test` certain. A comparison with a missing value or another type is unknown on
            Milvus Lite, where NOT unknown is unknown too, and false on a server; after its guards it is false on both.
    """

    test: str
    guards: tuple[str, ...] = ()

    def certain(self) -> str:
        return joined([*self.guards, self.test], "and")


class _Leaf:
    """One condition, which holds where one of its tests does."""

    def __init__(self, *tests: _Test) -> None:
        self._tests = tests

    @property
    def test(self) -> str:
        return joined([test.test for test in self._tests], "or")

    def negation(self) -> str:
        return f"(not {joined([test.certain() for test in self._tests], 'or')})"


def _column(key: str) -> _Column:
    if isinstance(key, str):
        key = str.__str__(key)  # a subclass cannot change what is written
    if isinstance(key, str) and key in OWN_TEXT_COLUMNS:
        return _Column(key, OWN_TEXT_COLUMNS[key], own=True)
    if (problem := key_problem(key)) is not None:
        raise FilterError(f"cannot filter: {problem}")
    return _Column(key, f"$meta[{quoted(key)}]", own=False)


def _leaf(column: _Column, operator: FilterOperator, value: object, budget: _Budget) -> _Leaf:
    exists = () if column.own else (f"(exists {column.expression})",)
    if operator is FilterOperator.EQ and value is None:
        return _Leaf(_Test(f'({column.expression} == "")' if column.own else f"(not (exists {column.expression}))"))
    if operator is FilterOperator.EQ:
        return _Leaf(_Test(_equality(column, [_Equal.of(column, operator, value)]), exists))
    if operator in COMPARISONS:
        return _order_leaf(column, operator, value, exists)
    if operator is FilterOperator.IN:
        equals = [_Equal.of(column, operator, each) for each in _values(operator, value, budget)]
        return _Leaf(_Test(_equality(column, equals), exists))
    if operator is FilterOperator.TEXT_MATCH:
        return _Leaf(_Test(f"({column.expression} like {_substring(column, value)})", exists))
    if operator is FilterOperator.IS_EMPTY:
        if value is not None:
            raise FilterError(f"is_empty takes no value (None), got {shown(value)}")
        empty = f'({column.expression} == "")'
        return _Leaf(_Test(empty if column.own else f"((not (exists {column.expression})) or {empty})"))
    if operator in LIST_OPERATORS:
        return _list_leaf(column, operator, value, exists, budget)
    if operator is FilterOperator.TEXT_MATCH_INSENSITIVE:
        raise FilterError("text_match_insensitive: Milvus compares text by case; store a lower-cased column instead")
    raise FilterError(f"operator {operator.value!r} cannot be expressed in Milvus")


def _order_leaf(column: _Column, operator: FilterOperator, value: object, exists: tuple[str, ...]) -> _Leaf:
    def against(literal: str, *guards: str) -> _Test:
        return _Test(f"({column.expression} {COMPARISONS[operator]} {literal})", (*exists, *guards))

    if column.own:
        if not isinstance(value, str):
            raise FilterError(f"{column.name!r} is a text column and cannot be compared with {shown(value)}")
        return _Leaf(against(quoted(value)))
    tests = [against(quoted(value), column.has_text)] if isinstance(value, str) else []
    number = read_number(value) if isinstance(value, str) else _number(column, operator, value)
    if number is not None:
        no_list = (f"(array_length({column.name}) == 0)",) if takes_lists(column.name) else ()  # none is stored empty
        tests.append(against(_comparable(number), f"(not {column.has_text})", *no_list))
    return _Leaf(*tests)


def _list_leaf(
    column: _Column, operator: FilterOperator, value: object, exists: tuple[str, ...], budget: _Budget
) -> _Leaf:
    if column.own:
        raise FilterError(f"{column.name!r} is a text column: {operator.value!r} does not apply to it")
    if not takes_lists(column.name):
        raise FilterError(f"{operator.value!r} needs a key of ASCII letters, digits and '_', got {column.name!r}")
    values = [value] if operator is FilterOperator.CONTAINS else _values(operator, value, budget)
    if not values and operator is FilterOperator.ALL:
        raise FilterError("'all' with an empty list asks for nothing: leave the filter out")
    equals = [_Equal.of(column, operator, each) for each in values]
    if operator is FilterOperator.ALL:
        test = joined([_membership(column, [equal]) for equal in equals], "and")
    else:
        test = _membership(column, equals) if equals else _NOWHERE
    # Milvus Lite reads a text that looks like a JSON list as a list: a text is none
    return _Leaf(_Test(joined([f"(not {column.has_text})", test], "and"), exists))


# ---------------------------------------------------------------------------------------------- values


@dataclass(frozen=True)
class _Equal:
    """What is equal to a value of a filter."""

    number: int | float | None
    texts: tuple[str, ...]

    @classmethod
    def of(cls, column: _Column, operator: FilterOperator, value: object) -> _Equal:
        if isinstance(value, str):
            text = str.__str__(value)
            spellings: tuple[str, ...] = _TRUTH.get(text, (text,))
            number = int(spellings[0] == "true") if len(spellings) > 1 else read_number(text)
            if column.name in _COMPOSED and not unicodedata.is_normalized("NFC", text):
                spellings = (text, unicodedata.normalize("NFC", text))
            return cls(None if column.own else number, spellings)
        number = _number(column, operator, value)
        return cls(None if column.own else number, _spellings(value, number))

    def literals(self) -> list[str]:
        """The number as an integer and as a decimal: a server finds 1.0 in a list only as 1.0."""
        if self.number is None:
            return []
        literals = [_literal(self.number)]
        if abs(self.number) <= _EXACT_INTEGER and self.number == int(self.number):
            whole = isinstance(self.number, int)
            literals.append(_literal(float(self.number) if whole else int(self.number)))
        return literals


def _equality(column: _Column, equals: Sequence[_Equal]) -> str:
    """The expression that the column equals one of these; repeated values stand in it once."""
    numbers = dict.fromkeys(_comparable(equal.number) for equal in equals if equal.number is not None)
    texts = dict.fromkeys(quoted(text) for equal in equals for text in equal.texts)
    tests = [f"({column.expression} == {literal})" for literal in (*numbers, *texts)]
    return joined(tests, "or") if tests else _NOWHERE


def _membership(column: _Column, equals: Sequence[_Equal]) -> str:
    """The expression that a list holds one of these. Not json_contains: on Milvus Lite it takes no minus sign."""
    numbers = [literal for equal in equals for literal in equal.literals()]
    texts = [quoted(text) for equal in equals for text in equal.texts]
    tests = [f"json_contains_any({column.name}, [{', '.join(values)}])" for values in (numbers, texts) if values]
    return joined(tests, "or")


def _spellings(value: object, number: int | float) -> tuple[str, ...]:
    """The texts that spell a number plainly, as Python does; for a bool, its words."""
    if isinstance(value, bool):
        return _TRUTH["true" if value else "false"]
    plain = [_literal(number)]
    if isinstance(number, int):
        if float(number) == number:
            plain.append(float.__repr__(float(number)))
    elif abs(number) <= MAX_INTEGER and number.is_integer():
        plain.append(int.__repr__(int(number)))
    return tuple(plain)


def _comparable(number: int | float) -> str:
    """The literal of a number; a large whole decimal becomes an integer, since a server compares as doubles otherwise.

    Raises:
        FilterError: the number is 2**63 as a decimal, which equals the largest integers as a double.
    """
    if isinstance(number, float) and number.is_integer() and _EXACT_INTEGER <= abs(number) <= 2.0**63:
        if abs(number) == 2.0**63:
            raise FilterError(f"{number!r} cannot be told from the largest integers: compare with {MAX_INTEGER}")
        return _literal(int(number))
    return _literal(number)


def _literal(number: int | float) -> str:
    return int.__repr__(number) if isinstance(number, int) else float.__repr__(number)


def _number(column: _Column, operator: FilterOperator, value: object) -> int | float:
    """The value as a number that may stand in an expression."""
    if isinstance(value, bool):  # stored as 1 or 0
        return int(value)
    if isinstance(value, int):
        if not -MAX_INTEGER <= value <= MAX_INTEGER:
            raise FilterError(f"{shown(value)} does not fit into 64 bits")
        return int(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise FilterError(f"{value!r} is not a number that can be compared")
        return value
    if value is None:
        raise FilterError(f"{column.name!r} {operator.value} None: use the operator is_empty")
    several = "; for one of several values use in" if isinstance(value, list | tuple) else ""
    raise FilterError(
        f"{column.name!r} {operator.value}: text or a number is needed, got {type(value).__name__}{several}"
    )


def _values(operator: FilterOperator, value: object, budget: _Budget) -> Sequence[object]:
    if not isinstance(value, list | tuple):
        raise FilterError(f"{operator.value!r} needs a list of values, got {shown(value)}")
    for item in value:
        budget.spend(item)
    return value


def _substring(column: _Column, value: object) -> str:
    if not isinstance(value, str):
        raise FilterError(f"text_match needs text, got {shown(value)}")
    if wildcards(value):
        # Milvus Lite has no escape for its wildcards that works on every row
        raise FilterError(f"text_match of {value!r}: '%', '_' and '\\' are wildcards that Milvus cannot search for")
    return quoted(f"%{unicodedata.normalize('NFC', value) if column.name in _COMPOSED else value}%")
