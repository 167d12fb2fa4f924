"""Columns that lie beside the pictures, in a JSON or CSV file, to be stored with them.

Owns how such a file names its pictures and what its values become. Knows nothing of pictures and stores.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mm_retriever.errors import IngestError, NodeError
from mm_retriever.store import metadata_columns

NAME_COLUMNS = ("file_path", "file_name", "filename", "file", "path", "image_path", "image")
"""A column of one of these names says which picture a row is about; the first that is there counts."""

OWN_KEYS = frozenset(
    ("file_path", "file_name", "label", "width", "height", "bytes", "digest", "mtime_ns", "metadata_digest")
)
"""What ingestion itself stores with a picture."""

_INTEGER = re.compile(r"-?(0|[1-9][0-9]{0,17})")


class Sidecar:
    """Metadata by picture: by its path below the source folder, or else by its bare file name."""

    def __init__(self, columns: Mapping[str, Mapping[str, Any]], *, source: str = "sidecar") -> None:
        self._columns = {_key(name): dict(values) for name, values in columns.items()}
        for name, values in self._columns.items():
            if taken := OWN_KEYS & values.keys():
                raise IngestError(f"{source}: column {min(taken)!r} is one that ingestion itself stores; rename it")
            try:
                metadata_columns(values, owner=name)
            except NodeError as error:
                raise IngestError(f"{source}: {error}") from None

    def __len__(self) -> int:
        return len(self._columns)

    def columns(self, *names: str) -> dict[str, Any]:
        """Return the columns under the first of the names that has any."""
        return next((self._columns[name] for name in names if name in self._columns), {})


def read_sidecar(source: str | Path | Mapping[str, Mapping[str, Any]]) -> Sidecar:
    """Return the columns of a sidecar file.

    Args:
        source: a `.json` file (an object of objects by file name, or a list of objects that name their file), a `.csv`
            file with a header (numbers become numbers where the whole column is numeric, empty cells are left out), or
            a mapping like the first kind of JSON.

    Raises:
        IngestError: the file cannot be read, names no pictures, or holds nested values.
    """
    if isinstance(source, Mapping):
        return Sidecar(_checked(source, "sidecar"))
    path = Path(source)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise IngestError(f"cannot read the sidecar file {str(path)!r}: {error}") from error
    if path.suffix.lower() == ".json":
        return Sidecar(_from_json(text, path.name), source=path.name)
    if path.suffix.lower() == ".csv":
        return Sidecar(_from_csv(text, path.name), source=path.name)
    raise IngestError(f"sidecar file {path.name!r}: give a .json or .csv file")


def _from_json(text: str, name: str) -> dict[str, dict[str, Any]]:
    try:
        content = json.loads(text)
    except ValueError as error:
        raise IngestError(f"{name}: not JSON ({error})") from error
    if isinstance(content, Mapping):
        return _checked(content, name)
    if isinstance(content, list) and all(isinstance(row, Mapping) for row in content):
        return _by_picture(content, name)
    raise IngestError(f"{name}: needs an object of objects by file name, or a list of objects that name their file")


def _from_csv(text: str, name: str) -> dict[str, dict[str, Any]]:
    try:
        rows = list(csv.DictReader(io.StringIO(text, newline=""), strict=True))
    except csv.Error as error:
        raise IngestError(f"{name}: not CSV ({error})") from error
    if any(None in row for row in rows):
        raise IngestError(f"{name}: a line has more cells than the header")
    readers = {column: _column_type(row[column] for row in rows) for column in (rows[0] if rows else ())}
    return _by_picture(
        [{column: readers[column](cell) for column, cell in row.items() if cell and cell.strip()} for row in rows], name
    )


def _by_picture(rows: Iterable[Mapping[str, Any]], name: str) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for number, row in enumerate(rows, start=1):
        column = next((one for one in NAME_COLUMNS if row.get(one)), None)
        if column is None:
            raise IngestError(f"{name}: row {number} has none of the columns {', '.join(NAME_COLUMNS)}")
        found[str(row[column])] = {key: value for key, value in row.items() if key not in NAME_COLUMNS}
    return found


def _checked(content: Mapping[Any, Any], name: str) -> dict[str, dict[str, Any]]:
    for picture, values in content.items():
        if not isinstance(picture, str) or not isinstance(values, Mapping):
            raise IngestError(f"{name}: {picture!r}: needs an object of columns, got {type(values).__name__}")
    return {picture: dict(values) for picture, values in content.items()}


def _column_type(cells: Iterable[str | None]) -> type[int] | type[float] | type[str]:
    """Numbers where every cell is one: '007' and a mixed column stay text, so that a column has one type."""
    filled = [cell.strip() for cell in cells if cell and cell.strip()]
    if all(_INTEGER.fullmatch(cell) for cell in filled):
        return int
    return float if all(_is_decimal(cell) for cell in filled) else str


def _is_decimal(cell: str) -> bool:
    if re.fullmatch(r"-?0[0-9].*|.*_.*", cell):
        return False
    try:
        return math.isfinite(float(cell))
    except ValueError:
        return False


def _key(name: str) -> str:
    return name.replace("\\", "/").removeprefix("./")
