"""Rankings in the JSON of a model's answer: lists, objects with a rank or a score, mappings, under many names.

Reads what JavaScript and Python take for JSON, too. Text that is no JSON is read in `answer_text`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

from mm_retriever.errors import one_line
from mm_retriever.rerank.answer_text import (
    candidate_number,
    lettered,
    listed_number,
    names_candidate,
    quantity,
    series,
    text_ranking,
)
from mm_retriever.rerank.answer_words import LAST, MOST_NUMBERS, NO_RANKING, RANKING_WORD, REST, WORST_FIRST, rank_of

LONGEST_SENTENCE = 1_000  # characters of a caption or a reason that are kept
_DEEPEST = 4  # how far inside an object its ranking is looked for

Entry: TypeAlias = tuple[str, str]
"""A number as it was written, and the reason beside it."""

_TRAILING = re.compile(r",(?=\s{0,99}[\]}])")
_REMARK = re.compile(r"(?<=[,\[{\d])[ \t]{0,9}//[^\n\"]{0,200}$", re.MULTILINE)
_SINGLE_QUOTE = re.compile(r"(?<=[\[{,:])(?P<blank>\s{0,99})'|'(?=\s{0,99}[,:\]}])")

_RANKING_KEYS = (
    *("ranking", "ranked list", "final ranking", "rankings", "order", "ranked", "ranked candidates", "ranked images"),
    *("ranked order", "best to worst", "best first", "response", "worst to best", "worst first"),
    *("rank", "list", "result", "results", "answer", "final answer", "best", "sorted", "top", "permutation", "output"),
    *("candidates", "images", "pictures", "items", "indices", "numbers", "ids", "scores", "evaluations", "ratings"),
)
_DESCRIBING_KEYS = ("candidates", "images", "pictures", "items", "scores", "evaluations", "ratings", "numbers", "ids")
"""Lists under these keys need not be in order: what they hold counts with a rank or a score."""
_SCORE_KEYS = ("scores", "ratings")
_RANKED_KEY = re.compile(r"^(?!.*(?:worst|least|asc))(?=.*(?:rank|sorted|order))(?=.*(?:ing|ed|order|list)).{1,40}$")
_ONE_KEYS = ("ranking", "best", "answer", "final answer", "top", "result", "order")
_ID_KEYS = (
    *("candidate", "candidate number", "candidate id", "image", "image number", "image id", "picture"),
    *("picture number", "photo", "num", "#", "candidate no", "image no", "item", "option", "number", "label"),
    *("id", "index", "no", "image index", "candidate index", "name"),
)
_RANKS = ("rank", "place", "position", "ranking", "order")
_DISTANCES = ("distance",)
_SCORES = (
    *("score", "value", "points", "match score", "similarity score", "final score", "relevance", "relevance score"),
    *("rating", "probability", "confidence", "similarity", "match", "fit"),
)
_RANK_TEXT = re.compile(
    r"\s*(?:rank\s*)?#?\d{1,6}(?:st|nd|rd|th)?(?:\s*place)?(?:\s*(?:/|of|out of)\s*\d{1,6})?\s*\.?\s*", re.I
)
_SCORE_TEXT = re.compile(
    r"\s*#?-?\d{1,9}(?:\.\d{1,9})?\s*(?:(?:/|of|out of)\s*\d{1,6}|%|points?)?\s*(?:[(,;:–—-].*)?", re.I | re.S
)
_DIRECTION_KEYS = ("order", "sort", "sorting", "sort order", "direction", "note")
_RANKING_NAME = re.compile(RANKING_WORD, re.IGNORECASE)
_LINE = re.compile(r"\s*#?(\d{1,3})(?:[.)]|st\b|nd\b|rd\b|th\b)")
_REASONS = ("reason", "why", "explanation", "rationale", "comment")


def json_values(text: str) -> tuple[list[Any], str]:
    """The objects in the text, and lists that hold objects or texts, lower-cased keys; and the text without them."""
    decoder = json.JSONDecoder(strict=False)  # models break lines inside texts
    values: list[Any] = []
    rest: list[str] = []
    position = kept = 0
    starts = [match.start() for match in re.finditer(r"[\[{]", text)]
    for start in starts[:20] + starts[20:][-20:]:
        if start < position:
            continue  # inside the one before
        try:
            value, end = decoder.raw_decode(text, start)
        except (ValueError, RecursionError):
            continue
        if isinstance(value, list) and not any(isinstance(entry, dict | str) for entry in value):
            continue  # a list of numbers is read where it stands
        position = end
        rest.append(text[kept:start])
        kept = end
        values.append(_lowered(value))
    return values, "\n".join([*rest, text[kept:]])


def json_forms(text: str) -> Iterator[str]:
    """The text, and what JavaScript and Python take for JSON as JSON: commas at the end, remarks, single quotes."""
    yield text
    loose = _TRAILING.sub("", _REMARK.sub("", text))
    quoted = _SINGLE_QUOTE.sub(r'\g<blank>"', loose)
    yield from dict.fromkeys(form for form in (loose, quoted) if form != text)


def facts_and_entries(values: Sequence[Any]) -> tuple[dict[str, Any], list[Entry]]:
    """The object that describes the answer, and the ranking of the last value that has one."""
    facts = next((value for value in reversed(values) if isinstance(value, dict)), {})
    for value in reversed(values):
        if entries := _json_ranking(value):
            return (value if isinstance(value, dict) else facts), entries
    return facts, _placed_entries(values)  # an object on each line


def _lowered(value: Any) -> Any:
    if isinstance(value, dict):
        return {" ".join(_words(str(key)).lower().split())[:200]: entry for key, entry in value.items()}
    return value


def _words(key: str) -> str:
    """A key as words: "final_ranking", "finalRanking"."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])|_", " ", key[:1_000])


def _json_ranking(value: Any, depth: int = 0) -> list[Entry]:
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):  # the arguments of a call
        value = next(iter(json_values(value)[0]), None)
    if isinstance(value, list):
        return _list_entries(value, ordered=True)
    if not isinstance(value, dict) or depth > _DEEPEST:
        return []
    facts = _lowered(value)
    if entries := _ordinal_entries(facts):
        return entries
    order = " ".join(facts[key] for key in _DIRECTION_KEYS if isinstance(facts.get(key), str))[:200]
    for key in (*_RANKING_KEYS, *(key for key in list(facts)[:50] if _is_ranked(key))):
        if key not in facts or not (entries := _entries_of(facts[key], key, facts)):
            continue
        backwards = WORST_FIRST.search(f"{key} {order}") and isinstance(facts[key], list)
        return entries[::-1] if backwards and not _are_placed(facts[key]) else entries
    for entry in list(facts.values())[:50]:  # under any name, objects with a rank or a score
        if isinstance(entry, list) and (entries := _placed_entries(entry)):
            return entries
    if entries := _mapping_entries(facts, ""):
        return entries
    for entry in list(facts.values())[:50]:
        if isinstance(entry, dict | str) and (entries := _json_ranking(entry, depth + 1)):
            return entries
    return []


def _is_ranked(key: str) -> bool:
    """Whether a key is called a ranking: "sorted candidates", "rankedImages", "排名"."""
    if NO_RANKING.search(key) and not WORST_FIRST.search(key):
        return False
    ranked = _RANKED_KEY.search(key) or WORST_FIRST.fullmatch(key.removeprefix("ranking "))
    return ranked is not None or (
        key != "ranks" and (not key.isascii() or key.isalpha()) and _RANKING_NAME.fullmatch(key) is not None
    )


def _are_placed(entries: Sequence[Any]) -> bool:
    """Whether objects have places of their own."""
    return any(isinstance(entry, dict) and _place(_lowered(entry)) is not None for entry in entries[:MOST_NUMBERS])


def _placed_entries(entries: Sequence[Any]) -> list[Entry]:
    return _list_entries(list(entries), ordered=False) if len(entries) > 1 and _are_placed(entries) else []


def _ordinal_entries(facts: Mapping[str, Any]) -> list[Entry]:
    """`{"first": 3, "second": 1}`, `{"rank 1": "Image 3", "worst": 2}`: several places in words, from the first on."""
    named = ((rank_of(key), _candidate(value)) for key, value in list(facts.items())[:MOST_NUMBERS])
    places = {rank: number for rank, number in named if rank is not None and number}
    ranks = sorted(rank for rank in places if rank != LAST)
    if len(places) < 2 or ranks != list(range(1, len(ranks) + 1)) or not ranks:
        return []
    last = [REST, places[LAST]] if LAST in places else []
    return [(number, "") for number in (*(places[rank] for rank in ranks), *last)]


def _entries_of(value: Any, key: str, beside: Mapping[str, Any]) -> list[Entry]:
    if isinstance(value, str):
        numbers = text_ranking(value) or series(value)
        return [] if key in _SCORE_KEYS else [(number, "") for number in numbers]
    if isinstance(value, list):
        if key in _SCORE_KEYS and not any(isinstance(entry, dict) for entry in value):
            return []  # scores that name no candidate
        scores: list[Any] = next((beside[name] for name in _SCORE_KEYS if isinstance(beside.get(name), list)), [])
        if (
            key in _DESCRIBING_KEYS
            and len(scores) == len(value)
            and all(type(score) in (int, float) for score in scores)
        ):
            value = [{"candidate": item, "score": score} for item, score in zip(value, scores, strict=True)]
        return _list_entries(value, ordered=key not in _DESCRIBING_KEYS)
    if isinstance(value, dict):
        facts = _lowered(value)
        return _mapping_entries(facts, key) or _json_ranking(facts, 2)
    if isinstance(value, int) and not isinstance(value, bool) and key in _ONE_KEYS:
        return [(_whole(value), "")]
    return []


def _list_entries(value: list[Any], *, ordered: bool) -> list[Entry]:
    """Numbers, texts that name candidates, or objects, which count by rank or score where they have one."""
    plain: list[Entry] = []
    places: list[tuple[float, Entry]] = []
    objects = False
    if ordered and all(isinstance(entry, str) for entry in value) and (numbers := lettered(value)):
        return [(number, "") for number in numbers]
    if ordered and len(value) > 1 and all(isinstance(entry, str) and _LINE.match(entry[:400]) for entry in value):
        numbers = text_ranking("\n".join(entry[:400] for entry in value[:99]))
        written = [str(int(match[1])) for entry in value[:MOST_NUMBERS] if (match := _LINE.match(entry))]
        in_order = written == [str(place) for place in range(1, len(value) + 1)]
        return [(number, "") for number in numbers or (() if in_order else written)]
    for entry in value[:MOST_NUMBERS]:
        if isinstance(entry, dict):
            objects = True
            facts = _lowered(entry)
            number = next((name for key in _ID_KEYS if (name := _candidate(facts.get(key)))), "")
            if not number and ordered and len(entry) == 1 and isinstance(next(iter(facts.values())), str):
                number = _candidate(next(iter(facts)))  # {"3": "it is red"}
            if number:
                reason = next((sentence(facts[key]) for key in _REASONS if isinstance(facts.get(key), str)), "")
                plain.append((number, reason))
                place = _place(facts)
                if place is not None:
                    places.append((place, (number, reason)))
        elif number := _candidate(entry[0] if isinstance(entry, list) and len(entry) == 1 and ordered else entry):
            plain.append((number, ""))
        elif isinstance(entry, str) and len(entry) > 3 and ordered:
            break  # of what comes after one that cannot be read, nobody knows the place
    if places:
        placed = [entry for _, entry in sorted(places, key=lambda item: item[0])]
        return [*placed, *(entry for entry in plain if entry not in placed)] if ordered else placed
    return plain if ordered or not objects else []


def _mapping_entries(facts: Mapping[str, Any], key: str) -> list[Entry]:
    """`{"1": 0.9, "2": 0.3}`, `{"Image 3": {"rank": 1}}`, `{"1": "Image 3"}`; nothing where it can mean two things."""
    items = list(facts.items())[:MOST_NUMBERS]
    numbers = [_candidate(name) for name, _ in items]
    if not items or not all(numbers):
        return []
    values = [value for _, value in items]
    ranks = [rank_of(value) if isinstance(value, str) else None for value in values]
    if len({*ranks}) == len(ranks) and all(rank is not None for rank in ranks):  # {"3": "first", "1": "2nd"}
        return [(number, "") for _, number in sorted(zip((rank or 0 for rank in ranks), numbers, strict=True))]
    if key and all(isinstance(value, str) and quantity(value) is not None for value in values) and key in _SCORE_KEYS:
        values = [quantity(str(value)) for value in values]
    if all(isinstance(value, dict) for value in values):
        places = [_place(_lowered(value)) for value in values]
        scored = [(place, number) for place, number in zip(places, numbers, strict=True) if place is not None]
        return [(number, "") for _, number in sorted(scored, key=lambda item: item[0])]
    if all(isinstance(value, str) and names_candidate(value.strip()) for value in values):
        by_rank = sorted(zip(numbers, values, strict=True), key=lambda item: int(item[0]))
        return [(_candidate(value), "") for _, value in by_rank]
    if not all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        return []
    are_places = sorted(values) == list(range(1, len(values) + 1))
    if are_places and key not in _SCORE_KEYS:  # ranks, or a few small scores?
        named = all(names_candidate(name) for name, _ in items)
        if not named or key not in ("ranking", "rank", "order", "rankings"):
            return []
        return [(number, "") for _, number in sorted(zip(values, numbers, strict=True))]
    if key not in ("", *_SCORE_KEYS) and all(isinstance(value, int) for value in values):
        return []
    best_first = sorted(zip(values, numbers, strict=True), key=lambda item: -item[0])
    return [(number, "") for _, number in best_first]


def _place(facts: Mapping[str, Any]) -> float | None:
    """Where an object belongs, less is better: its rank, or else its score or distance."""
    for keys, sign, form in ((_RANKS, 1.0, _RANK_TEXT), (_SCORES, -1.0, _SCORE_TEXT), (_DISTANCES, 1.0, _SCORE_TEXT)):
        for key in keys:
            number = _quantity(facts.get(key), form)
            if number is not None:
                return sign * number
    return None


def _quantity(value: Any, form: re.Pattern[str]) -> float | None:
    if isinstance(value, bool) or value is None:
        return None
    if isinstance(value, int | float):
        return float(value) if abs(value) < 1e12 else None
    if not isinstance(value, str):
        return None
    if form is _RANK_TEXT and (rank := rank_of(value)) is not None:
        return float(rank)
    return quantity(value) if form.fullmatch(value[:200]) else None  # "2nd row" is no rank


def _candidate(value: Any) -> str:
    """The number that a JSON value names as a candidate; "" if it names none."""
    if isinstance(value, bool) or value is None:
        return ""
    if isinstance(value, int | float):
        return _whole(value)
    return candidate_number(value) or listed_number(value[:400]) if isinstance(value, str) else ""


def _whole(value: int | float) -> str:
    whole = isinstance(value, int) or value.is_integer()
    return str(int(value)) if whole and abs(value) < 1e12 else "a number"


def sentence(value: Any) -> str:
    """Return a text on one bounded line; "" for anything else."""
    return one_line(value, LONGEST_SENTENCE) if isinstance(value, str) else ""
