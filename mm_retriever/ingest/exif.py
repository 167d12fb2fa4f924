"""Date, camera and location of a photograph, from its EXIF block.

Owns a small reader of that block. It reads a dozen entries, follows no offset twice, copies nothing of unknown length
and gives up without an error: the block is untrusted input and never a reason to refuse an image.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime
from typing import Any

from mm_retriever.errors import one_line

_BLOCK = re.compile(rb"Exif\x00\x00(?=II\*\x00|MM\x00\*)")
_PNG_BLOCK = re.compile(rb"eXIf(?=II\*\x00|MM\x00\*)")
_WEBP_BLOCK = re.compile(rb"EXIF....(?=II\*\x00|MM\x00\*)", re.DOTALL)
_DATE = re.compile(r"(\d{4})[:-](\d\d)[:-](\d\d)[ T](\d\d):(\d\d):(\d\d)", re.ASCII)

_MAKE, _MODEL, _CHANGED, _EXIF_DIRECTORY, _GPS_DIRECTORY = 0x010F, 0x0110, 0x0132, 0x8769, 0x8825
_TAKEN, _DIGITISED = 0x9003, 0x9004
_SOUTH_NORTH, _LATITUDE, _WEST_EAST, _LONGITUDE = 1, 2, 3, 4
_ASCII, _SHORT, _LONG, _RATIONAL, _DIRECTORY = 2, 3, 4, 5, 13

_MOST_ENTRIES = 512
_LONGEST_TEXT = 100


def exif_columns(data: bytes) -> dict[str, Any]:
    """Return `taken` (ISO, local time), `camera`, `latitude` and `longitude` (degrees), where a file has them."""
    with suppress(struct.error, ValueError, OverflowError):
        if (start := _start(data)) is not None:
            return _columns(_Block(memoryview(data)[start:]))
    return {}


def _start(data: bytes) -> int | None:
    if data[:4] in (b"II*\0", b"MM\0*"):
        return 0
    pattern = _PNG_BLOCK if data[:4] == b"\x89PNG" else _WEBP_BLOCK if data[:4] == b"RIFF" else _BLOCK
    block = pattern.search(data) or _BLOCK.search(data)
    return block.end() if block else None


def _columns(block: _Block) -> dict[str, Any]:
    main = block.entries(block.number(4, 4), {_MAKE, _MODEL, _CHANGED, _EXIF_DIRECTORY, _GPS_DIRECTORY})
    details = block.entries(main.get(_EXIF_DIRECTORY), {_TAKEN, _DIGITISED})
    place = block.entries(main.get(_GPS_DIRECTORY), {_SOUTH_NORTH, _LATITUDE, _WEST_EAST, _LONGITUDE})
    columns: dict[str, Any] = {}
    dates = (details.get(_TAKEN), details.get(_DIGITISED), main.get(_CHANGED))
    if taken := next((date for date in map(_date, dates) if date), None):
        columns["taken"] = taken
    if camera := _camera(main):
        columns["camera"] = camera
    latitude = _degrees(place.get(_LATITUDE), place.get(_SOUTH_NORTH), "NS", 90)
    longitude = _degrees(place.get(_LONGITUDE), place.get(_WEST_EAST), "EW", 180)
    if latitude is not None and longitude is not None:
        columns |= {"latitude": latitude, "longitude": longitude}
    return columns


class _Block:
    """A TIFF structure in memory; every read outside it is a `struct.error`."""

    def __init__(self, data: memoryview) -> None:
        self._data = data
        self._order = "<" if bytes(data[:2]) == b"II" else ">"

    def number(self, at: int, size: int) -> int:
        return int(struct.unpack_from(self._order + {2: "H", 4: "I"}[size], self._data, at)[0])

    def entries(self, at: Any, wanted: set[int]) -> dict[int, Any]:
        """Return the wanted entries of the directory at an offset: text, a number, or a list of fractions."""
        values: dict[int, Any] = {}
        if not isinstance(at, int) or at < 8:
            return values
        with suppress(struct.error):
            for place in range(at + 2, at + 2 + 12 * min(self.number(at, 2), _MOST_ENTRIES), 12):
                tag = self.number(place, 2)
                if tag in wanted and tag not in values:
                    with suppress(struct.error):
                        values[tag] = self._value(place)
        return values

    def _value(self, place: int) -> Any:
        kind, count = self.number(place + 2, 2), self.number(place + 4, 4)
        if kind == _ASCII:
            at = place + 8 if count <= 4 else self.number(place + 8, 4)
            return bytes(self._data[at : at + min(count, 4 * _LONGEST_TEXT)])
        if kind in (_SHORT, _LONG, _DIRECTORY) and count == 1:
            return self.number(place + 8, 2 if kind == _SHORT else 4)
        if kind == _RATIONAL and 1 <= count <= 3:
            at = self.number(place + 8, 4)
            return [(self.number(at + 8 * i, 4), self.number(at + 8 * i + 4, 4)) for i in range(count)]
        return None


def _text(value: Any) -> str:
    if not isinstance(value, bytes):
        return ""
    raw = value.split(b"\0")[0]
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        text = raw.decode("latin-1")
    return one_line(text, _LONGEST_TEXT)


def _date(value: Any) -> str | None:
    parts = _DATE.match(_text(value))
    if parts is None:
        return None
    try:
        return datetime(*map(int, parts.groups())).isoformat()  # type: ignore[arg-type]
    except ValueError:  # 0000:00:00, which cameras without a clock write
        return None


def _camera(main: Mapping[int, Any]) -> str:
    make, model = _text(main.get(_MAKE)), _text(main.get(_MODEL))
    if make and model.casefold().startswith(make.split()[0].casefold()):
        return model
    return f"{make} {model}".strip()


def _degrees(value: Any, side: Any, sides: str, most: int) -> float | None:
    """Degrees with the sign of the side, "NS" or "EW"; None without a side, which leaves the sign unknown."""
    letter = _text(side)[:1].upper()
    if not isinstance(value, list) or any(below == 0 for _, below in value) or not letter or letter not in sides:
        return None
    degrees = sum(above / below / 60**power for power, (above, below) in enumerate(value))
    if not math.isfinite(degrees) or degrees > most:
        return None
    return float(round(-degrees if letter == sides[1] else degrees, 6))
