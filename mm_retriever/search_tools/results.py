"""The answers of a search: dataclasses with a text form for a model, and a JSON form for a program.

Owns what is shown of a stored image, and its bounds. Text from the store (names, labels, sidecars, descriptions by a
model) is untrusted: it is shown on one line, quoted as JSON where it could be mistaken for ours.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from mm_retriever.errors import one_line
from mm_retriever.own_keys import BOOKKEEPING_KEYS, PREFIX
from mm_retriever.retriever import ITEM_IMAGES

NOT_SHOWN = frozenset({"file_path", ITEM_IMAGES, *BOOKKEEPING_KEYS})
"""Metadata about the machine or the index, and not about the image."""

# an absolute path in quotes, which may hold spaces, and one without
_QUOTED_PATH = re.compile(r"""(?P<quote>['"])(?:/|[A-Za-z]:[/\\])[^'"]*[/\\](?P<name>[^'"/\\]*)(?P=quote)""")
_BARE_PATH = re.compile(r"""(?<![\w:/.~'"])(?:/|[A-Za-z]:\\)(?:[^\s/\\,;:)'"]+[/\\])+(?P<name>[^\s/\\,;:)'"]*)""")


@dataclass(frozen=True)
class SearchLimits:
    """Bounds of the arguments and answers of one call.

    Args:
        top_k: default number of results.
        max_top_k: most results; larger numbers are lowered to it.
        candidates: images that are retrieved for a reranker to choose from.
        thumbnails: most images in one answer; 0: none, for models that take no images.
        thumbnail_side: longest side of a thumbnail in pixels.
        described_side: longest side of the image that a vision model describes.
        query_text: most characters of a text, change or question.
        value_text: most characters of one metadata value.
        long_text: most characters of a node's text, a reason or a description.
        metadata: most metadata keys of one result.
        original_bytes: largest original file that is returned.
        view_side: longest side of a view in pixels; vision models see no more.
        view_bytes: largest view; base64 adds a third.
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
    view_side: int = 1568
    view_bytes: int = 700_000

    def __post_init__(self) -> None:
        """Refuse values that can only be mistakes."""
        for name, value in vars(self).items():
            least = 0 if name in ("thumbnails", "metadata") else 1
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"SearchLimits({name}={value!r}): give a whole number of {least} or more")


class Part(NamedTuple):
    """A piece of an answer, as a host shows it: a line of text, and its thumbnail."""

    text: str
    thumbnail: bytes | None = None


@dataclass(frozen=True)
class ImageResult:
    """One result.

    Args:
        rank: 1 is the best; the number in "result 3".
        id: of the indexed image, in the store.
        score: higher is better: similarity from -1 to 1, or the reranker's score.
        label: a word or two for the image; "" without one.
        text: the text stored with the image, or that of a text node.
        reason: the reranker's reason for the rank; "" without one.
        metadata: further metadata, bounded.
        thumbnail: a small JPEG; None without one, and `note` says why.
        item_images: ids of the other images of its item, in a search per item.
        version: tells one state of its file from another, for caches; "" if not known.
        file_type: media type of its file, by the name of the file.
        file_bytes: size of its file when it was indexed.
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
    item_images: tuple[str, ...] = ()
    file_type: str = ""
    file_bytes: int | None = None
    note: str = ""
    version: str = field(default="", repr=False)

    @property
    def line(self) -> str:
        """The result on one line, for a model."""
        return _joined(
            f"result {self.rank}: {_quoted(self.label)}" if self.label else f"result {self.rank}",
            _named("id", self.id),
            "" if self.score is None else f"score {self.score:.3f}",
            _named("reason", self.reason),
            _named("text", self.text),
            _quoted(dict(self.metadata)) if self.metadata else "",
            f"other images of the item {_quoted(self.item_images)}" if self.item_images else "",
            f"({self.note})" if self.note else "",
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the result as JSON, without its thumbnail and empty fields."""
        return _filled(vars(self))


@dataclass(frozen=True)
class SearchResult:
    """The results of one search.

    Args:
        number: of the search in its conversation, from 1; 0 without a conversation.
        query: the query in words.
        results: best first.
        hint: what to do if there are no results.
        note: why results or thumbnails are missing.
    """

    number: int
    query: str
    results: tuple[ImageResult, ...] = ()
    hint: str = ""
    note: str = ""

    @property
    def pictures(self) -> tuple[ImageResult, ...]:
        """The earlier name of `results`."""
        return self.results

    @property
    def heading(self) -> str:
        """The line above the results."""
        title = f"Search {self.number}" if self.number else "Search"
        if not self.results:
            return f"{title}: nothing found for {self.query}." + (f" {self.hint}" if self.hint else "")
        count = len(self.results)
        names = '"result 1"' if count == 1 else f'"result 1" to "result {count}"'
        ways = f"as {names}, or by id" if self.number else "by id"
        note = f" ({self.note})" if self.note else ""
        return f"{title}: {count} found for {self.query}{note}. Refer to them {ways}."

    @property
    def parts(self) -> list[Part]:
        """The heading, then each result with its thumbnail."""
        return [Part(self.heading), *(Part(result.line, result.thumbnail) for result in self.results)]

    @property
    def text(self) -> str:
        """The whole answer as text, one line for each result."""
        return "\n".join(part.text for part in self.parts)

    def to_dict(self) -> dict[str, Any]:
        """Return the answer as JSON, without thumbnails."""
        results = [result.to_dict() for result in self.results]
        return {
            "search": self.number,
            "query": self.query,
            "results": results,
            **_filled({"hint": self.hint, "note": self.note}),
        }


@dataclass(frozen=True)
class ImageDescription:
    """The facts about one image.

    Args:
        name: the name in the request.
        id: in the store; "" if it is not indexed.
        description: in a vision model's words; "" without a model.
        size: width and height in pixels; None if it could not be read.
        label: a word or two for the image; "" without one.
        stored_text: the text stored with it.
        metadata: from the store, bounded.
        thumbnail: a small JPEG; None if it could not be read, and `note` says why.
        file_type: media type of its file, by the name of the file.
        file_bytes: size of its file when it was indexed.
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
    file_type: str = ""
    file_bytes: int | None = None
    note: str = ""

    @property
    def text(self) -> str:
        """The answer as text."""
        facts = _joined(
            _named("id", self.id),
            f"{self.size[0]}x{self.size[1]} pixels" if self.size else "",
            _named("label", self.label),
            _named("text", self.stored_text),
            _quoted(dict(self.metadata)) if self.metadata else "",
            f"({self.note})" if self.note else "",
        )
        return f"{self.name}: {facts}" + (f"\nDescription: {self.description}" if self.description else "")

    @property
    def parts(self) -> list[Part]:
        """The answer and the thumbnail."""
        return [Part(self.text, self.thumbnail)]

    def to_dict(self) -> dict[str, Any]:
        """Return the answer as JSON, without the thumbnail and empty fields."""
        return _filled({"text" if name == "stored_text" else name: value for name, value in vars(self).items()})


@dataclass(frozen=True)
class Original:
    """The file of an indexed image, or a view of it."""

    id: str
    name: str
    media_type: str
    data: bytes = field(repr=False)


def shown_metadata(metadata: Mapping[str, Any], limits: SearchLimits, *, without: frozenset[str]) -> dict[str, Any]:
    """Return flat metadata without bookkeeping, with as many keys and as long values as the limits allow."""
    keys = shown_keys(metadata, without=without)[: limits.metadata]
    return {one_line(key, 60): _bounded(metadata[key], limits.value_text) for key in keys}


def shown_keys(metadata: Mapping[str, Any], *, without: frozenset[str]) -> list[str]:
    """Return the keys that describe the image."""
    return [key for key in metadata if key not in without and not _is_bookkeeping(key, metadata)]


def _is_bookkeeping(key: str, metadata: Mapping[str, Any]) -> bool:
    """Whether the value is ingestion's own; a caller's column `bytes` or `digest` is shown."""
    return key in NOT_SHOWN and (key == "file_path" or f"{PREFIX}{key}" not in metadata)


def without_folders(text: str) -> str:
    """Return a message with paths cut to file names: clients and models must not see folders."""
    text = _QUOTED_PATH.sub(r"\g<quote>\g<name>\g<quote>", text)
    return _BARE_PATH.sub(r"\g<name>", text)


def _filled(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The facts without empty ones, thumbnail and version, as JSON types."""
    facts = {name: value for name, value in facts.items() if name not in ("thumbnail", "version")}
    kept = {name: value for name, value in facts.items() if value not in ("", None, {}, ())}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in kept.items()}


def _bounded(value: Any, most: int) -> Any:
    return [_short(item, most) for item in value[:10]] if isinstance(value, list | tuple) else _short(value, most)


def _short(value: Any, most: int) -> Any:
    return value if value is None or isinstance(value, bool | int | float) else one_line(value, most)


def _quoted(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)


def _named(name: str, text: str) -> str:
    return f"{name} {_quoted(text)}" if text else ""


def _joined(*facts: str) -> str:
    return " | ".join(filter(None, facts))
