"""The columns of a sidecar: which one names the image, which one is its text, and how values are stored.

For CSV and TSV also the delimiter, the names of the columns, and which of them are numbers.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
import posixpath
import re
import threading
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import date, time
from decimal import Decimal
from numbers import Integral, Real
from typing import Any
from urllib.parse import unquote

from mm_retriever.errors import IngestError, shown
from mm_retriever.ingest.sources import stable_url

NAME_COLUMNS = ("file_path", "file_name", "filename", "file", "path", "image_path", "image")
"""The usual names of the column that names the image; a few more are understood."""

TEXT_COLUMNS = ("text", "caption")
"""The first of these that a row has becomes the text of its node."""

MAX_ROW_BYTES = 60_000
"""Limit of the columns of one image, and of its text: Milvus' own, less the metadata that ingestion adds."""

LONGEST_INTEGER = 2**63 - 1

# The first of these in a row names its image. exiftool writes `SourceFile`, and a bare `FileName` too.
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
    """Return the columns that Milvus can hold together, and the names of the largest ones, which are left out."""
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
    """A value of numpy, pandas, dates or decimals as a JSON value; None for a missing one."""
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
    """Return a column's name for comparison: `File Name`, `file_name` and exiftool's `File:FileName` are equal."""
    return re.sub(r"[\s_-]", "", key.rsplit(":", 1)[-1]).casefold()


def name_column(row: Mapping[str, Any]) -> str | None:
    """Return the column of a row that names its image."""
    names = {header(key): key for key, value in row.items() if isinstance(value, str) and value.strip()}
    return next((names[name] for name in NAMES if name in names), None)


def guessed_name_column(rows: Sequence[Mapping[str, Any]]) -> str | None:
    """Return the column whose values all look like names of image files, or else one called `id`."""
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
    if "://" in value:  # where else the image is
        return image_key(value) == image_key(image)
    return folded(posixpath.basename(image_key(value))) == folded(posixpath.basename(image_key(image)))


def image_key(name: str) -> str:
    """Return the name of an image for comparison: a file URL as a path, '/' between folders, no './'."""
    name = name.strip()
    if name[:7].lower() == "file://":
        name = unquote(name[7:])
        name = name[name.index("/") :] if "/" in name else name
    if "://" in name:
        return stable_url(name)
    name = name.replace("\\", "/")
    if "./" in name or "//" in name:
        name = posixpath.normpath(name)
        while name.startswith("../"):
            name = name[3:]
    return name


def folded(key: str) -> str:
    """Return a key in one case and Unicode form."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", key).casefold())


def listed(names: Sequence[str]) -> str:
    """Return the first few names for a message."""
    first = ", ".join(repr(name[:120]) for name in names[:3])
    return f"{first} and {len(names) - 3} more" if len(names) > 3 else first


_MISSING = frozenset(("", "n/a", "null", "none", "nan", "-"))
_MISSING_NUMBERS = _MISSING | {"na", "n.a.", "n.a", "--", "?", "nil", "#n/a", "#value!", "undefined", "<na>"}
_INTEGER = re.compile(r"-?(0|[1-9][0-9]*)")
_DECIMAL = re.compile(
    r"(?!-?[0-9]+E[0-9])-?((0|[1-9][0-9]*)(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?"
)  # 12E4 is a code: programs write 1.2E5, 1E+5 or 1e5
_THOUSANDS = re.compile(r"-?[1-9][0-9]{0,2}(,[0-9]{3})+(\.[0-9]+)?")
_DECIMAL_COMMA = re.compile(r"-?(0|[1-9][0-9]*|[1-9][0-9]{0,2}(\.[0-9]{3})+)(,[0-9]+)?")
_EXACT_FLOAT = 2**53
_CSV_LIMIT = threading.Lock()


def table_rows(text: str, name: str, delimiters: str, notes: list[str]) -> list[tuple[int, dict[str, Any]]]:
    """Return the rows of a table below its header, each with the number of its line; missing cells are left out.

    `delimiters` may separate the cells, the likeliest first; notes on the result are added to `notes`.
    """
    first, _, rest = text.partition("\n")
    if separator := re.fullmatch(r"sep=(.)\r?", first, re.IGNORECASE):  # Excel's own way to name it
        text, delimiters = rest, separator[1]
    try:
        with _long_fields():
            delimiter = _delimiter(text, delimiters)
            spaced = _has_spaces(text, delimiter)
            reader = csv.reader(
                io.StringIO(text, newline=""), delimiter=delimiter, strict=True, skipinitialspace=spaced
            )
            lines = [(reader.line_num, cells) for cells in reader if any(cell.strip() for cell in cells)]
    except csv.Error as error:
        raise IngestError(f"{name}: not CSV ({error})") from error
    if not lines:
        return []
    (_, top), *lines = lines
    keys = _column_names(top, name, notes)
    columns: dict[str, list[Any]] = {}
    for place, key in enumerate(keys):
        if key:
            cells = [cells[place] if place < len(cells) else "" for _, cells in lines]
            is_text = header(key) in (*NAMES, *TEXT_COLUMNS)
            values = None if is_text else _numbers(cells, comma=delimiter != ";")
            columns[key] = values or _texts(cells, f"{name}: column {key!r}", notes)
    for number, cells in lines:
        if any(cell.strip() for cell in cells[len(keys) :]):
            raise IngestError(f"{name}: line {number} has more cells than the header")
    rows = [
        (number, {key: values[place] for key, values in columns.items() if values[place] is not None})
        for place, (number, _) in enumerate(lines)
    ]
    if not any(name_column(row) for _, row in rows) and IMAGE_NAME.fullmatch(top[0].strip()):
        raise IngestError(f"{name}: the first line is no header but names an image; add one such as file_name,caption")
    return rows


@contextmanager
def _long_fields() -> Iterator[None]:
    """Lift the csv module's limit of field sizes, which is global to the process."""
    with _CSV_LIMIT:
        before = csv.field_size_limit(2**31 - 1)
        try:
            yield
        finally:
            csv.field_size_limit(before)


def _has_spaces(text: str, delimiter: str) -> bool:
    """Whether each name in the header but the first follows a space; spaces before cells then mean nothing either."""
    first = next((line for line in text.splitlines() if line.strip()), "")
    _, *others = first.split(delimiter)
    return bool(others) and all(cell[:1] == " " for cell in others)


def _delimiter(text: str, candidates: str) -> str:
    """The delimiter that splits the first line into the most columns, preferably one of which names the image."""
    first = next((line for line in text.splitlines() if line.strip()), "")
    scores: dict[str, tuple[bool, int]] = {}
    for sign in candidates:
        try:
            cells = next(csv.reader([first], delimiter=sign), [])
        except csv.Error:
            continue
        scores[sign] = (any(header(cell) in NAMES for cell in cells), len(cells))
    return max(scores, key=scores.__getitem__, default=",")  # of equals the first


def _column_names(cells: Sequence[str], name: str, notes: list[str]) -> list[str]:
    """The names of the columns, "" for a column without one; a repeated name gets a number."""
    keys: list[str] = []
    for cell in cells:
        key = " ".join(cell.split())
        if key and key in keys:
            number = next(n for n in range(2, len(cells) + 2) if f"{key}_{n}" not in keys)
            notes.append(f"{name}: there are two columns {key!r}; the later one is {key}_{number}")
            key = f"{key}_{number}"
        keys.append(key)
    if "" in keys[:-1]:
        count = keys.count("")
        notes.append(f"{name}: {f'{count} columns' if count > 1 else 'a column'} without a name: left out")
    return keys


def _texts(cells: Sequence[str], where: str, notes: list[str]) -> list[str | None]:
    """The cells of a column of text; None for missing ones."""
    missing = [cell.strip().casefold() in _MISSING for cell in cells]
    if count := sum(absent and bool(cell.strip()) for absent, cell in zip(missing, cells, strict=True)):
        notes.append(f"{where}: {count} cells such as N/A, null, None or - are taken as missing")
    return [None if absent else cell for absent, cell in zip(missing, cells, strict=True)]


def _numbers(cells: Sequence[str], *, comma: bool) -> list[int | float | None] | None:
    """The cells of a column as numbers, None for missing ones; None if a cell is not a number, or would lose digits.

    With `comma`, "1,234" is above one thousand; otherwise another cell has to show the meaning of a comma.
    """
    stripped = [cell.strip() for cell in cells]
    given = [cell for cell in stripped if cell.casefold() not in _MISSING_NUMBERS]
    if all(_DECIMAL.fullmatch(cell) for cell in given):
        plain = given
    elif all(_DECIMAL.fullmatch(cell) or _THOUSANDS.fullmatch(cell) for cell in given) and (
        comma or any("." in cell for cell in given)
    ):
        plain = [cell.replace(",", "") for cell in given]
    elif all(_DECIMAL_COMMA.fullmatch(cell) for cell in given) and any(
        "," in cell and not _THOUSANDS.fullmatch(cell) for cell in given
    ):
        plain = [cell.replace(".", "").replace(",", ".") for cell in given]
    else:
        return None
    integers = all(_INTEGER.fullmatch(cell) for cell in plain)
    if not plain or any(len(cell) > 20 and _INTEGER.fullmatch(cell) for cell in plain):
        return None
    numbers = [int(cell) if integers else float(cell) for cell in plain]
    largest = LONGEST_INTEGER if integers else _EXACT_FLOAT
    for cell, number in zip(plain, numbers, strict=True):
        if not math.isfinite(number) or (_INTEGER.fullmatch(cell) and abs(int(cell)) > largest):
            return None
    values = iter(numbers)
    return [None if cell.casefold() in _MISSING_NUMBERS else next(values) for cell in stripped]
