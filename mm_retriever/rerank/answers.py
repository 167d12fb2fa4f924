"""What a remote model said to a ranking: read with tolerance, mended where it lost or invented candidates.

An answer may be JSON, JSON in prose, a bare list, prose with numbers, or anything else, of any length and by anyone.
The work is bounded, nothing raises, and `repair` makes a permutation of whatever was read. Plain Python.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

LONGEST_ANSWER = 40_000  # characters that are read: half from the beginning, half from the end
MOST_NUMBERS = 5_000
LONGEST_SENTENCE = 1_000  # characters of a caption or a reason that are kept
_DEEPEST = 9  # how far inside a list its numbers are looked for
_NAMED = 8  # strangers, repeats and missing ones that a repair names, of each

_LIST = re.compile(r"\[([^\[\]{}]*)\]")
# a number of its own: no part of a word, a decimal or a negative number
_NUMBER = re.compile(r"(?<![\w.\-])\d{1,6}(?![\w]|\.\d)")
_STRANGE = re.compile(r"(?<!\w)-?\d{1,12}(?:\.\d{1,12})?(?!\w)")
# "1. candidate 5": the number in front counts lines, if the line goes on to name a number. Few blanks: the rest of the
# line is looked through once for each of them
_BULLET = re.compile(r"^[ \t]*(?:\d{1,4}[.)]|[-*])[ \t]{1,9}(?=[^\n]*\d)", re.MULTILINE)
# JSON that ended too soon
_CUT_OFF = re.compile(r"rank[a-z_ ]{0,12}[\"']?\s{0,9}[:=]\s{0,9}\[([^\[\]{}]*)$", re.IGNORECASE)
_RANKING_KEYS = ("ranking", "ranked_list", "ranked list", "order", "ranked", "rank", "list", "result")


@dataclass(frozen=True)
class Answer:
    """What was said. ``ranking`` holds numbers as they were written, strangers and repeats included."""

    ranking: tuple[str, ...] = ()
    caption: str = ""
    wanted: str = ""
    reasons: tuple[str, ...] = ()


def read_answer(text: str) -> Answer:
    """The ranking of a JSON object, else of the last list, else of all numbers in a row."""
    if len(text) > LONGEST_ANSWER:
        text = f"{text[: LONGEST_ANSWER // 2]}\n{text[-LONGEST_ANSWER // 2 :]}"
    found = _json_object(text)
    numbers = next((said for key in _RANKING_KEYS if (said := _numbers_of(found.get(key)))), ())
    if not numbers and not found:
        cut_off = _CUT_OFF.search(text)
        numbers = (_strange_numbers(cut_off[1]) if cut_off else ()) or _last_list(text) or _loose_numbers(text)
    elif not numbers:
        numbers = next((said for value in reversed(found.values()) if (said := _numbers_of(value))), ())
    reasons = found.get("reasons", found.get("reason"))
    return Answer(
        ranking=numbers[:MOST_NUMBERS],
        caption=_sentence(found.get("caption")),
        wanted=_sentence(found.get("wanted")),
        reasons=tuple(_sentence(reason) for reason in (reasons if isinstance(reasons, list) else [reasons])[:999]),
    )


def repair(said: Sequence[str], labels: Sequence[int]) -> tuple[list[int], str]:
    """All labels once, and what had to be mended for that: strangers and repeats dropped, the missing appended.

    Args:
        said: numbers as they were written.
        labels: the candidates' numbers in the order of retrieval.
    """
    known = {str(label): label for label in labels}
    order: dict[int, None] = {}
    strangers, repeats = [], []
    for number in said:
        label = known.get(number)
        if label is None:
            strangers.append(number)
        elif label in order:
            repeats.append(number)
        else:
            order[label] = None
    missing = [str(label) for label in labels if label not in order]
    mended = [
        f"{what} {_some(which)}"
        for what, which in (("dropped", strangers), ("repeated", repeats), ("appended", missing))
        if which
    ]
    return [*order, *(label for label in labels if label not in order)], "; ".join(mended)


def reasons_by_label(answer: Answer, labels: Sequence[int]) -> dict[int, str]:
    """Reasons come in the order of the numbers as they were written; those of strangers and repeats are dropped."""
    known = {str(label): label for label in labels}
    reasons: dict[int, str] = {}
    for number, reason in zip(answer.ranking, answer.reasons, strict=False):
        if number in known and reason:
            reasons.setdefault(known[number], reason)
    return reasons


def _json_object(text: str) -> dict[str, Any]:
    """The last JSON object with a known key, in the whole text, a fence, or the middle of prose."""
    decoder = json.JSONDecoder()
    found: dict[str, Any] = {}
    starts = [match.start() for match in re.finditer(r"\{", text)]
    position = -1
    for start in starts[:20] + starts[20:][-20:]:
        if start < position:
            continue  # inside the one before
        try:
            value, position = decoder.raw_decode(text, start)
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict):
            lowered = {str(key).strip().lower(): entry for key, entry in value.items()}
            if not found or any(key in lowered for key in _RANKING_KEYS):
                found = lowered
    return found


def _numbers_of(value: Any) -> tuple[str, ...]:
    """Numbers of a list (of numbers, texts or objects that hold one), or of a text."""
    if isinstance(value, str):
        return _last_list(value) or _loose_numbers(value)
    if not isinstance(value, list):
        return ()
    return tuple(number for entry in value[:MOST_NUMBERS] for number in _number_of(entry))


def _number_of(entry: Any, depth: int = 0) -> tuple[str, ...]:
    if isinstance(entry, bool) or entry is None or depth > _DEEPEST:
        return ()
    if isinstance(entry, int | float):
        whole = isinstance(entry, int) or entry.is_integer()
        return (str(int(entry)) if whole and abs(entry) < 1e12 else "a number",)
    if isinstance(entry, str):
        return _strange_numbers(entry)[:1]
    if isinstance(entry, dict):
        return next((said for value in list(entry.values())[:9] if (said := _number_of(value, depth + 1))), ())
    return ()


def _last_list(text: str) -> tuple[str, ...]:
    """Numbers of the last list in the text that has any."""
    lists = _LIST.findall(text)
    return next((said for inside in reversed(lists[-200:]) if (said := _strange_numbers(inside))), ())


def _strange_numbers(text: str) -> tuple[str, ...]:
    """All numbers of a list; negative and decimal ones too, which are nobody's label."""
    return tuple(_plain(number) for number in _STRANGE.findall(text)[:MOST_NUMBERS])


def _loose_numbers(text: str) -> tuple[str, ...]:
    return tuple(_plain(number) for number in _NUMBER.findall(_BULLET.sub("", text))[:MOST_NUMBERS])


def _plain(number: str) -> str:
    """The same number as anyone would write it: 07 is 7."""
    return str(int(number)) if number.isdecimal() else number


def _sentence(value: Any) -> str:
    return " ".join(value[: 2 * LONGEST_SENTENCE].split())[:LONGEST_SENTENCE] if isinstance(value, str) else ""


def _some(numbers: Sequence[str]) -> str:
    return ", ".join(numbers[:_NAMED]) + (f" and {len(numbers) - _NAMED} more" if len(numbers) > _NAMED else "")
