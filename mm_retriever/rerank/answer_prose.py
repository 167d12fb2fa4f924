"""Rankings in sentences: `Image 3 is best, then 1 and last 2`, `Second place goes to Image 1`."""

from __future__ import annotations

import re

from mm_retriever.rerank.answer_words import (
    ANY_ITEM,
    DIGITS,
    MOST_NUMBERS,
    NOUN,
    NUMBER,
    ORDINALS,
    SEQUEL,
    from_the_first,
    has_ends,
    plain_number,
    rank_of,
)

_BEST = re.compile(
    r"\b(?:best|top(?![ \t]*(?:\d|$))|closest|winner|winning|most \w+"
    r"|(?:is|comes|ranks) first(?=[ \t]*(?:$|[,;.)]|and\b))"
    r"|first(?=[ \t](?:place|choice|pick|match|is(?! better)|comes|goes)\b|[:,]))\b",
    re.IGNORECASE,
)
_FIT = re.compile(r"[ \t]*(?:are|fit|match)\b")
_BEST_OVERALL = re.compile(r"^[ \t]*(?:is|are|fits|matches)(?: the)? best\b", re.IGNORECASE)
_NEXT = re.compile(
    r"[\s,;:.>()\[\]#\"'-]*(?:(?:and|is|was|are|by|the|best|image|picture|photo|candidate|option|item|number|place|comes|"
    r"then|followed|next|after|that|last|lastly|finally|second|secondly|third|fourth|fifth|sixth|seventh|eighth|ninth|"
    r"tenth|worst|match|fit|one|fits|matches|well|a|close)\b[\s,;:.>()\[\]#\"'-]*)*",
    re.IGNORECASE,
)
_NTH_PLACE = (
    rf"(?:\d{{1,2}}(?:st|nd|rd|th)|{'|'.join(ORDINALS)}|best|last|worst)(?:[ \t](?:place|best|choice|match|pick))?"
)
_AT_PLACE = re.compile(
    rf"{NOUN}[ \t]{{0,2}}[#\[(]?(?P<item>{DIGITS})[\])]?[ \t]{{0,2}}(?:[:(→-][ \t]{{0,2}})?"
    r"(?:(?:is|comes|ranks|takes|gets|fits|clearly|in|at|the)[ \t]){0,4}"
    rf"(?P<after>{_NTH_PLACE})\b(?=[ \t]*(?:[.,;)\n]|and\b|$))"
    rf"|\b(?P<before>{_NTH_PLACE})[ \t]{{0,2}}(?:(?:goes to|is|would be|→|:|-)[ \t]{{1,2}})(?:the[ \t])?"
    rf"{NOUN}[ \t]{{0,2}}[#\[(]?(?P<named>{DIGITS})",
    re.IGNORECASE,
)
_PLURAL = re.compile(r"[ \t]{0,2}(?:images|pictures|photos|candidates|options|items|products|of\b|%|/)", re.IGNORECASE)


def ordinals(text: str) -> tuple[str, ...]:
    """`Image 3 is first, image 1 second`, `Second place goes to Image 1`: places in words, from the first on."""
    places: dict[int, str] = {}
    for match in list(_AT_PLACE.finditer(text))[:MOST_NUMBERS]:
        rank = rank_of(match["after"] or match["before"])
        if rank is None or rank in places:
            return ()  # several things are first
        number = plain_number(match["item"] or match["named"])
        if number in places.values():
            return ()
        places[rank] = number
    numbers = from_the_first(places) if 1 in places else ()
    return numbers if len(numbers) > 1 else ()


def prose(text: str) -> tuple[str, ...]:
    """`Image 3 is best, then 1 and last 2`: from the word that says "best" on, for as long as the series goes on."""
    items = [
        match
        for match in re.finditer(ANY_ITEM, text, re.IGNORECASE)
        if not _PLURAL.match(text, match.end()) or match[0][:1].isalpha()
    ][:MOST_NUMBERS]
    for k, first in enumerate(items[:200]):
        before = text[max(0, first.start() - 40) : first.start()]
        before = re.split(r"[.!?\n](?!\d)", before)[-1]
        after = re.split(r"[.!?\n\d;]|,? (?:and|but|then)\b", text[first.end() : first.end() + 40])[0]
        if not _BEST.search(before) and (not _BEST.search(after) or has_ends(after) or "worst" in after):
            continue
        if re.search(r"\b(?:not|no|least|worst|none|neither|nor|which)\b|n't", f"{before} {after}", re.IGNORECASE):
            continue
        numbers = [first]
        while (
            k
            and _FIT.match(after)
            and re.fullmatch(r"[ \t]*(?:,|,? and|&)[ \t]*", text[items[k - 1].end() : numbers[0].start()])
        ):
            k -= 1  # "Images 3 and 1 fit best"
            numbers.insert(0, items[k])
        following = items[items.index(first) + 1 :]
        for item in following:
            gap = text[numbers[-1].end() : item.start()]
            goes_on = SEQUEL.search(gap) or (len(numbers) > 1 and re.fullmatch(r"[ \t]*and[ \t]*", gap))
            if len(gap) > 80 or not _NEXT.fullmatch(gap) or not goes_on:
                break
            numbers.append(item)
        if any(_BEST_OVERALL.search(text[item.end() : item.end() + 40]) for item in following if item not in numbers):
            return ()  # two are called the best
        matches = (NUMBER.search(item[0]) for item in numbers)
        return tuple(plain_number(number[0]) for number in matches if number)
    return ()
