"""What metadata filters mean, in plain Python, and random filters and rows to hold a store against it."""

from __future__ import annotations

import math
from typing import Any

from hypothesis import strategies as st
from llama_index.core.schema import ImageNode
from llama_index.core.vector_stores.types import FilterCondition, FilterOperator, MetadataFilter, MetadataFilters

from mm_retriever.store import ImageStore

Op = FilterOperator


def where(key: str, operator: str, value: Any = None) -> MetadataFilter:
    return MetadataFilter(key=key, operator=FilterOperator(operator), value=value)


def group(*items: MetadataFilter | MetadataFilters, condition: str = "and") -> MetadataFilters:
    return MetadataFilters(filters=list(items), condition=FilterCondition(condition))


def matches(item: MetadataFilter | MetadataFilters, row: dict[str, Any]) -> bool:
    """The meaning of a filter, as the docstring of `mm_retriever.store.filters` gives it."""
    if isinstance(item, MetadataFilters):
        results = [matches(one, row) for one in item.filters]
        condition = item.condition or FilterCondition.AND
        if condition is FilterCondition.NOT:
            return not any(results)
        return all(results) if condition is FilterCondition.AND else any(results)
    stored, value, operator = row.get(item.key), item.value, item.operator
    nothing = stored is None or stored == []
    if operator is Op.IS_EMPTY:
        return nothing or stored == ""
    if operator in (Op.NE, Op.NIN):
        return not matches(
            MetadataFilter(key=item.key, operator=Op.EQ if operator is Op.NE else Op.IN, value=value), row
        )
    if operator is Op.EQ and value is None:
        return nothing
    if nothing:
        return False
    if operator is Op.EQ:
        return equal(stored, value)
    if operator is Op.IN:
        return any(equal(stored, one) for one in value)
    if operator is Op.TEXT_MATCH:
        return isinstance(stored, str) and value in stored
    if operator in (Op.CONTAINS, Op.ANY, Op.ALL):
        if not isinstance(stored, list):
            return False
        wanted = [value] if operator is Op.CONTAINS else value
        return (all if operator is Op.ALL else any)(any(equal(each, one) for each in stored) for one in wanted)
    if isinstance(stored, list):
        return False
    if isinstance(stored, str) and not isinstance(value, str):
        return False
    if isinstance(value, str) and not isinstance(stored, str):
        value = number_of(value)
        if value is None:
            return False
    return {
        Op.GT: stored > value,
        Op.GTE: stored >= value,
        Op.LT: stored < value,
        Op.LTE: stored <= value,
    }[operator]


def equal(stored: Any, value: Any) -> bool:
    """Whether a stored text or number is the value of a filter."""
    if isinstance(stored, list):
        return False
    if isinstance(value, str):
        truth = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
        if value in truth:
            return truth.get(stored) is truth[value] if isinstance(stored, str) else bool(stored == truth[value])
        return stored == value if isinstance(stored, str) else stored == number_of(value)
    if not isinstance(stored, str):
        return bool(stored == value)
    plain = {str(value)}
    if isinstance(value, int):
        plain |= {str(float(value))} if float(value) == value else set()
    elif value.is_integer() and abs(value) < 2**63:
        plain.add(str(int(value)))
    return stored in plain


def number_of(text: str) -> int | float | None:
    """The number that a text reads as: digits, a sign, a point, an exponent, and nothing else."""
    if not text or set(text) - set("0123456789+-.eE"):
        return None
    try:
        if not set(text) & set(".eE"):
            return int(text) if abs(int(text)) < 2**63 else None
        return float(text) if math.isfinite(float(text)) else None
    except ValueError:
        return None


# ------------------------------------------------------------------------------------------ strategies

KEYS = ("year", "owner", "tags", "mixed", "in", "Größe", "file path", "a.b-c")
LIST_KEYS = ("year", "owner", "tags", "mixed")
NASTY = (
    "", "a", "b", "5", "1", '["a"]', "[1]", "null", "true",
    "it's", 'say "no"', "back\\slash", "\\", '"', "'", '\\"', "line\nbreak", "carriage\rreturn", "tab\tstop",
    "nul\0byte", "\x1b[31m", "\u2028", "\ufeffbom", "漢字", "é", "e\u0301", "😀", "x\") or (id != \"",
    'x" or id like "%', "\\n", "\\u0041", "$meta", "%", "_", "50%", "a_b",
)  # fmt: skip

NUMERALS = (
    "0", "-0", "1", "5", "-5", "+5", "007", "05", "5.0", "5.", ".5", "0.5", "5.00", "1e0", "1E3", "1000", "1000.0",
    "1e400", "-1.5", "2020", "2020.0", "9007199254740993", "9007199254740992.0", "9223372036854775807",
    "99999999999999999999", "1e+16", "10000000000000000", "true", "True", "FALSE", "tRue", "1.0", "٥", " 5", "5 ",
    "1_0", "+", "-", ".", "e", "--5", "1e", "0x5", "inf", "nan", "2024-01-31",
)  # fmt: skip

numbers = st.one_of(
    st.integers(-5, 5),
    st.integers(-(2**53), 2**53),
    st.sampled_from([2020, 1000, 10**16, 2**53 + 1, 2**63 - 1, 1 - 2**63]),
    st.sampled_from([0.5, -1.5, 1.0, 5.0, 1e-7, -1e300, 1e300, 5e-324, -0.0, 2020.0, 1000.0, 1e16]),
    st.floats(allow_nan=False, allow_infinity=False).filter(lambda number: abs(number) != 2.0**63),  # refused
)
texts = st.one_of(
    st.sampled_from(NUMERALS),
    numbers.map(str),
    st.sampled_from(NASTY),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
)
scalars = st.one_of(numbers, texts)
stored_values = st.one_of(
    st.none(),
    scalars,
    st.booleans(),
    st.lists(texts, max_size=3),
    st.lists(st.one_of(numbers, st.booleans()), max_size=3),
)


@st.composite
def metadata(draw: st.DrawFn) -> dict[str, Any]:
    keys = draw(st.lists(st.sampled_from(KEYS), unique=True, max_size=5))
    return {key: draw(stored_values if key in LIST_KEYS else st.one_of(scalars, st.none())) for key in keys}


@st.composite
def conditions(draw: st.DrawFn) -> MetadataFilter:
    operator = draw(st.sampled_from([op for op in Op if op is not Op.TEXT_MATCH_INSENSITIVE]))
    in_lists = operator in (Op.CONTAINS, Op.ANY, Op.ALL)
    key = draw(st.sampled_from(LIST_KEYS if in_lists else KEYS))
    value: Any
    if operator is Op.IS_EMPTY:
        value = None
    elif operator in (Op.IN, Op.NIN, Op.ANY, Op.ALL):
        least = 1 if operator is Op.ALL else 0
        value = draw(
            st.one_of(st.lists(texts, min_size=least, max_size=4), st.lists(numbers, min_size=least, max_size=4))
        )
        if any(isinstance(number, float) for number in value):  # as LlamaIndex's filter has it
            value = [float(number) for number in value if abs(float(number)) != 2.0**63] or [1.0]  # refused
    elif operator is Op.TEXT_MATCH:
        value = draw(texts.filter(lambda text: not set(text) & set("%_\\")))
    elif operator in (Op.EQ, Op.NE):
        value = draw(st.one_of(scalars, scalars, scalars, st.none()))
    else:
        value = draw(scalars)
    return MetadataFilter(key=key, operator=operator, value=value)


filters = st.recursive(
    conditions(),
    lambda inner: st.builds(
        lambda items, condition: MetadataFilters(filters=items, condition=condition),
        st.lists(inner, min_size=1, max_size=3),
        st.sampled_from(list(FilterCondition)),
    ),
    max_leaves=6,
).map(lambda item: item if isinstance(item, MetadataFilters) else MetadataFilters(filters=[item]))


PINNED_ROWS: list[dict[str, Any]] = [
    {},
    {"year": 2020, "owner": "ann", "tags": ["a", "b"], "mixed": 5},
    {"year": 2021.5, "owner": "bob", "tags": ["b"], "mixed": "5"},
    {"year": -1, "owner": 'say "no"', "tags": [], "mixed": True},
    {"year": 0, "owner": "back\\slash", "tags": ["5"], "mixed": [5, 1]},
    {"year": None, "owner": "", "tags": [1, 2], "mixed": ["5"]},
    {"owner": "line\nbreak", "mixed": '["5"]'},
    {"owner": 'x") or (id != "', "mixed": 5.0},
    {"year": "2020", "owner": 5, "tags": ["2020", 5], "mixed": "5.0"},
    {"year": "true", "owner": "007", "tags": ["5.0", 1.0], "mixed": False},
    {"year": 2**53 + 1, "owner": "9007199254740993", "tags": [2**53 + 1, "x"], "mixed": "2020.0"},
    {"owner": "漢字", "Größe": 5, "file path": "/a b/c", "a.b-c": "x", "in": 1},
]


def row_nodes(rows: list[dict[str, Any]]) -> list[ImageNode]:
    """One node for each row of metadata; `found` names it by its place."""
    return [
        ImageNode(id_=f"row {number}", image_path=f"/{number}.png", metadata=row, embedding=[1.0, 0.0, 0.0])
        for number, row in enumerate(rows)
    ]


def found(store: ImageStore, item: MetadataFilters) -> set[int]:
    return {int(row["id"].split()[1]) for page in store.scan(filters=item) for row in page}
