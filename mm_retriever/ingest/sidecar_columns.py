"""The columns of a sidecar: the one that names the image, the one that is its text, and what their values become."""

from __future__ import annotations

import json
import math
import os
import posixpath
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, time
from decimal import Decimal
from numbers import Integral, Real
from typing import Any
from urllib.parse import unquote

from mm_retriever.errors import IngestError, shown

NAME_COLUMNS = ("file_path", "file_name", "filename", "file", "path", "image_path", "image")
"""The usual names of the column that says which image a row is about; a few more are understood."""

TEXT_COLUMNS = ("text", "caption")
"""The first of these that a row has becomes the text of its node."""

MAX_ROW_BYTES = 60_000
"""Of the columns of one image, and of its text: what Milvus holds, less what ingestion adds."""

LONGEST_INTEGER = 2**63 - 1

# The first that a row has names its image. `SourceFile` is exiftool's, which writes a bare `FileName` too.
NAMES = (
    *("sourcefile", "filepath", "filename", "file", "path", "imagepath", "image", "imagefile", "imagename"),
    *("imagefilename", "filelocation", "img", "imgpath", "imgname", "url", "imageurl", "imgurl"),
)
_ID_NAMES = ("imageid", "id")
IMAGE_NAME = re.compile(r"[^\r\n]*\.(jpe?g|jpe|jfif|png|webp|gif|tiff?|bmp|avif|hei[cf]|pnm|ppm)", re.IGNORECASE)


@dataclass(frozen=True)
class SidecarRow:
    """The text and the columns that a sidecar gives to one image."""

    text: str = ""
    columns: dict[str, Any] = field(default_factory=dict)


def make_row(values: Mapping[str, Any], where: str, left_out: Counter[str]) -> SidecarRow:
    """Return the row of an image; names of columns that are too long for it are counted in `left_out`."""
    columns: dict[str, Any] = {}
    for key, value in values.items():
        if not isinstance(key, str) or not key:
            raise IngestError(f"{where}: a column needs a name, got {shown(key)}")
        plain = _plain(value, f"{where}: column {key!r}")
        if plain not in (None, ""):
            columns[key] = plain
    text = ""
    for name in TEXT_COLUMNS:
        key = next((key for key in columns if header(key) == name), "")
        if isinstance(columns.get(key), str | int | float | list):
            value = columns.pop(key)
            text = "\n".join(map(str, value)) if isinstance(value, list) else str(value)
            if len(text.encode("utf-8", "replace")) > MAX_ROW_BYTES:
                left_out[key] += 1
                text = ""
            break
    columns, too_long = within_bounds(columns)
    left_out.update(too_long)
    return SidecarRow(text, columns)


def within_bounds(columns: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return the columns that Milvus can hold together, and the names of the largest, which are left out for that."""
    kept = dict(columns)
    left_out: list[str] = []
    sizes = {key: _size(key) + _size(value) + 4 for key, value in kept.items()}
    while sum(sizes.values()) > MAX_ROW_BYTES:
        largest = max(sizes, key=sizes.__getitem__)
        left_out.append(largest)
        del sizes[largest], kept[largest]
    return kept, left_out


def _size(value: object) -> int:
    if isinstance(value, int | float):
        return 24
    try:
        return len(json.dumps(value, ensure_ascii=False, default=str).encode("utf-8", "replace"))
    except (ValueError, RecursionError):
        return MAX_ROW_BYTES + 1


def _plain(value: Any, where: str, depth: int = 0) -> Any:
    """A value as JSON has it: numbers and text for what numpy, pandas, dates and decimals bring; None for missing."""
    if depth > 16:
        raise IngestError(f"{where}: nested more than 16 deep")
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str(value)  # numpy's too
    if isinstance(value, Integral):
        return int(value) if abs(int(value)) <= LONGEST_INTEGER else str(int(value))  # exact, if only as text
    if isinstance(value, Real | Decimal):
        number = float(value)
        return number if math.isfinite(number) else None
    if isinstance(value, date | time):
        return None if value != value else value.isoformat()  # pandas' NaT is a date that does not equal itself
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item, where, depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        items = [_plain(item, where, depth + 1) for item in value]
        return [item for item in items if item is not None]
    if hasattr(value, "tolist"):
        return _plain(value.tolist(), where, depth + 1)
    if type(value).__name__ in ("NAType", "NaTType"):
        return None
    raise IngestError(f"{where}: a {type(value).__name__}; give text, numbers, bools, dates or lists of them")


# ------------------------------------------------------------------------------------------ names


def header(key: str) -> str:
    """Return a column's name in its compared form: `File Name`, `file_name` and exiftool's `File:FileName` are one."""
    return re.sub(r"[\s_-]", "", key.rsplit(":", 1)[-1]).casefold()


def name_column(row: Mapping[str, Any]) -> str | None:
    """Return the column of a row that names its image."""
    names = {header(key): key for key, value in row.items() if isinstance(value, str) and value.strip()}
    return next((names[name] for name in NAMES if name in names), None)


def guessed_name_column(rows: Sequence[Mapping[str, Any]]) -> str | None:
    """Return the column whose values all look like image files, or else one called `id`."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    for key in keys:
        values = [row[key] for row in rows if row.get(key) is not None]
        if values and all(isinstance(value, str) and IMAGE_NAME.fullmatch(value.strip()) for value in values):
            return key
    return next((key for name in _ID_NAMES for key in keys if header(key) == name), None)


def repeats_name(key: str, value: object, image: str) -> bool:
    """Whether a column names the image again, as exiftool's `FileName` does beside `SourceFile`."""
    if header(key) not in NAMES or not isinstance(value, str):
        return False
    return folded(posixpath.basename(image_key(value))) == folded(posixpath.basename(image_key(image)))


def image_key(name: str) -> str:
    """Return the name of an image in its compared form: a file URL as a path, '/' between folders, no './'."""
    name = name.strip()
    if name[:7].lower() == "file://":
        name = unquote(name[7:])
        name = name[name.index("/") :] if "/" in name else name
    if "://" in name:
        return name
    name = name.replace("\\", "/")
    if "./" in name or "//" in name:
        name = posixpath.normpath(name)
        while name.startswith("../"):
            name = name[3:]
    return name


def folded(key: str) -> str:
    """Return a key without differences of case and Unicode form."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", key).casefold())


def listed(names: Sequence[str]) -> str:
    """Return the first few names for a message."""
    first = ", ".join(repr(name[:120]) for name in names[:3])
    return f"{first} and {len(names) - 3} more" if len(names) > 3 else first
