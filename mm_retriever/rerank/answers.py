"""What a remote model answers to a ranking: read with tolerance, and repaired where candidates are lost or invented.

An answer may be JSON, JSON in prose, a chain (`[3] > [1] > [2]`), a list, a table, prose, or anything else, of any
length and by anyone. A number counts only where the form proves that it names a candidate: beside a rank or a score,
in a list that is called the ranking, after the word "Image". An answer without proof has no ranking. The work is
bounded and nothing raises. JSON is read here, other text in `answer_text`. Plain Python.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from mm_retriever.errors import one_line
from mm_retriever.rerank.answer_text import (
    LONGEST_ANSWER,
    MOST_NUMBERS,
    ORDINALS,
    all_numbers,
    candidate_number,
    listed_number,
    names_candidate,
    quantity,
    series,
    text_ranking,
)

LONGEST_SENTENCE = 1_000  # characters of a caption or a reason that are kept
_DEEPEST = 4  # how far inside an object its ranking is looked for
_NAMED = 8  # unknown, repeated and missing numbers that a repair names, of each

_DOUBTFUL = "the numbers may count from 0 or from 1; kept the order of retrieval"

Entry: TypeAlias = tuple[str, str]
"""A number as it was written, and the reason beside it."""

_THOUGHT = re.compile(r"<(/?)(?:think|thinking|thoughts?|reasoning|analysis|reflection)>", re.IGNORECASE)

_REFUSAL = re.compile(
    r"\b(?:can(?:not|'t|’t)|could(?:n't|n’t| not)|(?:am|'m|’m|was) not able|unable|won(?:'t|’t)|will not)"
    r"(?: to)?(?: \w{1,15}){0,3}? (?:see|view|look|access|open|rank|order|sort|process|analy[sz]e|assist|help|compare"
    r"|identify|judge|provide|fulfill?|comply|determine|evaluate|load|display|perform|do (?:that|this))\b"
    r"|\bas an ai\b|\bi(?: must|'d have to) decline\b|\bagainst (?:my|the) polic"
    r"|\bno images? (?:was|were|is|are|have been) (?:provided|attached|given|included)\b",
    re.IGNORECASE,
)

_CUT_OFF = re.compile(r"rank[a-z_ ]{0,12}[\"']?\s{0,9}[:=]\s{0,9}\[([^\[\]{}]*)$", re.IGNORECASE)

_RANKING_KEYS = (
    *("ranking", "ranked list", "final ranking", "rankings", "order", "ranked", "ranked candidates", "ranked images"),
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
    *("picture number", "photo", "item", "option", "number", "label", "id", "index", "no", "image index"),
    *("candidate index", "name"),
)
_RANKS = ("rank", "place", "position", "ranking", "order")
_DISTANCES = ("distance",)
_SCORES = ("score", "relevance", "relevance score", "rating", "probability", "confidence", "similarity", "match", "fit")
_RANK_TEXT = re.compile(
    r"\s*(?:rank\s*)?#?\d{1,6}(?:st|nd|rd|th)?(?:\s*place)?(?:\s*(?:/|of|out of)\s*\d{1,6})?\s*\.?\s*", re.I
)
_SCORE_TEXT = re.compile(
    r"\s*#?-?\d{1,9}(?:\.\d{1,9})?\s*(?:(?:/|of|out of)\s*\d{1,6}|%|points?)?\s*(?:[(,;:–—-].*)?", re.I | re.S
)
_REASONS = ("reason", "why", "explanation", "rationale", "comment")


@dataclass(frozen=True)
class Answer:
    """What a model answered.

    Attributes:
        ranking: numbers as they were written, unknown ones and repeats included; empty without proof of a ranking.
        caption: what the model sees in the query image.
        wanted: what it takes the query to want.
        reasons: in the order of `ranking`.
        refusal: the sentence in which it refuses, where there is no ranking.
    """

    ranking: tuple[str, ...] = ()
    caption: str = ""
    wanted: str = ""
    reasons: tuple[str, ...] = ()
    refusal: str = ""


def read_answer(text: str) -> Answer:
    """The ranking of a JSON value, else of the strongest other form in the text; see the module's docstring."""
    if len(text) > LONGEST_ANSWER:
        text = f"{text[: LONGEST_ANSWER // 2]}\n{text[-LONGEST_ANSWER // 2 :]}"
    text = without_thoughts(text)
    values, rest = _json_values(text)
    facts = next((value for value in reversed(values) if isinstance(value, dict)), {})
    entries: list[Entry] = []
    for value in reversed(values):
        if entries := _json_ranking(value):
            facts = value if isinstance(value, dict) else facts
            break
    refusal = ""
    if not entries:
        refusal = refusal_of(text)
    if not entries and not refusal:
        cut_off = _CUT_OFF.search(text)
        numbers = (all_numbers(cut_off[1]) if cut_off else ()) or text_ranking(rest)
        entries = [(number, "") for number in numbers]
    entries = entries[:MOST_NUMBERS]
    given = facts.get("reasons", facts.get("reason"))
    reasons = tuple(_sentence(reason) for reason in (given if isinstance(given, list) else [given])[:999])
    if any(reason for _, reason in entries):
        reasons = tuple(reason for _, reason in entries[:999])
    return Answer(
        ranking=tuple(number for number, _ in entries),
        caption=_sentence(facts.get("caption")),
        wanted=_sentence(facts.get("wanted")),
        reasons=reasons,
        refusal=refusal,
    )


def repair(numbers: Sequence[str], labels: Sequence[int]) -> tuple[list[int], str]:
    """All labels once, and what was repaired for that: unknown and repeated ones dropped, the missing appended.

    Args:
        numbers: as they were written.
        labels: the candidates' numbers in the order of retrieval, from 1.
    """
    named, repaired = named_labels(numbers, labels)
    return [*named, *(label for label in labels if label not in named)], repaired


def named_labels(written: Sequence[str], labels: Sequence[int]) -> tuple[list[int], str]:
    """The labels that an answer names, best first, and what has to be repaired to make a permutation of them.

    Args:
        written: numbers as they were written.
        labels: the candidates' numbers in the order of retrieval, from 1.
    """
    written, count = _counted_from_one(written, labels)
    if count == _DOUBTFUL:
        return [], count
    known = {str(label): label for label in labels}
    order: dict[int, None] = {}
    unknown, repeats = [], []
    for number in written:
        label = known.get(number)
        if label is None:
            unknown.append(number)
        elif label in order:
            repeats.append(number)
        else:
            order[label] = None
    missing = [str(label) for label in labels if label not in order]
    repaired = [count] if count else []
    repaired += [
        f"{repair} {_some(numbers)}"
        for repair, numbers in (("dropped", unknown), ("repeated", repeats), ("appended", missing))
        if numbers
    ]
    return list(order), "; ".join(repaired)


def reasons_by_label(answer: Answer, labels: Sequence[int]) -> dict[int, str]:
    """Reasons come in the order of the numbers as they were written; those of unknown ones and repeats are dropped."""
    written, count = _counted_from_one(answer.ranking, labels)
    known = {} if count == _DOUBTFUL else {str(label): label for label in labels}
    reasons: dict[int, str] = {}
    for number, reason in zip(written, answer.reasons, strict=False):
        if number in known and reason:
            reasons.setdefault(known[number], reason)
    return reasons


def _counted_from_one(written: Sequence[str], labels: Sequence[int]) -> tuple[Sequence[str], str]:
    """The numbers as they count from 1, and a note if they were not.

    An answer that names each candidate once and counts from 0 is read so. An incomplete one with 0 and without the last
    number may count from 0 or from 1: the second value says so.
    """
    known = {str(label) for label in labels}
    if "0" not in written or "0" in known or str(len(labels)) in written or not known.intersection(written):
        return written, ""
    if sorted(written) == sorted(str(label - 1) for label in labels):
        return [str(int(number) + 1) for number in written], "counted from 0"
    return written, _DOUBTFUL


def without_thoughts(text: str) -> str:
    """Return the text without what the model thought aloud; thoughts that never end leave nothing after them."""
    kept: list[str] = []
    start, inside = 0, False
    for tag in _THOUGHT.finditer(text):
        if not tag[1]:
            if not inside:
                kept.append(text[start : tag.start()])
            inside = True
        elif inside:
            start, inside = tag.end(), False
        else:  # the beginning was in the prompt: all before it was thought
            kept, start = [], tag.end()
    return " ".join(kept if inside else [*kept, text[start:]])


def refusal_of(text: str) -> str:
    """Return the sentence in which the model refuses, "" if there is none."""
    match = _REFUSAL.search(text)
    if match is None:
        return ""
    before = re.split(r"[.!?\n]", text[max(0, match.start() - 200) : match.start()])[-1]
    after = re.split(r"[.!?\n]", text[match.end() : match.end() + 200])[0]
    return _sentence(f"{before}{match[0]}{after}")[:300]


# ---------------------------------------------------------------------------------------------- JSON


def _json_values(text: str) -> tuple[list[Any], str]:
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


def _lowered(value: Any) -> Any:
    if isinstance(value, dict):
        return {" ".join(_words(str(key)).lower().split())[:200]: entry for key, entry in value.items()}
    return value


def _words(key: str) -> str:
    """A key as words: "final_ranking", "finalRanking"."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])|_", " ", key[:1_000])


def _json_ranking(value: Any, depth: int = 0) -> list[Entry]:
    if isinstance(value, list):
        return _list_entries(value, ordered=True)
    if not isinstance(value, dict) or depth > _DEEPEST:
        return []
    facts = _lowered(value)
    for key in _RANKING_KEYS:
        if key in facts and (entries := _entries_of(facts[key], key)):
            return entries
    for key, entry in list(facts.items())[:50]:  # "sorted candidates", "rankedImages"
        if _RANKED_KEY.search(key) and isinstance(entry, list) and (entries := _entries_of(entry, "ranking")):
            return entries
    if entries := _mapping_entries(facts, ""):
        return entries
    for entry in list(facts.values())[:50]:
        if isinstance(entry, dict) and (entries := _json_ranking(entry, depth + 1)):
            return entries
    return []


def _entries_of(value: Any, key: str) -> list[Entry]:
    if isinstance(value, str):
        numbers = text_ranking(value) or series(value)
        return [] if key in _SCORE_KEYS else [(number, "") for number in numbers]
    if isinstance(value, list):
        if key in _SCORE_KEYS and not any(isinstance(entry, dict) for entry in value):
            return []  # scores that name no candidate
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
    for entry in value[:MOST_NUMBERS]:
        if isinstance(entry, dict):
            objects = True
            facts = _lowered(entry)
            number = next((name for key in _ID_KEYS if (name := _candidate(facts.get(key)))), "")
            if number:
                reason = next((_sentence(facts[key]) for key in _REASONS if isinstance(facts.get(key), str)), "")
                plain.append((number, reason))
                place = _place(facts)
                if place is not None:
                    places.append((place, (number, reason)))
        elif number := _candidate(entry):
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
    if form is _RANK_TEXT and value.strip().lower() in ORDINALS:
        return float(ORDINALS.index(value.strip().lower()) + 1)
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


def _sentence(value: Any) -> str:
    return one_line(value, LONGEST_SENTENCE) if isinstance(value, str) else ""


def _some(numbers: Sequence[str]) -> str:
    return ", ".join(numbers[:_NAMED]) + (f" and {len(numbers) - _NAMED} more" if len(numbers) > _NAMED else "")
