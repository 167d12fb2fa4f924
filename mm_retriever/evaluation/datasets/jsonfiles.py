"""Reads published annotation files: JSON and JSON lines, checked key by key."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from mm_retriever.errors import QueryError, shown

MAX_BYTES = 2**30
_NAMED = 3

T = TypeVar("T")


@dataclass(frozen=True)
class Record:
    """One entry of an annotation file, which names itself in errors.

    Args:
        values: the JSON object.
        place: file and line or number of the entry.
    """

    values: Mapping[str, Any]
    place: str

    def text(self, key: str) -> str:
        """Return a text that is not empty."""
        value = self._value(key)
        if not isinstance(value, str) or not value.strip():
            raise self.error(key, "a text")
        return value

    def optional_text(self, key: str) -> str:
        """Return a text; "" where it is missing, null or empty."""
        return "" if self.values.get(key) in (None, "") else self.text(key)

    def whole(self, key: str) -> int:
        """Return a whole number, 0 or more."""
        value = self._value(key)
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise self.error(key, "a whole number")
        return value

    def texts(self, key: str) -> list[str]:
        """Return a list of texts."""
        return self._all(key, str, "a list of texts")

    def wholes(self, key: str) -> list[int]:
        """Return a list of whole numbers."""
        return self._all(key, int, "a list of whole numbers")

    def inside(self, key: str) -> Record:
        """Return an object inside the entry."""
        value = self._value(key)
        if not isinstance(value, dict):
            raise self.error(key, "an object")
        return Record(value, f"{self.place}, {key!r}")

    def all_inside(self, key: str) -> list[Record]:
        """Return a list of objects inside the entry."""
        return [Record(value, f"{self.place}, {key!r}") for value in self._all(key, dict, "a list of objects")]

    def error(self, key: str, expected: str) -> QueryError:
        """Return an error for a key that is not what it should be."""
        given = shown(self.values[key]) if key in self.values else "missing"
        return QueryError(f"{self.place}: {key!r} is {given}; expected {expected}")

    def only(self, known: Sequence[str]) -> None:
        """Refuse unknown keys.

        Raises:
            QueryError: names the first one.
        """
        if other := [key for key in self.values if key not in known]:
            raise QueryError(f"{self.place}: unknown key {shown(other[0])}; there are {', '.join(known)}")

    def _value(self, key: str) -> Any:
        if key not in self.values:
            raise self.error(key, "a value")
        return self.values[key]

    def _all(self, key: str, kind: type[T], expected: str) -> list[T]:
        value = self._value(key)
        if not isinstance(value, list) or any(not isinstance(item, kind) or isinstance(item, bool) for item in value):
            raise self.error(key, expected)
        return value


def read_list(path: Path) -> list[Record]:
    """Return the objects in a JSON file with a list of objects.

    Raises:
        QueryError: the file is missing, damaged or of another form.
    """
    values = _parsed(path)
    if not isinstance(values, list) or not values:
        raise QueryError(f"{path}: expected a list of objects, as published, with at least one")
    return [_record(value, f"{path}, entry {number}") for number, value in enumerate(values, 1)]


def read_object(path: Path) -> Record:
    """Return the object in a JSON file.

    Raises:
        QueryError: as of `read_list`.
    """
    return _record(_parsed(path), str(path))


def read_names(path: Path) -> list[str]:
    """Return the texts in a JSON file with a list of texts.

    Raises:
        QueryError: as of `read_list`.
    """
    values = _parsed(path)
    if not isinstance(values, list) or not values or not all(isinstance(value, str) for value in values):
        raise QueryError(f"{path}: expected a list of names, as published, with at least one")
    return values


def read_lines(path: Path) -> Iterator[Record]:
    """Yield the objects of a file with one on each line; empty lines are skipped.

    Raises:
        QueryError: the file is missing, or a line is not a JSON object.
    """
    text = _content(path)
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise QueryError(f"{place}: not JSON ({error}); expected one object on each line") from None
        yield _record(value, place)


def first_of(places: Iterable[Path], what: str) -> Path:
    """Return the first place that exists.

    Raises:
        QueryError: none exists; all are named.
    """
    tried = list(places)
    for place in tried:
        if place.exists():
            return place
    raise QueryError(f"{what} not found; looked for {', '.join(repr(str(place)) for place in tried)}")


def refuse_missing(files: Mapping[str, Path], where: str) -> None:
    """Refuse images of which some are missing.

    Args:
        files: by name.
        where: the file that names them.

    Raises:
        QueryError: gives the number of missing images, and the first of them.
    """
    folders: dict[Path, set[str]] = {}
    for path in files.values():
        if path.parent not in folders:
            folders[path.parent] = _names(path.parent)
    if missing := [path for path in files.values() if path.name not in folders[path.parent] and not path.is_file()]:
        named = ", ".join(repr(str(path)) for path in missing[:_NAMED])
        more = f", and {len(missing) - _NAMED} more" if len(missing) > _NAMED else ""
        raise QueryError(f"{where}: {len(missing)} of {len(files)} images are missing: {named}{more}")


def _names(folder: Path) -> set[str]:
    try:
        return {entry.name for entry in folder.iterdir()}
    except OSError:
        return set()


def _record(value: Any, place: str) -> Record:
    if not isinstance(value, dict):
        raise QueryError(f"{place}: {shown(value)} is no JSON object")
    return Record(value, place)


def _parsed(path: Path) -> Any:
    try:
        return json.loads(_content(path))
    except (ValueError, RecursionError) as error:
        raise QueryError(f"{path}: not JSON ({error})") from None


def _content(path: Path) -> str:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise QueryError(f"{path} has more than {MAX_BYTES} bytes; no data set has annotations of that size")
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise QueryError(f"{path}: not UTF-8 text ({error.reason})") from None
    except OSError as error:
        raise QueryError(f"cannot read {str(path)!r}: {error.strerror or error}") from None
