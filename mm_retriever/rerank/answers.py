"""What a remote model answers to a ranking: read with tolerance, and repaired where candidates are lost or invented.

An answer may be JSON, JSON in prose, a chain (`[3] > [1] > [2]`), a list, a table, prose, or anything else, of any
length and by anyone. A number counts only where the form proves that it names a candidate: beside a rank or a score,
in a list that is called the ranking, after the word "Image". An answer without proof has no ranking. The work is
bounded and nothing raises. JSON is read in `answer_json`, other text in `answer_text`. Plain Python.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from mm_retriever.rerank.answer_json import Entry, facts_and_entries, json_forms, json_values, sentence
from mm_retriever.rerank.answer_text import LONGEST_ANSWER, all_numbers, text_ranking
from mm_retriever.rerank.answer_words import MOST_NUMBERS, REST

_NAMED = 8  # unknown, repeated and missing numbers that a repair names, of each

_DOUBTFUL = "the numbers may count from 0 or from 1; kept the order of retrieval"


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


@dataclass(frozen=True)
class Answer:
    """What a model answered.

    Attributes:
        ranking: numbers as they were written, unknown ones and repeats included; empty without proof of a ranking.
        caption: what the model sees in the query image.
        wanted: what it takes the query to want.
        reasons: in the order of `ranking`.
        refusal: the sentence in which it refuses, where there is no ranking.
        last: how many of the ranking, at its end, are said to come after all others.
    """

    ranking: tuple[str, ...] = ()
    caption: str = ""
    wanted: str = ""
    reasons: tuple[str, ...] = ()
    refusal: str = ""
    last: int = 0


def read_answer(text: str) -> Answer:
    """The ranking of a JSON value, else of the strongest other form in the text; see the module's docstring."""
    if len(text) > LONGEST_ANSWER:
        text = f"{text[: LONGEST_ANSWER // 2]}\n{text[-LONGEST_ANSWER // 2 :]}"
    text = without_thoughts(text)
    entries: list[Entry] = []
    for form in json_forms(text):
        values, rest = json_values(form)
        facts, entries = facts_and_entries(values)
        if entries:
            break
    else:
        values, rest = json_values(text)
        facts, _ = facts_and_entries(values)
    refusal = ""
    if not entries:
        refusal = refusal_of(text)
    if not entries and not refusal:
        cut_off = _CUT_OFF.search(text)
        numbers = (all_numbers(cut_off[1]) if cut_off else ()) or text_ranking(rest)
        entries = [(number, "") for number in numbers]
    entries = entries[:MOST_NUMBERS]
    last = next((len(entries) - i - 1 for i, (number, _) in enumerate(entries) if number == REST), 0)
    entries = [entry for entry in entries if entry[0] != REST]
    given = facts.get("reasons", facts.get("reason"))
    reasons = tuple(sentence(reason) for reason in (given if isinstance(given, list) else [given])[:999])
    if any(reason for _, reason in entries):
        reasons = tuple(reason for _, reason in entries[:999])
    return Answer(
        ranking=tuple(number for number, _ in entries),
        caption=sentence(facts.get("caption")),
        wanted=sentence(facts.get("wanted")),
        reasons=reasons,
        refusal=refusal,
        last=last,
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
    return sentence(f"{before}{match[0]}{after}")[:300]


def _some(numbers: Sequence[str]) -> str:
    return ", ".join(numbers[:_NAMED]) + (f" and {len(numbers) - _NAMED} more" if len(numbers) > _NAMED else "")
