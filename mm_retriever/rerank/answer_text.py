"""Rankings in the plain text of a model's answer: chains, tables, labelled lines, lists, places, scores, prose.

A number counts only where the form proves that it names a candidate: beside a rank or a score, in a list that is said
to be the ranking, after the word "Image". A price, a year, a number of images or a line number is no candidate.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from mm_retriever.rerank.answer_prose import ordinals, prose
from mm_retriever.rerank.answer_words import (
    ANY_ITEM,
    DIGITS,
    LAST,
    MOST_NUMBERS,
    NO_RANKING,
    NOUN,
    NUMBER,
    ORDINALS,
    RANKING_WORD,
    REST,
    SEQUEL,
    WORST_FIRST,
    from_the_first,
    has_ends,
    is_turned_round,
    plain,
    plain_number,
    rank_of,
)

LONGEST_ANSWER = 40_000  # characters that are read: half from the beginning, half from the end
_MOST_LINES = 2_000

_STRANGE = re.compile(r"(?<!\w)-?\d{1,12}(?:\.\d{1,12})?(?!\w)")
_ONLY_ITEM = re.compile(rf"\s*{ANY_ITEM}\s*[.:,;]?\s*", re.IGNORECASE)
_CANDIDATE = re.compile(rf"(?:{NOUN}[ \t]{{0,2}}[#№(\[]{{0,2}}|[#№\[])({DIGITS})", re.IGNORECASE)

_TIE = rf"(?:={{1,2}}|[~≈≃≅])(?=\s{{0,4}}(?:[#№(\[]|{NOUN}))"  # not before a bare number, which would be a score
_ABOVE = r"(?:>{1,3}=?|≥|≻|»|[-=]>|→|⇒|➔|➜)"
_ARROW = re.compile(r"[-=]>|[→⇒➔➜]")
_CHAIN = re.compile(rf"{ANY_ITEM}(?:\s{{0,4}}(?:{_ABOVE}|{_TIE})\s{{0,4}}{ANY_ITEM})+", re.IGNORECASE)
_CHAIN_UP = re.compile(rf"{ANY_ITEM}(?:\s{{0,4}}(?:<{{1,3}}|≺|&lt;|{_TIE})\s{{0,4}}{ANY_ITEM})+", re.IGNORECASE)
_ONLY_TIES = re.compile(r"[^<>≥≻≺»→⇒➔➜&]*")
_LINK = re.compile(rf"{_ABOVE}|{_TIE}", re.IGNORECASE)
_GOES_ON = re.compile(
    r"(?!\W{0,3}(?:because|since|as|so|and|while|where)\b)(?:\([^()\n]{0,80}\)|[^(,.;:!?\n<>]){0,80}"
    r"[<>≥≻≺»→⇒➔➜][ \t]*\S"
)  # after a chain that stops at words
_CAME_BEFORE = re.compile(r"[^\s<>][ \t]{0,4}(?:[<>≥≻≺»→⇒➔➜]|&[lg]t;)[^,.;:!?\n<>]{0,80}$")
_SAID = re.compile(r"[ \t]{0,3}\((?![^()]{0,80}(?:rank|place|\dst|\dnd|\drd|\dth))[^()]{1,80}\)", re.IGNORECASE)
_REMARK = re.compile(r"[ \t]*\([^()\d]{0,80}\)[ \t.]*$")  # on a whole line
_SERIES = (
    rf"{ANY_ITEM}(?:(?:[ \t]{{0,3}}[,;|/][ \t]{{0,3}}(?:(?:and|then|finally|last)[ \t]){{0,2}}"
    rf"|[ \t]{{1,4}}(?:(?:and|then|finally)[ \t]){{0,2}}){ANY_ITEM})*"
)
_SERIES_LINE = re.compile(rf"[ \t]*[\[(]?{_SERIES}[\])]?[ \t]*\.?[ \t]*", re.IGNORECASE)
_LABEL = re.compile(
    rf"(?P<label>[^:=\n]{{0,80}}?(?P<word>{RANKING_WORD})"
    r"[^:=\n]{0,60}?)(?:[:=]|\b(?:is|are|would be)\b\s{0,2}[:=]?)",
    re.IGNORECASE,
)
_SENTENCE = re.compile(  # "I would rank them 3, 1, 2."; "Images 3, 1 and 2, in that order."
    rf"(?:[^\d\n]{{0,80}}\b(?:rank|order|sort)(?:ed|ing)?(?:[ \t](?!not\b)[a-z]{{1,12}}){{0,5}}[:,]?[ \t]{{1,3}}"
    rf"(?P<series>{_SERIES})[ \t.]*"
    rf"|(?P<before>[^\d\n]{{0,60}}?)(?P<ordered>{_SERIES}),?[ \t]{{1,3}}in (?:that|this) order[ \t.]*"
    rf"|(?P<sorted>{_SERIES}),?[ \t]{{1,3}}in (?:descending )?order of [a-z ]{{1,30}}[ \t.]*)",
    re.IGNORECASE,
)
_DASHED = re.compile(r"[ \t]*\d{1,2}(?:[ \t]?[-–—][ \t]?\d{1,2}){2,98}[ \t.]*")
_BEGINS = re.compile(
    rf"[ \t]*(?P<series>{_SERIES})[ \t]{{0,3}}"
    r"(?:\.[ \t]+[^\W\d]|[,;]?[ \t]*\b(?:because|since|as|in (?:that|this) order)\b)",
    re.IGNORECASE,
)
_LIST = re.compile(r"\[([^\[\]{}]{1,20000})\]")
_PLACE = re.compile(
    r"(?P<indent>[ \t]*)(?:(?:rank|place|position)?[ \t]{0,2}#?(?P<number>\d{1,3})"
    r"(?:(?:st|nd|rd|th)?(?:[ \t]place)?[ \t]{0,2}(?:[.):]|-(?![\d>]))"
    r"|(?:st|nd|rd|th)(?:[ \t]place)?[ \t]{0,2}(?:→|->))"
    rf"|(?:rank|place|position|number)?[ \t]{{0,2}}#?(?P<marked>\d{{1,3}})[ \t]?:?"
    rf"(?=[ \t]{{1,3}}{NOUN}[ \t]{{0,2}}[#№(\[]?\d)"
    rf"|(?P<word>best|top|winner|runner-up|most [a-z]{{1,15}}|least [a-z]{{1,15}}|{'|'.join(ORDINALS)}|last|worst)"
    r"(?:[ \t](?:place|best|choice|match|pick|fit|goes to))?[ \t]{0,2}(?:[:.)→]|->|-(?!\d))"
    rf"|[-•+]|(?P<letter>[a-z]{{1,4}})[.)](?=[ \t]{{1,3}}{NOUN}))[ \t]{{0,9}}",
    re.IGNORECASE,
)
_NAMED = rf"(?:{NOUN}[ \t]{{0,2}}[#№(\[]{{0,2}}|[#\[]){DIGITS}[\])]{{0,3}}"
_PLACED = re.compile(  # several places on one line
    r"(?<![\w.])[(#]?(?P<place>\d{1,2})"
    rf"(?:[.)]|(?:st|nd|rd|th)[.):]?|:(?=[ \t]{{0,3}}(?:{NOUN}|[#\[])))[ \t]{{0,3}}"
    rf"(?P<item>{_NAMED}|{ANY_ITEM}(?=[ \t]{{0,3}}(?:$|[,;.(:\-–]|[(#]?\d{{1,2}}[.):])))",
    re.IGNORECASE,
)
_NAMED_LAST = re.compile(rf"(?:\[|\([ \t]?{NOUN}[ \t]{{0,2}}|\()[#№]?({DIGITS})[)\]]{{1,2}}[ \t.]*$", re.IGNORECASE)
_NTH = re.compile(rf"(?:the[ \t])?(\d{{1,3}})(?:st|nd|rd|th)[ \t]{NOUN}", re.IGNORECASE)
_BARE_REMARK = re.compile(rf"({DIGITS})[)\]]?[ \t]*(?:\([^()]{{0,300}}\)?|[-–—:][ \t]+[^\d]{{0,400}})[ \t.]*")
_ONLY_DIGITS = re.compile(rf"({DIGITS})")
_SCORED = re.compile(
    rf"\W{{0,5}}(?P<item>{ANY_ITEM})[ \t]{{0,3}}[:=|\-–—(][ \t]{{0,3}}"
    r"(?P<named>(?:score|relevance|rating|similarity)[^\d\n]{0,9})?"
    r"(?P<score>\d{1,6}(?:\.\d{1,12})?)[ \t]{0,2}(?P<of>/[ \t]{0,2}\d{1,4}|%)?"
    r"(?:[^\w\n]{0,5}|[ \t]*[,;:–—-][ \t].{0,400})",
    re.IGNORECASE,
)
_NEXT_SCORE = re.compile(rf"\n|[,;][ \t]{{1,3}}(?={ANY_ITEM}[ \t]{{0,3}}[:=(])", re.IGNORECASE)
_LETTERS_OF = re.compile(rf"^[^:]{{0,40}}{RANKING_WORD}[^:]{{0,20}}:|[>,→]", re.IGNORECASE)


def text_ranking(text: str) -> tuple[str, ...]:
    """The numbers of the first form that the text has."""
    text = plain(text)
    lines = text.splitlines()[:_MOST_LINES]
    labelled = _placed(lines) or _labelled(lines)  # a label says its own direction
    if (numbers := _chain(text) or _table(lines)) or labelled:
        return numbers or labelled
    listed = _last_list(text) or (() if _is_as_shown(places := _places(lines)) else places)
    if listed and REST not in listed and is_turned_round(text):
        return listed[::-1]
    return (
        listed
        or _bare(lines)
        or _scored(_NEXT_SCORE.split(text)[:_MOST_LINES])
        or _labelled(lines, alone=True)
        or ordinals(text)
        or prose(text)
        or places
        or _single(text)
        or next((numbers for line in reversed(lines) if (numbers := lettered(_LETTERS_OF.split(line)))), ())
    )


def _is_as_shown(numbers: Sequence[str]) -> bool:
    """Whether this is the order in which the candidates were shown: often a list that says what each of them is."""
    return len(numbers) > 1 and list(numbers) == [str(number) for number in range(1, len(numbers) + 1)]


def _chain(text: str) -> tuple[str, ...]:
    """The longest of `[3] > [1] > [2]`; of two numbers only where brackets, names or a line of its own prove it.

    A chain that goes on with words is one only where every link names its candidate: `[3] red > [1] blue`.
    """
    best: tuple[str, ...] = ()
    pairs = set()
    for pattern in (_CHAIN, _CHAIN_UP):
        for match in pattern.finditer(text):
            if _ONLY_TIES.fullmatch(match[0]):
                continue
            items = re.findall(ANY_ITEM, match[0], re.IGNORECASE)
            numbers = tuple(plain_number(number[0]) for item in items if (number := NUMBER.search(item)))
            marked = all(re.search(r"[#\[a-z]", item, re.IGNORECASE) for item in items)
            before = text[text.rfind("\n", 0, match.start()) + 1 : match.start()].strip()
            after = text[match.end() :].split("\n", 1)[0].strip()
            if _GOES_ON.match(after) or _CAME_BEFORE.search(before):
                continue  # a part of a chain would put what it lacks last
            alone = (not before or before[-1] in ":\"'") and after in ("", ".", '"', "'")
            if is_turned_round(text):
                if not _ARROW.search(match[0]):
                    continue  # contradicts itself
                numbers = numbers[::-1]
            if len(numbers) == 2 and (marked or alone):
                pairs.add(numbers)
            if (len(numbers) > 2 or marked or alone) and len(numbers) >= len(best):
                best = numbers if pattern is _CHAIN else numbers[::-1]
    if len(best) == 2 and len(pairs) > 1:  # comparisons of two at a time, or a place beside each number
        best = ()
    return best or _linked(text)


def _linked(text: str) -> tuple[str, ...]:
    """A line whose links each name one candidate, among other words; the last such line."""
    for line in reversed(text.splitlines()[:_MOST_LINES]):
        links = _LINK.split(line[:4_000])
        named = [_CANDIDATE.findall(link[-400:]) for link in links] if len(links) > 2 else []
        if named and all(len(numbers) == 1 for numbers in named):
            return tuple(plain_number(numbers[0]) for numbers in named)
        bare = [_BARE_REMARK.fullmatch(link.strip()) or _ONLY_DIGITS.fullmatch(link.strip()) for link in links]
        if len(links) > 2 and all(bare):
            return tuple(plain_number(match[1]) for match in bare if match)
    return ()


def _table(lines: Sequence[str]) -> tuple[str, ...]:
    """A table with a column of candidates and one of ranks or scores: of Markdown, tabs, commas or blanks."""
    for sign in (r"\|", r"\t", ",", ";", " {2,}"):
        rows = [[cell.strip() for cell in re.split(sign, line.strip().strip("|")[:2_000])] for line in lines]
        for place, header in enumerate(rows):
            strict = sign != r"\|"  # what is no sign of a table has to look like one
            if numbers := _turned_columns(rows[place : place + 6]):
                return numbers
            if len(header) < 2 or (strict and not all(re.fullmatch(r"[A-Za-z#. ]{1,24}", cell) for cell in header)):
                continue
            same = [cells for cells in rows[place + 1 :] if len(cells) == len(header) or not strict]
            if (numbers := _columns(header, same)) and (len(numbers) > 1 or not strict):
                return numbers
    return ()


def _turned_columns(rows: Sequence[Sequence[str]]) -> tuple[str, ...]:
    """The candidates of a table that lies on its side: a row of candidates, and one of ranks or scores below it."""
    header = rows[0]
    if (
        len(header) < 3
        or not re.fullmatch(r"[A-Za-z# ]{0,24}", header[0])
        or not all(map(candidate_number, header[1:]))
    ):
        return ()
    names, *columns = zip(*(cells for cells in rows if len(cells) == len(header)), strict=True)
    return _columns(names if names[0] else ("image", *names[1:]), columns)


def _columns(header: Sequence[str], rows: Sequence[Sequence[str]]) -> tuple[str, ...]:
    """The candidates of a table by its ranks, or else its scores."""
    names = [cell.lower() for cell in header]

    def column(pattern: str) -> int | None:
        return next((i for i, cell in enumerate(names) if re.search(pattern, cell)), None)

    who = column(r"image|picture|photo|candidate|item|option|product|\bid\b|index|number")
    rank = column(r"rank|place|position|^#$")
    score = column(r"score|relevance|rating|match|fit|probab|confid")
    by, sign = (rank, 1.0) if rank is not None else (score, -1.0)
    if who is None or by is None or who == by:
        return ()
    placed: list[tuple[float, str]] = []
    for cells in rows:
        if max(who, by) < len(cells):
            number, value = candidate_number(cells[who]), quantity(cells[by])
            if number and value is not None:
                placed.append((sign * value, number))
    return tuple(number for _, number in sorted(placed, key=lambda item: item[0]))


def _placed(lines: Sequence[str]) -> tuple[str, ...]:
    """`1. Image 3, 2. Image 1` or `1) 3 2) 1`: a line with every place from the first on; the last such line."""
    for line in reversed(lines):
        matches = list(_PLACED.finditer(line[:4_000]))
        if len(matches) > 1 and [int(match["place"]) for match in matches] == list(range(1, len(matches) + 1)):
            return tuple(plain_number(number[0]) for match in matches if (number := NUMBER.search(match["item"])))
    return ()


def _labelled(lines: Sequence[str], *, alone: bool = False) -> tuple[str, ...]:
    """`Ranking: 3, 1, 2`; the last such line. `alone`: one number after "best", "answer" and their like."""
    for line in reversed(lines):
        label = _LABEL.match(line[:400])
        if label is None or (NO_RANKING.search(label["label"]) and not has_ends(label["label"])):
            continue
        rest = line[label.end() :]
        begins = _BEGINS.match(rest[:LONGEST_ANSWER])  # "3, 1, 2, because 3 is red"
        numbers = (
            series(rest)
            or series(_SAID.sub("", rest[:LONGEST_ANSWER]))  # "4 (0.9), 2 (0.7)"
            or (series(begins["series"]) if begins else ())
        )
        is_single = label["word"].lower() in ("best", "answer", "top", "winner") and not SEQUEL.search(label["label"])
        if len(numbers) > 1 or (alone and is_single and numbers):
            return numbers[::-1] if WORST_FIRST.search(line) else numbers
    return ()


def series(line: str) -> tuple[str, ...]:
    """The numbers of a line that is nothing but a series of candidates."""
    if len(line) > LONGEST_ANSWER:
        return ()
    if _DASHED.fullmatch(line):
        numbers = re.findall(r"\d+", line)
        return tuple(numbers) if len({*numbers}) == len(numbers) and not any(n[0] == "0" for n in numbers) else ()
    if not _SERIES_LINE.fullmatch(line):
        return ()
    return tuple(plain_number(number) for number in NUMBER.findall(line)[:MOST_NUMBERS])


def _last_list(text: str) -> tuple[str, ...]:
    """The last list in brackets that holds several numbers and nothing else, or one that is the whole text."""
    for match in reversed(list(_LIST.finditer(text))[-200:]):
        inside = match[1]
        inside = inside.strip().removesuffix(",")
        cells = re.split("[,;]", inside, maxsplit=MOST_NUMBERS) if re.search("[,;]", inside) else inside.split()
        if not all(_STRANGE.fullmatch(cell.strip()) or _ONLY_ITEM.fullmatch(cell[:60]) for cell in cells):
            continue
        numbers = all_numbers(inside)
        if len(numbers) > 1 or (numbers and text.strip() == match[0]):
            return numbers
    return ()


def _places(lines: Sequence[str]) -> tuple[str, ...]:
    """`1. Image 4`, `2nd: [1]`, `- 3`: a line for each candidate, which is named, or is all that the line says.

    Of several lists with numbers the last; none of whose first place nothing is known.
    """
    lists: list[dict[int, str]] = [{}]
    loose: list[str] = []  # without places
    after: list[str] = []  # those after the last place
    for line in lines:
        place = _PLACE.match(line[:400])
        number = listed_number(line[place.end() :].strip()) if place else ""
        if place is None or not number:
            continue
        given = place["number"] or place["marked"]
        if not given and not place["word"]:
            if not place["indent"]:  # what is indented speaks of the candidate above it
                loose.append(number)
                after.append(number)
            continue
        word = (place["word"] or "").lower()
        rank = int(given) if given else 2 if word == "runner-up" else 1 if word == "top" else rank_of(word) or LAST
        if rank in lists[-1]:
            lists.append({})
        lists[-1][rank] = number
        after = []
    for number in after:
        if lists[-1] and LAST not in lists[-1] and number not in lists[-1].values():
            lists[-1][max(lists[-1]) + 1] = number
    best = from_the_first(max(reversed(lists), key=len))
    if len(loose) > 1 and (len(best) < 2 or _is_as_shown(best)):
        return tuple(loose)
    return best


def listed_number(rest: str) -> str:
    """The candidate that the line of a place names; "" where it names none."""
    if match := _CANDIDATE.match(rest) or _NAMED_LAST.search(rest[-40:]):
        return plain_number(match[1])
    if match := _NTH.match(rest):
        return plain_number(match[1])
    if len(rest) < 40 and _ONLY_ITEM.fullmatch(rest):
        return next(iter(all_numbers(rest)), "")
    match = _BARE_REMARK.fullmatch(rest)
    return plain_number(match[1]) if match else ""


def _bare(lines: Sequence[str]) -> tuple[str, ...]:
    """The longest line that is nothing but a series; or several lines that are one candidate each."""
    runs: list[tuple[str, ...]] = []
    text = "\n".join(lines)
    for line in lines:
        remark = _REMARK.search(line[-100:])
        said = remark[0] if remark and not series(line) else ""
        numbers = series(line.removesuffix(said))
        if not numbers and (match := _SENTENCE.fullmatch(line[:4_000])) and not NO_RANKING.search(line):
            numbers = series(match["series"] or match["ordered"] or match["sorted"])
        if len(numbers) > 1:
            backwards = WORST_FIRST.search(said) or is_turned_round(text)
            runs.append(numbers[::-1] if backwards else numbers)
    if runs:
        best = max(reversed(runs), key=len)
        return () if len(best) == 2 and len(set(runs)) > 1 else best  # two columns of something
    single = [numbers[0] for line in lines if line.strip() and len(numbers := series(line)) == 1]
    if len(single) > 1 and is_turned_round(text):
        single.reverse()
    return tuple(single) if len(single) > 1 else ()


def lettered(items: Sequence[str]) -> tuple[str, ...]:
    """The numbers of candidates that an answer calls A, B, C, ..., each of them once."""
    letters = [letter for item in items[:28] if (letter := item.strip(" .[]()"))]
    if len(letters) < 2 or sorted(letters) != [chr(ord("A") + k) for k in range(len(letters))]:
        return ()
    return tuple(str(ord(letter) - ord("A") + 1) for letter in letters)


def _single(text: str) -> tuple[str, ...]:
    """The one candidate that the whole text names."""
    match = _CANDIDATE.match(text.strip()[:60])
    return (plain_number(match[1]),) if match and _ONLY_ITEM.fullmatch(text.strip()[:60]) else ()


def _scored(lines: Sequence[str]) -> tuple[str, ...]:
    """`Image 2: 0.9`, `Image 1: 7/10`: lines of candidates and scores; whole numbers alone might be ranks."""
    placed: list[tuple[float, str]] = []
    for line in lines:
        match = _SCORED.fullmatch(line[:200])
        if match is None:
            continue
        if not (match["of"] or match["named"] or "." in match["score"]):
            return ()
        number = NUMBER.search(match["item"])
        if number:
            placed.append((-float(match["score"]), plain_number(number[0])))
    return tuple(number for _, number in sorted(placed, key=lambda item: item[0])) if len(placed) > 1 else ()


def all_numbers(text: str) -> tuple[str, ...]:
    """All numbers of a list; negative and decimal ones too, which are no label."""
    return tuple(plain_number(number) for number in _STRANGE.findall(text)[:MOST_NUMBERS])


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
