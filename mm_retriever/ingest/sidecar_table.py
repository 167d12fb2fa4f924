"""CSV and TSV sidecars: which sign separates the cells, what the columns are called, and which of them are numbers."""

from __future__ import annotations

import csv
import io
import math
import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from mm_retriever.errors import IngestError
from mm_retriever.ingest.sidecar_columns import IMAGE_NAME, LONGEST_INTEGER, NAMES, TEXT_COLUMNS, header, name_column

_MISSING = frozenset(("", "n/a", "null", "none", "nan", "-"))
_MISSING_NUMBERS = _MISSING | {"na", "n.a.", "n.a", "--", "?", "nil", "#n/a", "#value!", "undefined", "<na>"}
_INTEGER = re.compile(r"-?(0|[1-9][0-9]*)")
_DECIMAL = re.compile(r"-?((0|[1-9][0-9]*)(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?")
_THOUSANDS = re.compile(r"-?[1-9][0-9]{0,2}(,[0-9]{3})+(\.[0-9]+)?")
_DECIMAL_COMMA = re.compile(r"-?(0|[1-9][0-9]*|[1-9][0-9]{0,2}(\.[0-9]{3})+)(,[0-9]+)?")
_EXACT_FLOAT = 2**53
_CSV_LIMIT = threading.Lock()


def table_rows(text: str, name: str, delimiters: str, notes: list[str]) -> list[tuple[int, dict[str, Any]]]:
    """Return the rows of a table below its header, each with the number of its line; missing cells are left out.

    `delimiters` may separate the cells, the likeliest first; `notes` takes what should be known about the result.
    """
    first, _, rest = text.partition("\n")
    if separator := re.fullmatch(r"sep=(.)\r?", first, re.IGNORECASE):  # Excel's own way to name it
        text, delimiters = rest, separator[1]
    try:
        with _long_fields():
            delimiter = _delimiter(text, delimiters)
            reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
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
    if rows and not any(name_column(row) for _, row in rows) and IMAGE_NAME.fullmatch(top[0].strip()):
        raise IngestError(f"{name}: the first line is no header but names an image; add one such as file_name,caption")
    return rows


@contextmanager
def _long_fields() -> Iterator[None]:
    """Let fields of any length through the csv module, whose limit is one for the whole process."""
    with _CSV_LIMIT:
        before = csv.field_size_limit(2**31 - 1)
        try:
            yield
        finally:
            csv.field_size_limit(before)


def _delimiter(text: str, candidates: str) -> str:
    """The sign that splits the first line into the most columns, first of all one that names the image."""
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
    """Names of the columns, "" for one without; of two equal names the second gets a number."""
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
    """The cells of a column of text; None for what is missing."""
    missing = [cell.strip().casefold() in _MISSING for cell in cells]
    if count := sum(absent and bool(cell.strip()) for absent, cell in zip(missing, cells, strict=True)):
        notes.append(f"{where}: {count} cells such as N/A, null, None or - are taken as missing")
    return [None if absent else cell for absent, cell in zip(missing, cells, strict=True)]


def _numbers(cells: Sequence[str], *, comma: bool) -> list[int | float | None] | None:
    """The cells of a column as numbers, None for what is missing; None if some are not, or would lose digits.

    With `comma`, "1,234" is one thousand and more; otherwise another cell has to show what a comma means.
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
        if not math.isfinite(number) or (_INTEGER.fullmatch(cell) and abs(number) > largest):
            return None
    values = iter(numbers)
    return [None if cell.casefold() in _MISSING_NUMBERS else next(values) for cell in stripped]
