"""Reads the arguments of a language model: filters, numbers of results, texts.

Owns the descriptions of the arguments that every host shows to its model. Models send numbers as text, JSON inside
strings, and a mapping in place of a list. An argument with exactly one meaning is accepted; any other is refused with
an error that shows what to write. Knows nothing of conversations.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from difflib import get_close_matches
from numbers import Integral
from typing import Annotated, Any, TypeAlias

from llama_index.core.schema import BaseNode
from llama_index.core.vector_stores.types import FilterCondition, FilterOperator, MetadataFilter, MetadataFilters
from pydantic import Field
from pydantic.config import JsonDict

from mm_retriever.errors import FilterError, QueryError, one_line, shown
from mm_retriever.own_keys import PREFIX
from mm_retriever.store.conditions import condition

_OPERATORS = ["==", "!=", ">", ">=", "<", "<=", "in", "nin", "contains", "text_match", "is_empty"]
_CONDITION: JsonDict = {
    "type": "object",
    "properties": {
        "key": {"type": "string", "description": "The name of a metadata column."},
        "operator": {"type": "string", "enum": [*_OPERATORS], "default": "=="},
        "value": {"description": "Text, a number, true or false, or for in and nin a list of them."},
    },
    "required": ["key"],
}

TextArgument: TypeAlias = Annotated[
    str | None,
    Field(description="What to look for; with an image: what should be different, or what is wanted with it."),
]
ImageArgument: TypeAlias = Annotated[
    Any,
    Field(
        description='The image to start from: the name of an attachment, "result 3" of the last search, '
        '"result 3 of search 1", the id of an indexed image, a data: URI, or a path in an allowed folder.',
        json_schema_extra={"anyOf": [{"type": "string"}, {"type": "null"}]},
    ),
]
ResultArgument: TypeAlias = Annotated[
    Any,
    Field(
        description='Which image: "result 3" of the last search, "result 3 of search 1", an id, an attachment.',
        json_schema_extra={"type": "string"},
    ),
]
ChangeArgument: TypeAlias = Annotated[
    str | None,
    Field(description='What should be different, like "in red" or "as a mug"; nothing: simply more like it.'),
]
QuestionArgument: TypeAlias = Annotated[
    str | None, Field(description="What to find out about the image; nothing: a general description.")
]
FiltersArgument: TypeAlias = Annotated[
    Any,
    Field(
        description='Conditions that every result must meet, as [{"key": "label", "operator": "==", "value": "mug"}]. '
        "Dates are text like 2024-01-31.",
        json_schema_extra={"anyOf": [{"type": "array", "items": _CONDITION}, {"type": "null"}]},
    ),
]
TopKArgument: TypeAlias = Annotated[
    Any,
    Field(
        description="How many results.",
        json_schema_extra={"anyOf": [{"type": "integer", "minimum": 1}, {"type": "null"}]},
    ),
]
"""Arguments of type Any are shown to a model with their true type, and read leniently; see `read_filters`."""

_JOINED = {"$and": FilterCondition.AND, "$or": FilterCondition.OR}
_FORM = '[{"key": "label", "operator": "==", "value": "mug"}]'
_MAX_CONDITIONS = 64
_MAX_DEPTH = 4
_LONGEST_RESULT = 64  # characters; the pattern backtracks over blanks
_RESULT = re.compile(
    r"(?:(?:result|picture|image|number|no\.?|nr\.?)\s*)?#?\s*(?P<rank>\d{1,4})"
    r"(?:\s*(?:of|from|in)\s*search\s*#?\s*(?P<search>\d{1,6}))?",
    re.IGNORECASE,
)


def read_result_number(text: str) -> tuple[int, int | None] | None:
    """Return rank and search of "result 3", "#3", "3" or "result 3 of search 1"; None for any other text."""
    match = _RESULT.fullmatch(text.strip()) if len(text) <= _LONGEST_RESULT else None
    if match is None:
        return None
    return int(match["rank"]), int(match["search"]) if match["search"] else None


def read_count(value: object, *, default: int, most: int) -> int:
    """Return a number of results: the default without one, and at most `most`.

    Raises:
        QueryError: not a whole number of 1 or more.
    """
    if value is None or value == "":
        return default
    if isinstance(value, str) and value.strip().isdecimal():
        value = int(value.strip()[:9])
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, Integral) or int(value) < 1:
        raise QueryError(f"top_k {shown(value)}: give a whole number from 1 to {most}")
    return min(int(value), most)


def read_text(value: object, name: str, *, most: int) -> str:
    """Return a text without surrounding white space, "" for None.

    Raises:
        QueryError: not a text, or longer than `most` characters.
    """
    if value is None:
        return ""
    if not isinstance(value, str):
        raise QueryError(f"{name} {shown(value)}: give text")
    if len(value) > most:
        raise QueryError(f"{name}: {len(value)} characters, at most {most} are taken")
    return value.encode("utf-8", "replace").decode().strip()  # half surrogate pairs become question marks


def check_names(given: Collection[str], known: Collection[str]) -> None:
    """Refuse an argument whose name is nearly right: a host that passes it over would lose a filter unsaid.

    Others that no tool takes may be passed over: some clients add their own to every call.

    Raises:
        QueryError: names the argument that is meant.
    """
    for name in sorted(set(given) - set(known)):
        spelling = name.lower().replace("-", "_")
        if meant := [key for key in get_close_matches(spelling, known, cutoff=0.7) if key not in given]:
            raise QueryError(f"no argument {one_line(name, 40)!r}; did you mean {meant[0]!r}?")


def read_filters(value: object) -> MetadataFilters | None:
    """Return the filters that a model gave as JSON; None without any.

    Accepted are a list of conditions, all of which must hold; one condition; ``{"label": "mug", "year": 2020}``;
    ``{"condition": "or", "filters": [...]}``, also inside a list; ``{"year": {"$gte": 2020}}`` and ``{"$or": [...]}``;
    each of these as a JSON text; and LlamaIndex's own filters.

    Raises:
        FilterError: anything else; the message shows the form.
    """
    if isinstance(value, MetadataFilters):
        return value
    if isinstance(value, MetadataFilter):
        return MetadataFilters(filters=[value])
    if isinstance(value, str):
        if not value.strip():
            return None
        try:
            value = json.loads(value)
        except RecursionError:
            raise FilterError(f"filters nested more than {_MAX_DEPTH} deep") from None
        except ValueError as error:
            raise FilterError(f"filters {shown(value)}: not JSON ({error}); give {_FORM}") from None
    if value is None or value in ({}, []):
        return None
    budget = [_MAX_CONDITIONS]
    read = _read(value, budget, depth=1)
    return read if isinstance(read, MetadataFilters) else MetadataFilters(filters=[read])


def _read(value: object, budget: list[int], depth: int) -> MetadataFilter | MetadataFilters:
    if depth > _MAX_DEPTH:
        raise FilterError(f"filters nested more than {_MAX_DEPTH} deep")
    budget[0] -= 1
    if budget[0] < 0:
        raise FilterError(f"more than {_MAX_CONDITIONS} conditions in one filter")
    if isinstance(value, list | tuple):
        return MetadataFilters(filters=[_read(item, budget, depth + 1) for item in value])
    if not isinstance(value, Mapping) or not value or not all(isinstance(key, str) for key in value):
        raise FilterError(f"filters {shown(value)}: give a list of conditions, {_FORM}")
    if "filters" in value:
        return _group(value, budget, depth)
    if "key" in value and not value.keys() - {"key", "operator", "value"}:
        return _condition(value)
    if "operator" in value:
        raise FilterError(f"filters {shown(value)}: a condition has key, operator and value, {_FORM}")
    return MetadataFilters(filters=[_named(key, item, budget, depth) for key, item in value.items()])


def _named(key: str, item: object, budget: list[int], depth: int) -> MetadataFilter | MetadataFilters:
    """A column and its value, or the form of document databases: {"year": {"$gte": 2020}}, {"$or": [...]}."""
    if key in _JOINED and isinstance(item, list | tuple):
        return MetadataFilters(filters=[_read(part, budget, depth + 1) for part in item], condition=_JOINED[key])
    if isinstance(item, Mapping) and item and all(isinstance(name, str) and name[:1] == "$" for name in item):
        budget[0] -= len(item)
        compared = [_condition({"key": key, "operator": name[1:], "value": item[name]}) for name in item]
        return MetadataFilters(filters=[*compared])
    return _condition({"key": key, "value": item})


def _group(value: Mapping[str, Any], budget: list[int], depth: int) -> MetadataFilters:
    inside = value["filters"]
    if value.keys() - {"condition", "filters"} or not isinstance(inside, list | tuple):
        raise FilterError(f'filters {shown(value)}: a group is {{"condition": "or", "filters": [...]}}')
    try:
        joined = FilterCondition(str(value.get("condition") or "and").lower())
    except ValueError:
        raise FilterError(f"condition {shown(value['condition'])}: give and, or, not") from None
    return MetadataFilters(filters=[_read(item, budget, depth + 1) for item in inside], condition=joined)


def _condition(value: Mapping[str, Any]) -> MetadataFilter | MetadataFilters:
    key, wanted = value["key"], value.get("value")
    if not isinstance(key, str):
        raise FilterError(f"key {shown(key)}: give the name of a metadata column")
    if key in ("file_path", f"{PREFIX}file_path"):  # filters would tell, bit by bit, what is not shown
        raise FilterError(f"no column {key!r}: where a file lies is not told; filter by file_name or another column")
    operator = value.get("operator") or ("in" if isinstance(wanted, list) else "==")
    return condition(key, str(operator), wanted)


def but_not(node: BaseNode | None, filters: MetadataFilters | None) -> MetadataFilters | None:
    """Return the filters, extended to leave out this node; the retriever leaves out its copies."""
    if node is None:
        return filters
    itself = MetadataFilters(filters=[MetadataFilter(key="id", operator=FilterOperator.NE, value=node.node_id)])
    return itself if filters is None else MetadataFilters(filters=[filters, itself])
