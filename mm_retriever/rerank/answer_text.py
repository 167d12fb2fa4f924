"""Rankings in the plain text of a model's answer: chains, tables, labelled lines, lists, places, scores, prose.

A number counts only where the form proves that it names a candidate: beside a rank or a score, in a list that is said
to be the ranking, after the word "Image". A price, a year, a number of images or a line number is no candidate.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

LONGEST_ANSWER = 40_000  # characters that are read: half from the beginning, half from the end
MOST_NUMBERS = 5_000
_MOST_LINES = 2_000

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

_TIE = rf"={{1,2}}(?=\s{{0,4}}(?:[#№(\[]|{_NOUN}))"  # not before a bare number, which would be a score
_CHAIN = re.compile(
    rf"{_ANY_ITEM}(?:\s{{0,4}}(?:>{{1,3}}=?|≥|≻|»|[-=]>|→|&gt;|{_TIE})\s{{0,4}}{_ANY_ITEM})+", re.IGNORECASE
)
_CHAIN_UP = re.compile(rf"{_ANY_ITEM}(?:\s{{0,4}}(?:<{{1,3}}|≺|&lt;|{_TIE})\s{{0,4}}{_ANY_ITEM})+", re.IGNORECASE)
_ONLY_TIES = re.compile(r"[^<>≥≻≺»→&]*")
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

_ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth")
_PLACE = re.compile(
    r"[ \t]*(?:(?:rank|place|position)?[ \t]{0,2}#?(?P<number>\d{1,3})(?:st|nd|rd|th)?(?:[ \t]place)?[ \t]{0,2}[.):\-]"
    rf"|(?P<word>{'|'.join(_ORDINALS)})(?:[ \t]place)?[ \t]{{0,2}}[:.)\-]|[-•+])[ \t]{{0,9}}",
    re.IGNORECASE,
)
_SCORED = re.compile(
    rf"\W{{0,5}}(?P<item>{_ANY_ITEM})[ \t]{{0,3}}[:=|\-–][ \t]{{0,3}}(?P<named>score[^\d\n]{{0,9}})?"
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


def text_ranking(text: str) -> tuple[str, ...]:
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
            if _ONLY_TIES.fullmatch(match[0]):
                continue
            items = re.findall(_ANY_ITEM, match[0], re.IGNORECASE)
            numbers = tuple(plain_number(number[0]) for item in items if (number := _NUMBER.search(item)))
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
            number, value = candidate_number(cells[who]), quantity(cells[by])
            if number and value is not None:
                placed.append((sign * value, number))
    return tuple(number for _, number in sorted(placed, key=lambda item: item[0]))


def _labelled(lines: Sequence[str]) -> tuple[str, ...]:
    """`Ranking: 3, 1, 2`; the last such line, and one number alone after "best", "answer" and their like."""
    for line in reversed(lines):
        label = _LABEL.match(line[:400])
        if label is None or (_NO_RANKING.search(label["label"]) and not _WORST_FIRST.search(label["label"])):
            continue
        numbers = series(line[label.end() :])
        is_single = label["word"].lower() in ("best", "answer", "top", "winner")
        if len(numbers) > 1 or (is_single and numbers):
            return numbers[::-1] if _WORST_FIRST.search(label["label"]) else numbers
    return ()


def series(line: str) -> tuple[str, ...]:
    """The numbers of a line that is nothing but a series of candidates."""
    if len(line) > LONGEST_ANSWER or not _SERIES_LINE.fullmatch(line):
        return ()
    return tuple(plain_number(number) for number in _NUMBER.findall(line)[:MOST_NUMBERS])


def _last_list(text: str) -> tuple[str, ...]:
    """The last list in brackets that holds several numbers and nothing else, or one that is the whole text."""
    for match in reversed(list(_LIST.finditer(text))[-200:]):
        inside = match[1]
        cells = inside.split(",", MOST_NUMBERS) if "," in inside else inside.split(maxsplit=MOST_NUMBERS)
        if not all(_STRANGE.fullmatch(cell.strip()) or _ONLY_ITEM.fullmatch(cell[:60]) for cell in cells):
            continue
        numbers = all_numbers(inside)
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
        rest = line[place.end() :].strip()
        match = _CANDIDATE.match(rest)
        number = plain_number(match[1]) if match else ""
        if not number and len(rest) < 40 and _ONLY_ITEM.fullmatch(rest):
            number = next(iter(all_numbers(rest)), "")
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
    runs = [numbers for line in lines if len(numbers := series(line)) > 1]
    if runs:
        return max(reversed(runs), key=len)
    single = [numbers[0] for line in lines if line.strip() and len(numbers := series(line)) == 1]
    return tuple(single) if len(single) > 1 else ()


def _scored(lines: Sequence[str]) -> tuple[str, ...]:
    """`Image 2: 0.9`, `Image 1: 7/10`: lines of candidates and scores; whole numbers alone might be ranks."""
    placed: list[tuple[float, str]] = []
    for line in lines:
        match = _SCORED.fullmatch(line[:200])
        if match is None:
            continue
        if not (match["of"] or match["named"] or "." in match["score"]):
            return ()
        number = _NUMBER.search(match["item"])
        if number:
            placed.append((-float(match["score"]), plain_number(number[0])))
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
        matches = (_NUMBER.search(item[0]) for item in numbers)
        return tuple(plain_number(number[0]) for number in matches if number)
    return ()


def all_numbers(text: str) -> tuple[str, ...]:
    """All numbers of a list; negative and decimal ones too, which are no label."""
    return tuple(plain_number(number) for number in _STRANGE.findall(text)[:MOST_NUMBERS])


def plain_number(number: str) -> str:
    """The same number as anyone would write it: 07 is 7."""
    return str(int(number)) if number.isdecimal() else number


def candidate_number(text: str) -> str:
    """The number of the candidate that a text names; "" if it names none."""
    if len(text) > 2_000:
        return ""
    text = text.replace("_", " ").strip()
    if match := _CANDIDATE.match(text):
        return plain_number(match[1])
    if _ONLY_ITEM.fullmatch(text) or _STRANGE.fullmatch(text):
        return next(iter(all_numbers(text)), "")
    return ""


def names_candidate(text: str) -> bool:
    """Whether a text begins with a candidate that is called so: "Image 3", "[3]"."""
    return _CANDIDATE.match(text) is not None


def quantity(text: str) -> float | None:
    """The rank or score that a text begins with."""
    match = re.match(r"\s*#?(-?\d{1,9}(?:\.\d{1,9})?)", text)
    return float(match[1]) if match else None
