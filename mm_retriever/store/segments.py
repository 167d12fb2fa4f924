"""Text cut so that Milvus's standard tokenizer finds the words of any script.

That tokenizer ends a word at white space, punctuation and combining marks: a Chinese or Japanese sentence is one word
to it, and a Hindi word is several. `indexed_words` and `asked_words` cut runs of scripts without spaces into
overlapping pairs of characters, as Lucene's CJK analyzer does, and keep marks as parts of their words. Pure functions.
"""

from __future__ import annotations

import re
import unicodedata
from itertools import pairwise

_CJK = (
    "\u3005-\u3007\u3040-\u30fa\u30fc-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff"
    "\U00020000-\U0003ffff"
)
_SOUTH_EAST_ASIA = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"  # Thai, Lao, Burmese, Khmer
_UNSPACED = re.compile(f"[{_CJK}]+|[{_SOUTH_EAST_ASIA}]+")
_MARKED = re.compile(
    "[\u0900-\u109f\u1780-\u17ff]"
)  # scripts whose marks are letters: without them words fall together
_OTHER = re.compile(f"[{_CJK}{_SOUTH_EAST_ASIA}\u0900-\u0dff]")


def needs_segments(text: str) -> bool:
    """Whether the text has words that the standard tokenizer does not find."""
    return _OTHER.search(text) is not None


def indexed_words(text: str) -> str:
    """Return what to index: pairs of characters where there are no spaces, and single ones, which may be asked for."""
    return _segmented(text, singles=True)


def asked_words(text: str) -> str:
    """Return what to ask for: pairs of characters where there are no spaces, a single one where it stands alone."""
    return _segmented(text, singles=False)


def _segmented(text: str, *, singles: bool) -> str:
    if text.isascii():
        return text
    text = unicodedata.normalize("NFKC", text)
    return _without_marks(_UNSPACED.sub(lambda run: f" {_pairs(run[0], singles=singles)} ", text))


def _pairs(run: str, *, singles: bool) -> str:
    signs: list[str] = []
    for sign in run:
        if signs and unicodedata.category(sign) in ("Mn", "Mc"):
            signs[-1] += sign
        else:
            signs.append(sign)
    pairs = [first + second for first, second in pairwise(signs)]
    return " ".join([*pairs, *(signs if singles or not pairs else ())])


def _without_marks(text: str) -> str:
    """The text with marks spelled as letters, or left out where they only point at vowels (Arabic, Hebrew)."""
    if text.isascii():
        return text
    return "".join(
        sign if unicodedata.category(sign) not in ("Mn", "Mc") else f"x{ord(sign):x}" if _MARKED.match(sign) else ""
        for sign in text
    )
