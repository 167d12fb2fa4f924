"""The words and signs of rankings, and an answer in plain signs: what the other modules of answers look for.

Knows no form of a ranking.
"""

from __future__ import annotations

import re

_NOUNS = (
    r"images?|img|pictures?|pics?|photos?|candidates?|options?|items?|products?|passages?|documents?|docs?"
    r"|bild(?:er)?|fotos?|kandidat(?:in)?|im[aá]gen(?:es)?|candidat[oae]?|immagin[ei]|imagem|afbeelding|obraz(?:ek)?"
    r"|изображени[ея]|картинка|фото|кандидат"
)
_CJK_NOUNS = r"图片|图像|图|照片|候选|選択肢|候補|画像|写真|圖片|候選|이미지|사진|후보"
NOUN = (
    rf"(?:(?:{_NOUNS})(?:[ \t](?:number(?:ed)?|no|nr|nummer|número)\b\.?)?"
    rf"|(?:{_CJK_NOUNS})|number(?=[ \t]{{1,2}}\d)|no\.|nr\.)"
)
"""What a candidate is called before its number."""

RANKING_WORD = (
    r"(?:\b(?:rank\w{0,9}|order\w{0,9}|answer|list|results?|sorted|best|top|winner|permutation|highest|lowest|final"
    r"|first(?=[ \t]*:)"
    r"|reihenfolge|rangliste|rangfolge|rangordnung|classement|ordre|clasificación|orden|ordine|classifica|classificação"
    r"|ordem|rangschikking|порядок|рейтинг)\b|排序|排名|顺序|順序|順位|順番|ランキング|순위|순서)"
)
"""What stands before a ranking."""

DIGITS = r"(?!(?<=\d,)\d{3}(?!\d))\d{1,6}(?![\w]|\.\d|,\d{3}\b)"
ANY_ITEM = rf"(?<![\w.\-$€£])(?:{NOUN}[ \t]{{0,2}})?[#№(\[\"']{{0,3}}{DIGITS}[)\]\"']{{0,3}}"
NUMBER = re.compile(r"\d{1,6}")
SEQUEL = re.compile(
    r"\b(?:then|followed|next|after|last|lastly|finally|second|secondly|third|fourth|fifth|sixth|seventh|eighth|ninth|"
    r"tenth|worst)\b|[>,]",
    re.IGNORECASE,
)

MOST_NUMBERS = 5_000  # of one answer

ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth")
_CARDINALS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")

_LEAST = r"(?:worst|lowest|poorest|weakest|bottom|last|least(?: \w{1,15})?)"
_MOST = r"(?:best|highest|strongest|top|first|most(?: \w{1,15})?)"
WORST_FIRST = re.compile(
    rf"\b{_LEAST}(?: \w{{1,15}}){{0,2}}(?: first\b|[ \-]to[ \-]|\W{{1,5}}{_MOST}\b)"
    rf"|\b(?:start|begin)\w{{0,4}} (?:with|from|at|by) the {_LEAST}\b"
    r"|\b(?:ascending|increasing (?=order|relevance|fit|similarity|scores?|quality|match))"
    r"(?!(?: ?\w{1,15}){0,3} (?:distance|difference|ranks?|places?)\b)"
    r"|\bdecreasing(?: \w{1,15}){0,3} (?:distance|difference)\b",
    re.IGNORECASE,
)
BEST_FIRST = re.compile(
    r"\b(?:best|highest|first|top|most)\b[ \w]{0,20}[ \-](?:to|→|->|>)[ \-][ \w]{0,20}"
    r"(?:worst|lowest|bottom|last|least)"
    r"|\b(?:best|most \w{1,15})(?: \w{1,15})? first\b|\bdescending\b",
    re.IGNORECASE,
)
NO_RANKING = re.compile(
    r"\b(?:scores?|prices?|years?|sizes?|counts?|costs?|worst|least|lowest|poorest|weakest|reversed?"
    r"|schlecht\w*|aufsteigend\w*|pires?|croissant|moins|peor(?:es)?|menos|ascendente|peggior[ei]|crescente|meno|pior"
    r"|slechtst\w*|худш\w*|возрастани\w*)\b|最差|从低|從低|最悪|昇順|升序|최악|오름차순",
    re.IGNORECASE,
)
"""Words of a label whose numbers are no candidates, or in an order that nobody knows."""

_SIGNS = str.maketrans("，、；：（）［］【】＞＜｜〉›⟩", ",,;:()[][]><|>>>")
_ARROWS = re.compile(r"[➡⟶⟹►▶▸]\ufe0f?|\\(?:right|long)arrow\b|\\to\b")
_ABOVE = re.compile(r"\\(?:succ|gt)\b|&gt;")
_KEYCAP = re.compile(r"(\d)\ufe0f?\u20e3")
_STARS = re.compile(r"(?:[⭐★]\ufe0f?[ \t]?){1,10}☆{0,10}")
_MATHS = re.compile(r"\$([^$\n]{1,2000}>[^$\n]{1,2000})\$")
_BOXED = re.compile(r"\\boxed[ \t]?\{([^{}\n]{1,2000})\}")
_BRACES = re.compile(r"\{([\d \t,;]{1,2000})\}")
_TAG = re.compile(r"</?[A-Za-z][A-Za-z\d ]{0,20}>")  # <answer>, <rank1>
_HEADING = re.compile(r"^[ \t]{0,3}#{1,6}[ \t]+", re.MULTILINE)
_COUNTED = re.compile(r"第[ \t]?(\d{1,3})[ \t]?(?:张图片|张|張|枚|号|號|番|个|個)")
_PLACED = re.compile(r"^([ \t]*)第?(\d{1,3})[ \t]?(?:位|名|위)[ \t]?[:.,]?", re.MULTILINE)
_SPELLED = re.compile(rf"\b({_NOUNS})[ \t]({'|'.join(_CARDINALS)})\b", re.IGNORECASE)
_END = re.compile(
    rf"^(?P<before>[^()<>\n]{{0,60}}\d[ \t]?)\({_LEAST}[^()\d\n]{{0,30}}\)(?P<after>[ \t]*,[^<>\n]{{1,300}})$"
    rf"|^(?P<until>[^<>\n]{{1,300}},[^<>\n(]{{0,40}}\d[ \t]?)\({_MOST}[^()\d\n]{{0,30}}\)(?P<stop>[ \t.]*)$",
    re.IGNORECASE | re.MULTILINE,
)
_END_WORDS = re.compile(rf"\((?:{_LEAST}|{_MOST})(?: match| fit| one)?\)(?=[^\n]{{0,300}}<|[ \t.]*$)", re.I | re.M)
_DIRECTION = re.compile(rf"\([^()\d]{{0,40}}(?:{_LEAST}|ascending|increasing)[^()\d]{{0,40}}\)", re.IGNORECASE)
_WORDS = re.compile(r"\((?=[^()\d]{1,80}\))[^()]{1,80}\)")

_LISTED = re.compile(r"[ \t]*(?:[-•+]|[(#]?\d{1,3}(?:st|nd|rd|th)?[.):])")

LAST = 10**6
"""The place of what is said to be the last of all."""

REST = "the rest"
"""Stands in a ranking before the candidates that are said to be the last of all."""

_RANK = re.compile(
    r"(?:in |the )?(?:(?:rank|place|position|top)[ ]?#?(?P<number>\d{1,3})|(?P<nth>\d{1,3})(?:st|nd|rd|th)"
    rf"|(?P<ordinal>{'|'.join(ORDINALS)})|(?P<best>best|winner|most \w{{1,15}})|worst|last|least \w{{1,15}})"
    r"(?:[ -](?:place|best|choice|match|pick|fit|rank))?"
)


def plain(text: str) -> str:
    """Return an answer without markup, in plain signs: medals and keycaps become numbers, all arrows one."""
    text = _HEADING.sub("", text)
    text = re.sub(r"[*`]+|~{2,}", "", text).replace("_", " ").translate(_SIGNS)
    for place, medal in enumerate("🥇🥈🥉", 1):
        text = text.replace(medal, f"{place}. ")
    text = re.sub(rf"^([ \t]*)(\d)\ufe0f?\u20e3[.:)]?[ \t]+(?={NOUN}|[#\[])", r"\1\2. ", text, flags=re.I | re.M)
    text = _KEYCAP.sub(r"\1", text)
    text = _ARROWS.sub("→", _ABOVE.sub(">", text))
    text = _STARS.sub(lambda match: f"{match[0].count('⭐') + match[0].count('★')}/5", text)
    text = _BRACES.sub(r"[\1]", _MATHS.sub(r" \1 ", _BOXED.sub(r" \1 ", text)))
    text = _TAG.sub("\n", text)
    text = _PLACED.sub(r"\1\2. ", _COUNTED.sub(r"[\1]", text))
    text = _SPELLED.sub(lambda match: f"{match[1]} {_CARDINALS.index(match[2].lower()) + 1}", text)
    text = _END.sub(_worst_first, text)
    text = _END_WORDS.sub("", text)
    return _WORDS.sub(lambda match: match[0] if _DIRECTION.fullmatch(match[0]) else "", text)


def _worst_first(line: re.Match[str]) -> str:
    """A list whose first is said to be the worst, or whose last the best."""
    if line["until"]:
        return f"{line['until']}{line['stop']} (worst to best)"
    return f"{line['before']}{line['after']} (worst to best)"


def rank_of(word: str) -> int | None:
    """Return the place that a word says: "first", "2nd", "rank 3", "best"; `LAST` for "worst"; None for no place."""
    match = _RANK.fullmatch(word.strip().lower())
    if match is None:
        return None
    if number := match["number"] or match["nth"]:
        return int(number)
    return ORDINALS.index(match["ordinal"]) + 1 if match["ordinal"] else 1 if match["best"] else LAST


def from_the_first(places: dict[int, str]) -> tuple[str, ...]:
    """The candidates of the places from the first on, up to one of which nothing is known."""
    numbers: list[str] = []
    for count, rank in enumerate(sorted(places), min(1, *places, 1)):
        if rank != count and rank < LAST:
            break
        numbers += [REST, places[rank]] if rank == LAST else [places[rank]]
    return tuple(numbers)


def plain_number(number: str) -> str:
    """The same number as anyone would write it: 07 is 7."""
    return str(int(number)) if number.isdecimal() else number


def is_turned_round(text: str) -> bool:
    """Return whether a heading or remark of the text says that its ranking begins with the worst."""
    lines = [line for line in text.splitlines()[:2_000] if len(line) < 200 and not _LISTED.match(line)]
    return any(WORST_FIRST.search(line) for line in lines) and not any(BEST_FIRST.search(line) for line in lines)


def has_ends(text: str) -> bool:
    """Return whether a text says which end of a ranking is the best."""
    return WORST_FIRST.search(text) is not None or BEST_FIRST.search(text) is not None
