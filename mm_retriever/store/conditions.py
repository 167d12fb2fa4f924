"""Conditions as people and language models write them, to LlamaIndex's filters.

Owns the spellings of operators, and what a value may mean: a number, a text, a date, a list. A condition with exactly
one meaning is accepted; any other is refused with what to write.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Sequence
from typing import Any

from llama_index.core.vector_stores.types import FilterCondition, FilterOperator, MetadataFilter, MetadataFilters

from mm_retriever.errors import FilterError, QueryError, shown
from mm_retriever.store.columns import LAST
from mm_retriever.store.filters import COMPARISONS, read_number, wildcards
from mm_retriever.store.schema import OWN_TEXT_COLUMNS, takes_lists

FORMS = "key=value, key!=value, key>number, key in a, b, key contains word or key is empty"

_Op = FilterOperator
_SYMBOLS = {
    "=": _Op.EQ, "==": _Op.EQ, "===": _Op.EQ, ":=": _Op.EQ, "!=": _Op.NE, "<>": _Op.NE, "≠": _Op.NE,
    ">": _Op.GT, ">=": _Op.GTE, "=>": _Op.GTE, "≥": _Op.GTE, "<": _Op.LT, "<=": _Op.LTE, "=<": _Op.LTE, "≤": _Op.LTE,
}  # fmt: skip
_WORDS = {
    "eq": _Op.EQ, "equals": _Op.EQ, "equal": _Op.EQ, "equal to": _Op.EQ, "is": _Op.EQ,
    "ne": _Op.NE, "neq": _Op.NE, "not equals": _Op.NE, "not equal": _Op.NE, "not equal to": _Op.NE, "is not": _Op.NE,
    "gt": _Op.GT, "greater than": _Op.GT, "more than": _Op.GT, "after": _Op.GT,
    "gte": _Op.GTE, "ge": _Op.GTE, "greater than or equal": _Op.GTE, "greater than or equal to": _Op.GTE,
    "at least": _Op.GTE, "since": _Op.GTE,
    "lt": _Op.LT, "less than": _Op.LT, "before": _Op.LT,
    "lte": _Op.LTE, "le": _Op.LTE, "less than or equal": _Op.LTE, "less than or equal to": _Op.LTE,
    "at most": _Op.LTE, "until": _Op.LTE,
    "in": _Op.IN, "is in": _Op.IN, "one of": _Op.IN, "nin": _Op.NIN, "not in": _Op.NIN, "is not in": _Op.NIN,
    "contains": _Op.CONTAINS, "includes": _Op.CONTAINS, "has": _Op.CONTAINS,
    "any": _Op.ANY, "any of": _Op.ANY, "contains any": _Op.ANY, "all": _Op.ALL, "all of": _Op.ALL,
    "contains all": _Op.ALL, "text match": _Op.TEXT_MATCH, "text match insensitive": _Op.TEXT_MATCH_INSENSITIVE,
    "is empty": _Op.IS_EMPTY, "empty": _Op.IS_EMPTY, "is null": _Op.IS_EMPTY, "is missing": _Op.IS_EMPTY,
}  # fmt: skip
_NEGATED = {
    "not contains": _Op.CONTAINS, "does not contain": _Op.CONTAINS, "contains not": _Op.CONTAINS,
    "is not empty": _Op.IS_EMPTY, "not empty": _Op.IS_EMPTY, "is not null": _Op.IS_EMPTY, "exists": _Op.IS_EMPTY,
}  # fmt: skip
_LISTS = (_Op.IN, _Op.NIN, _Op.ANY, _Op.ALL)

_DAY = re.compile(r"\d{4}-\d{2}-\d{2}", re.ASCII)
_MONTH = re.compile(r"(?:19|20)\d{2}-(?:0[1-9]|1[0-2])", re.ASCII)
_DATE = re.compile(r"\d{4}-\d{2}(-\d{2})?([T ]\d{2}(:\d{2}(:\d{2}(\.\d{1,9})?)?)?(Z|[+-]\d{2}:?\d{2})?)?", re.ASCII)

_SIGNS = "=<>!≠≥≤~"
_IN_WORDS = "|".join(
    re.escape(word).replace(r"\ ", r"\s+") for word in sorted((*_WORDS, *_NEGATED), key=len, reverse=True)
)
_BY_SYMBOL = re.compile(
    rf"(?P<key>\"[^\"]*\"\s*|'[^']*'\s*|(?:[^\"'{_SIGNS}:]|:(?!=))*)(?P<operator>:=|[{_SIGNS}]+)(?P<value>.*)",
    re.DOTALL,
)
_BY_WORD = re.compile(
    rf"(?P<key>\"[^\"]*\"|'[^']*'|[^\s\"'{_SIGNS}]+)\s+"
    rf"(?P<operator>{_IN_WORDS})(?P<value>|(?=[\s(\[\"'])(?!\s*[{_SIGNS}]).*)",
    re.DOTALL | re.IGNORECASE,
)
_SECOND = re.compile(r"\s(?:and|or|&&|\|\|)\s+[\w\"'][\w .\"'-]{0,60}\s*(?:[=<>!]|\bin\b|\bcontains\b)", re.IGNORECASE)


def read_condition(text: str) -> MetadataFilter | MetadataFilters:
    """Return the filter that a person wrote on one line: `colour = red`, `date >= 2024-01-01`, `label in mug, cup`.

    A value in quotes is a text.

    Raises:
        FilterError: anything else; the message says what to write.
    """
    match = _matched(text)
    if match is None or not match["key"].strip():
        raise FilterError(f"{text!r} is not {FORMS}")
    key, sign, value = _unquoted(match["key"])[0], match["operator"], match["value"].strip()
    if sign[0] in f"{_SIGNS}:" and sign not in _SYMBOLS:
        raise FilterError(f"{text!r}: {sign!r} is none of {', '.join(_SYMBOLS)}; put a value that begins so in quotes")
    operator, negated = _operator(sign, key)
    if operator in _LISTS:
        return condition(key, sign, _listed(value, text))
    if operator is _Op.IS_EMPTY:
        if value:
            raise FilterError(f"{text!r}: nothing comes after {sign!r}")
        return condition(key, sign, None)
    plain, quoted = _unquoted(value)
    if sign == ":=" and read_number(plain) is None:
        raise FilterError(f"{text!r}: {plain!r} is not a number; for text use key=value")
    if not value and operator in (_Op.EQ, _Op.NE):
        return condition(key, "is empty" if operator is _Op.EQ else "is not empty", None)
    if not value:
        raise FilterError(f"{text!r}: a value is missing after {sign!r}")
    if quoted and operator in (_Op.EQ, _Op.NE, *COMPARISONS):
        return _negated(_leaf(key, operator, plain), negated)
    return condition(key, sign, plain)


def where_filters(conditions: Sequence[str]) -> MetadataFilters | None:
    """Return the conditions of every `--where` of a command, all of which must hold; None without any.

    Raises:
        QueryError: one that cannot be read.
    """
    try:
        return MetadataFilters(filters=[read_condition(text) for text in conditions]) if conditions else None
    except FilterError as error:
        raise QueryError(f"--where {error}") from None


def where_notes(conditions: Sequence[str]) -> list[str]:
    """Return a note for each condition that looks like two, which a person has to decide."""
    return [
        f"--where {text!r} is taken as one condition; repeat --where for each"
        for text in filter(second_condition, conditions)
    ]


def second_condition(text: str) -> bool:
    """Whether the value of a condition looks like a second condition."""
    match = _matched(text)
    return match is not None and not _unquoted(match["value"])[1] and _SECOND.search(match["value"]) is not None


def _matched(text: str) -> re.Match[str] | None:
    return _BY_WORD.fullmatch(text.strip()) or _BY_SYMBOL.fullmatch(text.strip())


def condition(key: str, operator: str, value: Any) -> MetadataFilter | MetadataFilters:
    """Return the filter of a column, an operator in any usual spelling, and a value.

    Args:
        key: of the column.
        operator: "==", "equals", "=>", "not in", "contains", ...
        value: text, a number, a bool, None, or a list of them, as the operator asks.

    Raises:
        FilterError: an unknown operator, or a value that does not go with it.
    """
    known, negated = _operator(operator, key)
    if known is _Op.IS_EMPTY and (isinstance(value, bool) or value == ""):
        negated, value = negated != (value is False), None
    return _negated(_condition(key, known, value), negated)


def _condition(key: str, operator: FilterOperator, value: Any) -> MetadataFilter | MetadataFilters:
    if operator in _LISTS:
        return _among(key, operator, value)
    if isinstance(value, list | tuple):
        advice = "in (or nin)" if operator in (_Op.EQ, _Op.NE) else "any or all"
        raise FilterError(f"value {shown(value)} of {key[:60]!r}: {operator.value} takes one value; use {advice}")
    if isinstance(value, bool):
        value = "true" if value else "false"  # equals 1 and 0 too, which is how a bool is stored
    if value is not None and not isinstance(value, str | int | float):
        raise FilterError(f"value {shown(value)} of {key[:60]!r}: give text, a number, or a list of them")
    if operator in COMPARISONS:
        return _ordered(key, operator, value)
    if operator in (_Op.EQ, _Op.NE) and isinstance(value, str) and (dated := _on_date(key, value)):
        return _negated(dated, operator is _Op.NE)
    if operator is _Op.CONTAINS and isinstance(value, str) and (key in OWN_TEXT_COLUMNS or not takes_lists(key)):
        return _leaf(key, _Op.TEXT_MATCH, value)
    if operator is _Op.CONTAINS and isinstance(value, str) and not wildcards(value):
        # of a list or of a text: a caller cannot see which of the two the column holds
        return MetadataFilters(
            filters=[_leaf(key, operator, value), _leaf(key, _Op.TEXT_MATCH, value)], condition=FilterCondition.OR
        )
    return _leaf(key, operator, value)


def _ordered(key: str, operator: FilterOperator, value: Any) -> MetadataFilter:
    """Numbers by value and ISO dates as text; a date stands for all of its day or month."""
    if not isinstance(value, str):
        return _leaf(key, operator, value)
    text = value.strip()
    number = read_number(text)
    if number is not None:
        return _leaf(key, operator, number)
    if not _DATE.fullmatch(text):
        raise FilterError(
            f"{key[:60]!r} {operator.value} {shown(value)}: {shown(text)} is not a number, and no date like "
            "2024-01-31; text is compared by ==, in and contains"
        )
    return _leaf(key, operator, text + LAST if operator in (_Op.GT, _Op.LTE) else text)


def _on_date(key: str, date: str) -> MetadataFilters | None:
    """The day itself, or any time of it; of a month, any day; None for what is no date."""
    if _DAY.fullmatch(date):
        ranges = [(f"{date}T", f"{date}U"), (f"{date} ", f"{date}!")]
    elif _MONTH.fullmatch(date):
        # days have two digits: "2024-01-2" is a code, and comes before "2024-01-20"
        ranges = [(f"{date}-{first}", f"{date}-{last}") for first, last in (("01", "0:"), ("10", "1:"), ("20", "2:"))]
        ranges.append((f"{date}-30", f"{date}-32"))
    else:
        return None
    within = [MetadataFilters(filters=[_leaf(key, _Op.GTE, low), _leaf(key, _Op.LT, high)]) for low, high in ranges]
    return MetadataFilters(filters=[_leaf(key, _Op.EQ, date), *within], condition=FilterCondition.OR)


def _among(key: str, operator: FilterOperator, value: Any) -> MetadataFilter | MetadataFilters:
    """Filters hold texts or numbers: a list of both becomes two filters, and None and a date are one of their own."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise FilterError(f"value {shown(value)} of {key[:60]!r}: not a JSON list") from None
    if isinstance(value, str) and "," in value and operator in (_Op.IN, _Op.NIN):
        raise FilterError(
            f"value {shown(value)} of {key[:60]!r}: {operator.value} takes a list; give each value by itself, or this "
            f"text as [{json.dumps(value[:60])}]"
        )
    values = list(value) if isinstance(value, list | tuple) else [value]
    texts: list[str] = []
    numbers: list[int | float] = []
    dates: list[MetadataFilter | MetadataFilters] = []
    for item in values:
        dated = _on_date(key, item) if isinstance(item, str) and operator in (_Op.IN, _Op.NIN) else None
        if dated is not None:
            dates.append(_negated(dated, operator is _Op.NIN))
        elif isinstance(item, bool):
            texts.append("true" if item else "false")
        elif isinstance(item, str):
            texts.append(item)
        elif isinstance(item, int | float):
            numbers.append(item)
        elif item is not None or operator in (_Op.ANY, _Op.ALL):
            raise FilterError(f"value {shown(value)} of {key[:60]!r}: give text, a number, or a list of them")
    if any(isinstance(number, float) for number in numbers):
        parts = [[number for number in numbers if isinstance(number, kind)] for kind in (int, float)]
    else:
        parts = [numbers]
    filters: list[MetadataFilter | MetadataFilters] = [
        _leaf(key, operator, part) for part in (texts, *parts) if part or (not values and part is texts)
    ]
    filters += dates
    if None in values:
        filters.append(_leaf(key, _Op.EQ if operator is _Op.IN else _Op.NE, None))
    if len(filters) == 1:
        return filters[0]
    every = operator in (_Op.NIN, _Op.ALL)
    return MetadataFilters(filters=filters, condition=FilterCondition.AND if every else FilterCondition.OR)


def _operator(spelling: str, key: str) -> tuple[FilterOperator, bool]:
    """The operator of a spelling, and whether it is negated."""
    name = " ".join(str(spelling).replace("_", " ").lower().split())
    if name in _NEGATED:
        return _NEGATED[name], True
    known = _SYMBOLS.get(name) or _WORDS.get(name)
    if known is None:
        names = ", ".join(known.value for known in FilterOperator)
        raise FilterError(f"operator {shown(spelling)} of {key[:60]!r}: give one of {names}")
    return known, False


def _negated(item: MetadataFilter | MetadataFilters, negated: bool) -> MetadataFilter | MetadataFilters:
    return MetadataFilters(filters=[item], condition=FilterCondition.NOT) if negated else item


def _leaf(key: str, operator: FilterOperator, value: Any) -> MetadataFilter:
    try:
        return MetadataFilter(key=key, operator=operator, value=value)
    except ValueError:
        raise FilterError(f"value {shown(value)} of {key[:60]!r}: give text, a number, or a list of them") from None


def _unquoted(text: str) -> tuple[str, bool]:
    """The text without quotes round it, and whether there were any."""
    text = text.strip()
    if len(text) >= 2 and text[0] == text[-1] and text[0] in "\"'":
        return text[1:-1], True
    return text, False


def _listed(value: str, text: str) -> list[str]:
    """`a, b`, `(a, "b, c")` or `["a", "b"]`."""
    inside = value[1:-1] if value[:1] + value[-1:] in ("()", "[]") else value
    if not inside.strip():
        raise FilterError(f"{text!r}: values are missing, separated by commas")
    quote = "'" if "'" in inside and '"' not in inside else '"'
    try:
        [cells] = csv.reader([inside], skipinitialspace=True, quotechar=quote, strict=True)
    except (csv.Error, ValueError):
        raise FilterError(f"{text!r}: separate the values by commas; quote those that hold one") from None
    return [cell.strip() for cell in cells]
