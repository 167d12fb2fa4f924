"""What a remote model answers to a ranking: read with tolerance, and repaired where candidates are lost or invented.

An answer may be JSON, JSON in prose, a chain (`[3] > [1] > [2]`), a list, a table, prose, or anything else, of any
length and by anyone. A number counts only where the form proves that it names a candidate: beside a rank or a score,
in a list that is said to be the ranking, after the word "Image". A price, a year, a number of images or a line number
is no candidate, and an answer without proof has no ranking. The work is bounded, nothing raises, and `repair` makes a
permutation of whatever was read. Plain Python.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from mm_retriever.errors import one_line

LONGEST_ANSWER = 40_000  # characters that are read: half from the beginning, half from the end
MOST_NUMBERS = 5_000
LONGEST_SENTENCE = 1_000  # characters of a caption or a reason that are kept
_MOST_LINES = 2_000
_DEEPEST = 4  # how far inside an object its ranking is looked for
_NAMED = 8  # unknown, repeated and missing numbers that a repair names, of each

_DOUBTFUL = "the numbers may count from 0 or from 1; kept the order of retrieval"

Entry: TypeAlias = tuple[str, str]
"""A number as it was written, and the reason beside it."""

_THOUGHT = re.compile(r"<(/?)(?:think|thinking|thoughts?|reasoning|analysis|reflection)>", re.IGNORECASE)

_NOUN = (
    r"(?:images?|img|pictures?|pics?|photos?|candidates?|options?|items?|products?|passages?|documents?|docs?"
    r"|no\.|nr\.)"
)
_DIGITS = r"(?!(?<=\d,)\d{3}(?!\d))\d{1,6}(?![\w]|\.\d|,\d{3}\b)"
_ANY_ITEM = rf"(?<![\w.\-$€£])(?:{_NOUN}[ \t]{{0,2}})?[#№(\[\"']{{0,3}}{_DIGITS}[)\]\"']{{0,3}}"
_NUMBER = re.compile(r"\d{1,6}")
_STRANGE = re.compile(r"(?<!\w)-?\d{1,12}(?:\.\d{1,12})?(?!\w)")
_ONLY_ITEM = re.compile(rf"\s*{_ANY_ITEM}\s*[.:,;]?\s*", re.IGNORECASE)
_CANDIDATE = re.compile(rf"(?:{_NOUN}[ \t]{{0,2}}[#№(\[]{{0,2}}|[#№\[])({_DIGITS})", re.IGNORECASE)

_CHAIN = re.compile(rf"{_ANY_ITEM}(?:\s{{0,4}}(?:>{{1,3}}=?|≥|≻|»|[-=]>|→|&gt;)\s{{0,4}}{_ANY_ITEM})+", re.IGNORECASE)
_CHAIN_UP = re.compile(rf"{_ANY_ITEM}(?:\s{{0,4}}(?:<{{1,3}}|≺|&lt;)\s{{0,4}}{_ANY_ITEM})+", re.IGNORECASE)
_SERIES = (
    rf"{_ANY_ITEM}(?:(?:[ \t]{{0,3}}[,;|/][ \t]{{0,3}}(?:and[ \t])?|[ \t]{{1,4}}(?:and[ \t]|then[ \t])?){_ANY_ITEM})*"
)
_SERIES_LINE = re.compile(rf"[ \t]*[\[(]?{_SERIES}[\])]?[ \t]*\.?[ \t]*", re.IGNORECASE)
_LABEL = re.compile(
    r"(?P<label>[^:=\n]{0,80}\b(?P<word>rank\w{0,9}|order\w{0,9}|answer|list|results?|sorted|best|top|winner)\b"
    r"[^:=\n]{0,60}?)(?:[:=]|\b(?:is|are|would be)\b\s{0,2}[:=]?)",
    re.IGNORECASE,
)
_LIST = re.compile(r"\[([^\[\]{}]{1,20000})\]")
_WORST_FIRST = re.compile(r"worst (?:to|first)|worst-to|least \w+ (?:to|first)|ascending|lowest first", re.IGNORECASE)
_NO_RANKING = re.compile(r"\b(?:scores?|prices?|years?|sizes?|counts?|costs?|worst)\b", re.IGNORECASE)
_CUT_OFF = re.compile(r"rank[a-z_ ]{0,12}[\"']?\s{0,9}[:=]\s{0,9}\[([^\[\]{}]*)$", re.IGNORECASE)

_ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth")
_PLACE = re.compile(
    r"[ \t]*(?:(?:rank|place|position)?[ \t]{0,2}#?(?P<number>\d{1,3})(?:st|nd|rd|th)?(?:[ \t]place)?[ \t]{0,2}[.):\-]"
    rf"|(?P<word>{'|'.join(_ORDINALS)})(?:[ \t]place)?[ \t]{{0,2}}[:.)\-]|[-•+])[ \t]{{0,9}}",
    re.IGNORECASE,
)
_SCORED = re.compile(
    rf"\W{{0,5}}(?P<item>{_ANY_ITEM})[ \t]{{0,3}}[:=|\-–][ \t]{{0,3}}(?P<said>score[^\d\n]{{0,9}})?"
    r"(?P<score>\d{1,6}(?:\.\d{1,12})?)[ \t]{0,2}(?P<of>/[ \t]{0,2}\d{1,4}|%)?[^\w\n]{0,5}",
    re.IGNORECASE,
)
_BEST = re.compile(r"\b(?:best|first|top|closest|winner|winning|most \w+)\b", re.IGNORECASE)
_NEXT = re.compile(
    r"[\s,;:.>()\[\]#\"'-]*(?:(?:and|is|was|are|by|the|best|image|picture|photo|candidate|option|item|number|place|comes|"
    r"then|followed|next|after|that|last|lastly|finally|second|secondly|third|fourth|fifth|sixth|seventh|eighth|ninth|"
    r"tenth|worst|match|fit|one|fits|matches|well|a|close)\b[\s,;:.>()\[\]#\"'-]*)*",
    re.IGNORECASE,
)
_SEQUEL = re.compile(
    r"\b(?:then|followed|next|after|last|lastly|finally|second|secondly|third|fourth|fifth|sixth|seventh|eighth|ninth|"
    r"tenth|worst)\b|[>,]",
    re.IGNORECASE,
)
_PLURAL = re.compile(r"[ \t]{0,2}(?:images|pictures|photos|candidates|options|items|products|of\b|%|/)", re.IGNORECASE)
_REFUSAL = re.compile(
    r"\b(?:can(?:not|'t|’t)|could(?:n't|n’t| not)|(?:am|'m|’m|was) not able|unable|won(?:'t|’t)|will not)"
    r"(?: to)?(?: \w{1,15}){0,3}? (?:see|view|look|access|open|rank|order|sort|process|analy[sz]e|assist|help|compare"
    r"|identify|judge|provide|fulfill?|comply|determine|evaluate|load|display|perform|do (?:that|this))\b"
    r"|\bas an ai\b|\bi(?: must|'d have to) decline\b|\bagainst (?:my|the) polic"
    r"|\bno images? (?:was|were|is|are|have been) (?:provided|attached|given|included)\b",
    re.IGNORECASE,
)

_RANKING_KEYS = (
    *("ranking", "ranked list", "final ranking", "rankings", "order", "ranked", "ranked candidates", "ranked images"),
    *("rank", "list", "result", "results", "answer", "final answer", "best", "sorted", "top", "permutation", "output"),
    *("candidates", "images", "pictures", "items", "indices", "numbers", "ids", "scores", "evaluations", "ratings"),
)
_DESCRIBING_KEYS = ("candidates", "images", "pictures", "items", "scores", "evaluations", "ratings", "numbers", "ids")
"""Lists under these keys need not be in order: what they hold counts with a rank or a score."""
_SCORE_KEYS = ("scores", "ratings")
_ONE_KEYS = ("ranking", "best", "answer", "final answer", "top", "result", "order")
_ID_KEYS = (
    *(
        "candidate",
        "candidate number",
        "candidate id",
        "image",
        "image number",
        "image id",
        "picture",
        "picture number",
    ),
    *("photo", "item", "option", "number", "label", "id", "index", "no", "image index", "candidate index", "name"),
)
_RANKS = ("rank", "place", "position", "ranking", "order")
_SCORES = ("score", "relevance", "relevance score", "rating", "probability", "confidence", "similarity", "match", "fit")
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
    text = _without_thoughts(text)
    values, rest = _json_values(text)
    facts = next((value for value in reversed(values) if isinstance(value, dict)), {})
    entries: list[Entry] = []
    for value in reversed(values):
        if entries := _json_ranking(value):
            facts = value if isinstance(value, dict) else facts
            break
    refusal = ""
    if not entries:
        refusal = _refusal(text)
    if not entries and not refusal:
        cut_off = _CUT_OFF.search(text)
        numbers = (_strange_numbers(cut_off[1]) if cut_off else ()) or _text_ranking(rest)
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


def repair(said: Sequence[str], labels: Sequence[int]) -> tuple[list[int], str]:
    """All labels once, and what was repaired for that: unknown and repeated ones dropped, the missing appended.

    Args:
        said: numbers as they were written.
        labels: the candidates' numbers in the order of retrieval, from 1.
    """
    named, repaired = named_labels(said, labels)
    return [*named, *(label for label in labels if label not in named)], repaired


def named_labels(said: Sequence[str], labels: Sequence[int]) -> tuple[list[int], str]:
    """The labels that an answer names, best first, and what has to be repaired to make a permutation of them.

    Args:
        said: numbers as they were written.
        labels: the candidates' numbers in the order of retrieval, from 1.
    """
    said, count = _counted_from_one(said, labels)
    if count == _DOUBTFUL:
        return [], count
    known = {str(label): label for label in labels}
    order: dict[int, None] = {}
    unknown, repeats = [], []
    for number in said:
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
        f"{what} {_some(which)}"
        for what, which in (("dropped", unknown), ("repeated", repeats), ("appended", missing))
        if which
    ]
    return list(order), "; ".join(repaired)


def reasons_by_label(answer: Answer, labels: Sequence[int]) -> dict[int, str]:
    """Reasons come in the order of the numbers as they were written; those of unknown ones and repeats are dropped."""
    said, count = _counted_from_one(answer.ranking, labels)
    known = {} if count == _DOUBTFUL else {str(label): label for label in labels}
    reasons: dict[int, str] = {}
    for number, reason in zip(said, answer.reasons, strict=False):
        if number in known and reason:
            reasons.setdefault(known[number], reason)
    return reasons


def _counted_from_one(said: Sequence[str], labels: Sequence[int]) -> tuple[Sequence[str], str]:
    """The numbers as they count from 1, and a note if they were not.

    An answer that names each candidate once and counts from 0 is read so. An incomplete one with 0 and without the last
    number may count from 0 or from 1: the second value says so.
    """
    known = {str(label) for label in labels}
    if "0" not in said or "0" in known or str(len(labels)) in said or not known.intersection(said):
        return said, ""
    if sorted(said) == sorted(str(label - 1) for label in labels):
        return [str(int(number) + 1) for number in said], "counted from 0"
    return said, _DOUBTFUL


def _without_thoughts(text: str) -> str:
    """The text without what the model thought aloud; thoughts that never end leave nothing after them."""
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


def _refusal(text: str) -> str:
    """The sentence in which the model refuses, "" if there is none."""
    match = _REFUSAL.search(text)
    if match is None:
        return ""
    before = re.split(r"[.!?\n]", text[max(0, match.start() - 200) : match.start()])[-1]
    after = re.split(r"[.!?\n]", text[match.end() : match.end() + 200])[0]
    return _sentence(f"{before}{match[0]}{after}")[:300]


# ---------------------------------------------------------------------------------------------- JSON


def _json_values(text: str) -> tuple[list[Any], str]:
    """The objects in the text, and lists that hold objects or texts, lower-cased keys; and the text without them."""
    decoder = json.JSONDecoder()
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
        return {" ".join(str(key).replace("_", " ").lower().split())[:200]: entry for key, entry in value.items()}
    return value


def _json_ranking(value: Any, depth: int = 0) -> list[Entry]:
    if isinstance(value, list):
        return _list_entries(value, ordered=True)
    if not isinstance(value, dict) or depth > _DEEPEST:
        return []
    facts = _lowered(value)
    for key in _RANKING_KEYS:
        if key in facts and (entries := _entries_of(facts[key], key)):
            return entries
    if entries := _mapping_entries(facts, ""):
        return entries
    for entry in list(facts.values())[:50]:
        if isinstance(entry, dict) and (entries := _json_ranking(entry, depth + 1)):
            return entries
    return []


def _entries_of(value: Any, key: str) -> list[Entry]:
    if isinstance(value, str):
        numbers = _text_ranking(value) or _series(value)
        return [] if key in _SCORE_KEYS else [(number, "") for number in numbers]
    if isinstance(value, list):
        if key in _SCORE_KEYS and not any(isinstance(entry, dict) for entry in value):
            return []  # which score is whose is not said
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
            number = next((said for key in _ID_KEYS if (said := _candidate(facts.get(key)))), "")
            if number:
                reason = next((_sentence(facts[key]) for key in _REASONS if isinstance(facts.get(key), str)), "")
                plain.append((number, reason))
                place = _place(facts)
                if place is not None:
                    places.append((place, (number, reason)))
        elif number := _candidate(entry):
            plain.append((number, ""))
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
    if all(isinstance(value, str) and _CANDIDATE.match(value.strip()) for value in values):
        by_rank = sorted(zip(numbers, values, strict=True), key=lambda item: int(item[0]))
        return [(_candidate(value), "") for _, value in by_rank]
    if not all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        return []
    places_said = sorted(values) == list(range(1, len(values) + 1))
    if places_said and key not in _SCORE_KEYS:  # ranks, or a few small scores?
        named = all(_CANDIDATE.match(name) for name, _ in items)
        if not named or key not in ("ranking", "rank", "order", "rankings"):
            return []
        return [(number, "") for _, number in sorted(zip(values, numbers, strict=True))]
    if key not in ("", *_SCORE_KEYS) and all(isinstance(value, int) for value in values):
        return []
    best_first = sorted(zip(values, numbers, strict=True), key=lambda item: -item[0])
    return [(number, "") for _, number in best_first]


def _place(facts: Mapping[str, Any]) -> float | None:
    """Where an object belongs, less is better: its rank, or else its score."""
    for keys, sign in ((_RANKS, 1.0), (_SCORES, -1.0)):
        for key in keys:
            number = _quantity(facts.get(key))
            if number is not None:
                return sign * number
    return None


def _quantity(value: Any) -> float | None:
    if isinstance(value, bool) or value is None:
        return None
    if isinstance(value, int | float):
        return float(value) if abs(value) < 1e12 else None
    match = re.match(r"\s*#?(-?\d{1,9}(?:\.\d{1,9})?)", value) if isinstance(value, str) else None
    return float(match[1]) if match else None


def _candidate(value: Any) -> str:
    """The number that a JSON value names as a candidate; "" if it names none."""
    if isinstance(value, bool) or value is None:
        return ""
    if isinstance(value, int | float):
        return _whole(value)
    if isinstance(value, str) and len(value) <= 2_000:
        text = value.replace("_", " ").strip()
        match = _CANDIDATE.match(text)
        if match:
            return _plain(match[1])
        if _ONLY_ITEM.fullmatch(text) or _STRANGE.fullmatch(text):
            return next(iter(_strange_numbers(text)), "")
    return ""


def _whole(value: int | float) -> str:
    whole = isinstance(value, int) or value.is_integer()
    return str(int(value)) if whole and abs(value) < 1e12 else "a number"


# ---------------------------------------------------------------------------------------------- text


def _text_ranking(text: str) -> tuple[str, ...]:
    """The numbers of the first form that the text has."""
    text = re.sub(r"[*`~]+", "", text).replace("_", " ")
    lines = text.splitlines()[:_MOST_LINES]
    return (
        _chain(text)
        or _table(lines)
        or _labelled(lines)
        or _last_list(text)
        or _places(lines)
        or _bare(lines)
        or _scored(lines)
        or _prose(text)
    )


def _chain(text: str) -> tuple[str, ...]:
    """The longest of `[3] > [1] > [2]`; of two numbers only where brackets, names or a line of its own prove it."""
    best: tuple[str, ...] = ()
    for pattern in (_CHAIN, _CHAIN_UP):
        for match in pattern.finditer(text):
            items = re.findall(_ANY_ITEM, match[0], re.IGNORECASE)
            numbers = tuple(_plain(number[0]) for item in items if (number := _NUMBER.search(item)))
            marked = all(re.search(r"[#\[a-z]", item, re.IGNORECASE) for item in items)
            before = text[text.rfind("\n", 0, match.start()) + 1 : match.start()].strip()
            after = text[match.end() :].split("\n", 1)[0].strip()
            alone = (not before or before[-1] in ":\"'") and after in ("", ".", '"', "'")
            if (len(numbers) > 2 or marked or alone) and len(numbers) >= len(best):
                best = numbers if pattern is _CHAIN else numbers[::-1]
    return best


def _table(lines: Sequence[str]) -> tuple[str, ...]:
    """A table with a column of candidates and one of ranks or scores."""
    rows = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in lines if line.count("|") >= 2]
    if len(rows) < 2:
        return ()
    header = [cell.lower() for cell in rows[0]]

    def column(pattern: str) -> int | None:
        return next((i for i, cell in enumerate(header) if re.search(pattern, cell)), None)

    who = column(r"image|picture|photo|candidate|item|option|product|\bid\b|index|number")
    rank = column(r"rank|place|position|^#$")
    score = column(r"score|relevance|rating|match|fit|probab|confid")
    if who is None or (rank is None and score is None):
        return ()
    placed: list[tuple[float, str]] = []
    by, sign = (rank, 1.0) if rank is not None else (score, -1.0)
    for cells in rows[1:]:
        if by is not None and max(who, by) < len(cells):
            number, value = _candidate(cells[who]), _quantity(cells[by])
            if number and value is not None:
                placed.append((sign * value, number))
    return tuple(number for _, number in sorted(placed, key=lambda item: item[0]))


def _labelled(lines: Sequence[str]) -> tuple[str, ...]:
    """`Ranking: 3, 1, 2`; the last such line, and one number alone after "best", "answer" and their like."""
    for line in reversed(lines):
        label = _LABEL.match(line[:400])
        if label is None or (_NO_RANKING.search(label["label"]) and not _WORST_FIRST.search(label["label"])):
            continue
        numbers = _series(line[label.end() :])
        one = label["word"].lower() in ("best", "answer", "top", "winner")
        if len(numbers) > 1 or (one and numbers):
            return numbers[::-1] if _WORST_FIRST.search(label["label"]) else numbers
    return ()


def _series(line: str) -> tuple[str, ...]:
    """The numbers of a line that is nothing but a series of candidates."""
    if len(line) > LONGEST_ANSWER or not _SERIES_LINE.fullmatch(line):
        return ()
    return tuple(_plain(number) for number in _NUMBER.findall(line)[:MOST_NUMBERS])


def _last_list(text: str) -> tuple[str, ...]:
    """The last list in brackets that holds several numbers and nothing else, or one that is the whole text."""
    for match in reversed(list(_LIST.finditer(text))[-200:]):
        inside = match[1]
        cells = inside.split(",", MOST_NUMBERS) if "," in inside else inside.split(maxsplit=MOST_NUMBERS)
        if not all(_STRANGE.fullmatch(cell.strip()) or _ONLY_ITEM.fullmatch(cell[:60]) for cell in cells):
            continue
        numbers = _strange_numbers(inside)
        if len(numbers) > 1 or (numbers and text.strip() == match[0]):
            return numbers
    return ()


def _places(lines: Sequence[str]) -> tuple[str, ...]:
    """`1. Image 4`, `2nd: [1]`, `- 3`: a line for each candidate, which is named, or is all that the line says."""
    placed: list[tuple[float, str]] = []
    ranked = True
    for line in lines:
        place = _PLACE.match(line[:400])
        if place is None:
            continue
        said = line[place.end() :].strip()
        match = _CANDIDATE.match(said)
        number = _plain(match[1]) if match else ""
        if not number and len(said) < 40 and _ONLY_ITEM.fullmatch(said):
            number = next(iter(_strange_numbers(said)), "")
        if not number:
            continue
        if place["number"] or place["word"]:
            rank = int(place["number"]) if place["number"] else _ORDINALS.index(place["word"].lower()) + 1
        else:
            rank, ranked = 0, False
        placed.append((rank, number))
    if ranked:
        placed.sort(key=lambda item: item[0])
    return tuple(number for _, number in placed) if ranked or len(placed) > 1 else ()


def _bare(lines: Sequence[str]) -> tuple[str, ...]:
    """The longest line that is nothing but a series; or several lines that are one candidate each."""
    series = [numbers for line in lines if len(numbers := _series(line)) > 1]
    if series:
        return max(reversed(series), key=len)
    single = [numbers[0] for line in lines if line.strip() and len(numbers := _series(line)) == 1]
    return tuple(single) if len(single) > 1 else ()


def _scored(lines: Sequence[str]) -> tuple[str, ...]:
    """`Image 2: 0.9`, `Image 1: 7/10`: lines of candidates and scores; whole numbers alone might be ranks."""
    placed: list[tuple[float, str]] = []
    for line in lines:
        match = _SCORED.fullmatch(line[:200])
        if match is None:
            continue
        if not (match["of"] or match["said"] or "." in match["score"]):
            return ()
        number = _NUMBER.search(match["item"])
        if number:
            placed.append((-float(match["score"]), _plain(number[0])))
    return tuple(number for _, number in sorted(placed, key=lambda item: item[0])) if len(placed) > 1 else ()


def _prose(text: str) -> tuple[str, ...]:
    """`Image 3 is best, then 1 and last 2`: from the word that says "best" on, for as long as the series goes on."""
    items = [
        match
        for match in re.finditer(_ANY_ITEM, text, re.IGNORECASE)
        if not _PLURAL.match(text, match.end()) or match[0][:1].isalpha()
    ][:MOST_NUMBERS]
    for k, first in enumerate(items[:200]):
        before = text[max(0, first.start() - 40) : first.start()]
        before = re.split(r"[.!?\n](?!\d)", before)[-1]
        after = re.split(r"[.!?\n\d]", text[first.end() : first.end() + 40])[0]
        if not _BEST.search(before) and not _BEST.search(after):
            continue
        if re.search(r"\b(?:not|no|none|neither|nor|which)\b|n't", f"{before} {after}", re.IGNORECASE):
            continue
        numbers = [first]
        for item in items[k + 1 :]:
            gap = text[numbers[-1].end() : item.start()]
            if len(gap) > 80 or not _NEXT.fullmatch(gap) or not _SEQUEL.search(gap):
                break
            numbers.append(item)
        found = (_NUMBER.search(item[0]) for item in numbers)
        return tuple(_plain(number[0]) for number in found if number)
    return ()


def _strange_numbers(text: str) -> tuple[str, ...]:
    """All numbers of a list; negative and decimal ones too, which are nobody's label."""
    return tuple(_plain(number) for number in _STRANGE.findall(text)[:MOST_NUMBERS])


def _plain(number: str) -> str:
    """The same number as anyone would write it: 07 is 7."""
    return str(int(number)) if number.isdecimal() else number


def _sentence(value: Any) -> str:
    return one_line(value, LONGEST_SENTENCE) if isinstance(value, str) else ""


def _some(numbers: Sequence[str]) -> str:
    return ", ".join(numbers[:_NAMED]) + (f" and {len(numbers) - _NAMED} more" if len(numbers) > _NAMED else "")
