"""What a search answers: dataclasses that say themselves as text for a model, and as JSON for a program.

Owns what of a stored picture is shown and how long it may be. Text from the store (names, labels, sidecars, what a
model read off a picture) is a stranger's: it comes out on one line, quoted as JSON where it could be taken for ours.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mm_retriever.errors import one_line
from mm_retriever.own_keys import BOOKKEEPING_KEYS, PREFIX

NOT_SHOWN = frozenset({"file_path", *BOOKKEEPING_KEYS})
"""Metadata that says something about the machine or the index, and nothing about the picture."""


# an absolute path in quotes, which may hold spaces, and one without
_QUOTED_PATH = re.compile(r"""(?P<quote>['"])(?:/|[A-Za-z]:[/\\])[^'"]*[/\\](?P<name>[^'"/\\]*)(?P=quote)""")
_BARE_PATH = re.compile(r"""(?<![\w:/.~'"])(?:/|[A-Za-z]:\\)(?:[^\s/\\,;:)'"]+[/\\])+(?P<name>[^\s/\\,;:)'"]*)""")


@dataclass(frozen=True)
class SearchLimits:
    """Bounds of what one call takes and gives.

    Args:
        top_k: results where no number is asked for.
        max_top_k: most results; who asks for more gets as many.
        candidates: pictures that are retrieved for a reranker to choose from.
        thumbnails: most pictures in one answer; 0: none, for models that take no pictures.
        thumbnail_side: longest side of a thumbnail in pixels.
        described_side: longest side of the picture that a vision model describes.
        query_text: most characters of a text, change or question.
        value_text: most characters of one metadata value.
        long_text: most characters of a node's text, a reason or a description.
        metadata: most metadata keys of one result.
        original_bytes: largest original file that is handed out.
    """

    top_k: int = 9
    max_top_k: int = 20
    candidates: int = 9
    thumbnails: int = 9
    thumbnail_side: int = 256
    described_side: int = 1024
    query_text: int = 2_000
    value_text: int = 160
    long_text: int = 1_000
    metadata: int = 16
    original_bytes: int = 20 * 2**20

    def __post_init__(self) -> None:
        """Refuse what can only be a mistake."""
        for name, value in vars(self).items():
            least = 0 if name in ("thumbnails", "metadata") else 1
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"SearchLimits({name}={value!r}): give a whole number of {least} or more")


@dataclass(frozen=True)
class FoundPicture:
    """One result.

    Args:
        rank: 1 is the best; what "result 3" means.
        id: of the indexed picture, in the store.
        score: higher is better: similarity from -1 to 1, or the reranker's score.
        label: what it is, in a word or two; "" if nobody said.
        text: what is stored beside the picture, or the whole of a text node.
        reason: why a reranker put it here; "" if it did not say.
        metadata: what else is known, bounded.
        thumbnail: a small JPEG; None if there is none, and `note` says why.
        note: why something is missing.
    """

    rank: int
    id: str
    score: float | None = None
    label: str = ""
    text: str = ""
    reason: str = ""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    thumbnail: bytes | None = field(default=None, repr=False)
    note: str = ""

    @property
    def line(self) -> str:
        """The result on one line, for a model."""
        parts = [f"result {self.rank}: {_quoted(self.label)}" if self.label else f"result {self.rank}"]
        parts.append(f"id {_quoted(self.id)}")
        if self.score is not None:
            parts.append(f"score {self.score:.3f}")
        if self.reason:
            parts.append(f"reason {_quoted(self.reason)}")
        if self.text:
            parts.append(f"text {_quoted(self.text)}")
        if self.metadata:
            parts.append(json.dumps(dict(self.metadata), ensure_ascii=False, default=str))
        if self.note:
            parts.append(f"({self.note})")
        return " | ".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """The result as JSON, without its picture; what is empty is left out."""
        plain = {
            "rank": self.rank,
            "id": self.id,
            "score": self.score,
            "label": self.label,
            "text": self.text,
            "reason": self.reason,
            "metadata": dict(self.metadata),
            "note": self.note,
        }
        return _filled(plain)


@dataclass(frozen=True)
class SearchResult:
    """What one search found.

    Args:
        number: of the search in its conversation, from 1; 0: nobody remembers it.
        query: what was asked, in words.
        pictures: best first.
        hint: what to do about it, where nothing was found.
        note: why there are fewer results or thumbnails than were asked for.
    """

    number: int
    query: str
    pictures: tuple[FoundPicture, ...] = ()
    hint: str = ""
    note: str = ""

    @property
    def heading(self) -> str:
        """The line above the results."""
        about = f"Search {self.number}" if self.number else "Search"
        if not self.pictures:
            return f"{about}: nothing found for {self.query}." + (f" {self.hint}" if self.hint else "")
        count = len(self.pictures)
        names = '"result 1"' if count == 1 else f'"result 1" to "result {count}"'
        how = f"as {names}, or by id" if self.number else "by id"
        note = f" ({self.note})" if self.note else ""
        return f"{about}: {count} found for {self.query}{note}. Refer to them {how}."

    @property
    def text(self) -> str:
        """The whole answer in words, one line for each result."""
        return "\n".join([self.heading, *(picture.line for picture in self.pictures)])

    def to_dict(self) -> dict[str, Any]:
        """The answer as JSON, without pictures."""
        return {
            "search": self.number,
            "query": self.query,
            "results": [picture.to_dict() for picture in self.pictures],
            **({"hint": self.hint} if self.hint else {}),
            **({"note": self.note} if self.note else {}),
        }


@dataclass(frozen=True)
class PictureDescription:
    """What is known about one picture.

    Args:
        name: how it was called.
        id: in the store; "" if it is not an indexed one.
        description: in a vision model's words; "" without a model.
        size: width and height in pixels; None if it could not be read.
        label: what it is, in a word or two; "" if nobody said.
        stored_text: what is stored beside it.
        metadata: what the store knows, bounded.
        thumbnail: a small JPEG; None if it could not be read, and `note` says why.
        note: why something is missing.
    """

    name: str
    id: str = ""
    description: str = ""
    size: tuple[int, int] | None = None
    label: str = ""
    stored_text: str = ""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    thumbnail: bytes | None = field(default=None, repr=False)
    note: str = ""

    @property
    def text(self) -> str:
        """The answer in words."""
        facts = [f"id {_quoted(self.id)}"] if self.id else []
        facts += [f"{self.size[0]}x{self.size[1]} pixels"] if self.size else []
        facts += [f"label {_quoted(self.label)}"] if self.label else []
        facts += [f"text {_quoted(self.stored_text)}"] if self.stored_text else []
        facts += [json.dumps(dict(self.metadata), ensure_ascii=False, default=str)] if self.metadata else []
        facts += [f"({self.note})"] if self.note else []
        about = f"{self.name}: " + " | ".join(facts)
        return f"{about}\nDescription: {self.description}" if self.description else about

    def to_dict(self) -> dict[str, Any]:
        """The answer as JSON, without the picture; what is empty is left out."""
        plain = {
            "name": self.name,
            "id": self.id,
            "description": self.description,
            "size": list(self.size) if self.size else None,
            "label": self.label,
            "text": self.stored_text,
            "metadata": dict(self.metadata),
            "note": self.note,
        }
        return _filled(plain)


@dataclass(frozen=True)
class Original:
    """The file of an indexed picture, as it is."""

    id: str
    name: str
    media_type: str
    data: bytes = field(repr=False)


def shown_metadata(metadata: Mapping[str, Any], limits: SearchLimits, *, without: frozenset[str]) -> dict[str, Any]:
    """Return flat metadata without bookkeeping, at most so many keys and each value at most so long."""
    shown: dict[str, Any] = {}
    for key in shown_keys(metadata, without=without)[: limits.metadata]:
        value = metadata[key]
        if isinstance(value, list | tuple):
            shown[one_line(key, 60)] = [_short(one, limits.value_text) for one in value[:10]]
        else:
            shown[one_line(key, 60)] = _short(value, limits.value_text)
    return shown


def shown_keys(metadata: Mapping[str, Any], *, without: frozenset[str]) -> list[str]:
    """Return the keys that say something about the image."""
    return [key for key in metadata if key not in without and not _is_bookkeeping(key, metadata)]


def _is_bookkeeping(key: str, metadata: Mapping[str, Any]) -> bool:
    """Whether the value is ours: a caller may have a column `bytes` or `digest`, and that is shown."""
    return key in NOT_SHOWN and (key == "file_path" or f"{PREFIX}{key}" not in metadata)


def without_folders(text: str) -> str:
    """Return a message whose paths are file names only: where files lie is nothing for a client or a model."""
    text = _QUOTED_PATH.sub(r"\g<quote>\g<name>\g<quote>", text)
    return _BARE_PATH.sub(r"\g<name>", text)


def _filled(facts: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in facts.items() if value not in ("", None, {})}


def _short(value: Any, most: int) -> Any:
    return value if value is None or isinstance(value, bool | int | float) else one_line(value, most)


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
