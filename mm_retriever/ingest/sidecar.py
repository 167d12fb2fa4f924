"""Metadata files beside the images: JSON, JSON Lines, CSV and TSV, whose rows name an image and hold its metadata.

Unused rows are counted and reported. Opens no image.
"""

from __future__ import annotations

import codecs
import json
import os
import posixpath
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

from mm_retriever.errors import IngestError
from mm_retriever.ingest.sidecar_columns import (
    MAX_ROW_BYTES,
    NAME_COLUMNS,
    TEXT_COLUMNS,
    SidecarRow,
    guessed_name_column,
    header,
    image_key,
    listed,
    make_row,
    name_column,
    repeats_name,
    table_rows,
)

SidecarSource: TypeAlias = str | Path | Mapping[str, Mapping[str, Any]] | Sequence[Mapping[str, Any]] | Literal[False]
"""A file, or the same as a mapping or as a list of rows; False: none, not even one that lies in the folder."""

FOUND_NAMES = ("metadata.jsonl", "metadata.csv")
"""Names of sidecars in Hugging Face image folders, which are found without being given."""

_COCO_KEYS = ("id", "name", "image_id", "category_id")

Columns: TypeAlias = dict[str, dict[str, Any]]
"""Columns by the name of the image."""


class Sidecar:
    """Rows by the name of the image: a path, a file name, or one without its suffix. Messages call it `source`.

    `files` are the paths that the rows were read from.
    """

    def __init__(
        self,
        columns: Mapping[str, Mapping[str, Any]],
        *,
        source: str = "sidecar",
        notes: Sequence[str] = (),
        files: Sequence[str] = (),
    ) -> None:
        self.source = source
        self.files = frozenset(files)
        left_out: Counter[str] = Counter()
        self.rows: dict[str, SidecarRow] = {
            image_key(name): make_row(values, f"{source}: {name!r}", left_out) for name, values in columns.items()
        }
        too_long = f"more than {MAX_ROW_BYTES} bytes for one image"
        self.notes = (
            *notes,
            *(f"{source}: column {key!r} is left out of {n} rows: {too_long}" for key, n in left_out.items()),
        )

    def __len__(self) -> int:
        return len(self.rows)

    def columns(self, *names: str) -> dict[str, Any]:
        """Return the columns of the first of the names that has any; names must match exactly."""
        return next((self.rows[key].columns for key in map(image_key, names) if key in self.rows), {})


def read_sidecar(source: str | Path | Mapping[str, Mapping[str, Any]] | Sequence[Mapping[str, Any]]) -> Sidecar:
    """Return the rows of a sidecar file.

    Args:
        source: a `.json` file (an object of objects by file name, or a list of objects that name their file, such as
            exiftool writes, also inside an object as in COCO), a `.jsonl` file with such an object on each line, a
            `.csv` or `.tsv` file with a header, or a mapping or a list like those of JSON. In CSV a column is numeric
            where every cell is a number or missing (empty, N/A, null, None, NaN, "-").

    Raises:
        IngestError: the file cannot be read, or names no images.
    """
    if isinstance(source, Mapping):
        notes: list[str] = []
        return Sidecar(_by_name(source, "sidecar", notes), notes=notes)
    if not isinstance(source, str | os.PathLike):
        return _of_rows(source)
    path = Path(os.path.expanduser(source))  # noqa: PTH111
    parse = _PARSERS.get(path.suffix.lower())
    if parse is None:
        raise IngestError(f"sidecar file {path.name!r}: give a .json, .jsonl, .csv or .tsv file")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise IngestError(f"cannot read the sidecar file {str(path)!r}: {error.strerror or error}") from error
    notes = []
    columns = parse(_decoded(data, path, notes), path.name, notes)
    if not columns:
        notes.append(f"{path.name}: holds no rows")
    return Sidecar(columns, source=path.name, notes=notes, files=[os.path.realpath(path)])


def _of_rows(source: object) -> Sidecar:
    if not isinstance(source, list | tuple) or not all(isinstance(row, Mapping) for row in source):
        raise IngestError(
            f"the sidecar is a {type(source).__name__}: give a file, a mapping by file name, or a list of mappings "
            "that name their file, as table.to_dict('records') of pandas"
        )
    notes: list[str] = []
    return Sidecar(_by_image(list(enumerate(source, start=1)), "sidecar", notes, "row"), notes=notes)


def find_sidecars(folder: str) -> Sidecar:
    """Return the rows of the `metadata.jsonl` and `metadata.csv` files in a folder and up to two levels below it.

    Names in a file are relative to its folder; rows of several files for one image are joined. The notes name files
    that name no images or cannot be read.
    """
    rows: Columns = {}
    notes: list[str] = []
    replaced: list[str] = []
    sources: list[str] = []
    files: list[str] = []
    for place in _folders(folder, levels=2):
        below = posixpath.relpath(Path(place).as_posix(), Path(folder).as_posix())
        for name in FOUND_NAMES:
            path, where = Path(place, name), posixpath.normpath(f"{below}/{name}")
            try:
                if not path.is_file():
                    continue
                sidecar = read_sidecar(path)
            except OSError as error:  # of a folder that cannot be looked into, which must not end the run
                notes.append(f"{where} in the folder cannot be looked for: {error.strerror or error}")
                continue
            except IngestError as error:
                notes.append(f"{where} in the folder is not used: {error}")
                continue
            sources.append(where)
            files.append(str(path))
            notes += sidecar.notes
            for key, row in sidecar.rows.items():
                own = key if below == "." or os.path.isabs(key) else f"{below}/{key}"  # noqa: PTH117 - a key
                values = {**row.columns, **({"text": row.text} if row.text else {})}
                if (before := rows.get(own)) is not None:
                    values, differs = _merged(before, values, later_counts=False)
                    replaced += [own] if differs else []
                rows[own] = values
    if sources:
        notes.insert(0, f"columns are taken from {listed(sources)}, found in the folder")
    if replaced:
        notes.append(
            f"{len(replaced)} images have rows in several files that differ, the first counts: {listed(replaced)}"
        )
    return Sidecar(rows, source=", ".join(sources[:3]) or "sidecar", notes=notes, files=files)


def _folders(folder: str, levels: int) -> Iterator[str]:
    yield folder
    if levels == 0:
        return
    try:
        with os.scandir(folder) as listing:
            below = sorted(
                entry.path
                for entry in listing
                if not entry.name.startswith(".") and entry.is_dir(follow_symlinks=False)
            )
    except OSError:  # the walk of the images says so
        return
    for place in below:
        yield from _folders(place, levels - 1)


# ------------------------------------------------------------------------------------------ files


def _decoded(data: bytes, path: Path, notes: list[str]) -> str:
    if data[:4] == b"PK\x03\x04" or data[:8] == b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1":
        raise IngestError(f"{path.name}: is a workbook or an archive, not text; save it as CSV")
    encoding = "utf-8-sig"
    zeros = [place % 2 for place, byte in enumerate(data[:200]) if byte == 0]
    if data[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        encoding = "utf-16"
    elif len(zeros) > 1 and len(set(zeros)) == 1:  # the same half of every letter that is also ASCII
        encoding = "utf-16-le" if zeros[0] else "utf-16-be"
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        if encoding != "utf-8-sig":
            raise IngestError(f"cannot read the sidecar file {str(path)!r}: {error}") from error
        try:
            text = data.decode("cp1252")
        except UnicodeDecodeError:  # of another language: its letters would become others
            reason = "it is neither UTF-8 nor Windows-1252; save it as UTF-8"
            raise IngestError(f"cannot read the sidecar file {str(path)!r}: {reason}") from error
        notes.append(f"{path.name}: is not UTF-8, so it was read as Windows-1252 (Latin-1)")
    if "\0" in text:
        raise IngestError(f"cannot read the sidecar file {str(path)!r}: it is not text")
    return text


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text, parse_int=lambda digits: int(digits) if len(digits) <= 20 else digits)
    except RecursionError:
        raise IngestError(f"{where}: nested too deeply to be a sidecar") from None
    except ValueError as error:
        raise IngestError(f"{where}: not JSON ({error})") from error


def _from_json(text: str, name: str, notes: list[str]) -> Columns:
    try:
        content = _json(text, name)
    except IngestError:
        first, _, rest = text.partition("\n")  # JSON Lines under another name
        if rest and first.strip().startswith("{") and first.strip().endswith("}"):
            return _from_json_lines(text, name, notes)
        raise
    if isinstance(content, Mapping) and (rows := _dataset_rows(content)) is not None:
        content = rows
    if isinstance(content, Mapping):
        return _by_name(content, name, notes)
    if isinstance(content, list) and all(isinstance(row, Mapping) for row in content):
        return _by_image(list(enumerate(content, start=1)), name, notes, "row")
    raise IngestError(f"{name}: needs an object of objects by file name, or a list of objects that name their file")


def _dataset_rows(content: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """The rows of a list of images beside other facts, None for other JSON.

    Source: COCO's data format (cocodataset.org/#format-data), whose captions and categories are lists of their own.
    """
    lists = {key: rows for key, rows in content.items() if isinstance(rows, list) and rows}
    named = [key for key, rows in lists.items() if all(isinstance(row, Mapping) and name_column(row) for row in rows)]
    if "images" not in named and len(named) != 1:
        return None
    images = lists["images" if "images" in named else named[0]]
    names = {row.get("id"): row.get("name") for row in _mappings(content.get("categories"))}
    captions: dict[Any, list[str]] = defaultdict(list)
    categories: dict[Any, dict[Any, None]] = defaultdict(dict)
    for row in _mappings(content.get("annotations")):
        image, caption, category = row.get("image_id"), row.get("caption"), names.get(row.get("category_id"))
        if isinstance(caption, str):
            captions[image].append(caption)
        if category is not None:
            categories[image][category] = None  # a set that keeps its order
    rows = []
    for row in images:
        key = row.get("id")
        said = {"caption": "\n".join(captions[key])} if key in captions else {}
        rows.append({**said, **({"categories": list(categories[key])} if key in categories else {}), **row})
    return rows


def _mappings(rows: object) -> Iterator[Mapping[str, Any]]:
    """The objects in a list whose values may be keys."""
    for row in rows if isinstance(rows, list) else ():
        if isinstance(row, Mapping) and not any(isinstance(row.get(key), list | Mapping) for key in _COCO_KEYS):
            yield row


def _from_json_lines(text: str, name: str, notes: list[str]) -> Columns:
    rows: list[tuple[int, Mapping[str, Any]]] = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        row = _json(line, f"{name}: line {number}")
        if not isinstance(row, Mapping):
            raise IngestError(f"{name}: line {number}: needs an object that names its file, got {type(row).__name__}")
        rows.append((number, row))
    return _by_image(rows, name, notes, "line")


def _from_csv(text: str, name: str, notes: list[str], delimiters: str = ",;\t|") -> Columns:
    return _by_image(table_rows(text, name, delimiters, notes), name, notes, "line")


def _from_tsv(text: str, name: str, notes: list[str]) -> Columns:
    return _from_csv(text, name, notes, "\t,;|")


_PARSERS: dict[str, Callable[[str, str, list[str]], Columns]] = {
    ".json": _from_json,
    ".jsonl": _from_json_lines,
    ".ndjson": _from_json_lines,
    ".csv": _from_csv,
    ".tsv": _from_tsv,
    ".tab": _from_tsv,
}


# ------------------------------------------------------------------------------------------ rows to images


def _by_name(content: Mapping[Any, Any], name: str, notes: list[str]) -> Columns:
    rows: list[tuple[str, Mapping[str, Any]]] = []
    for image, values in content.items():
        if not isinstance(image, str | os.PathLike) or not isinstance(values, Mapping | str):
            raise IngestError(f"{name}: {image!r}: needs an object of columns, got {type(values).__name__}")
        rows.append((image_key(os.fspath(image)), {"text": values} if isinstance(values, str) else values))
    return _joined(rows, name, notes)


def _by_image(rows: Sequence[tuple[int, Mapping[str, Any]]], name: str, notes: list[str], row_name: str) -> Columns:
    """Columns by image. All captions of an image are kept; of other values the last counts, and a note says so."""
    guess = None if any(name_column(row) for _, row in rows) else guessed_name_column([row for _, row in rows])
    if guess is not None:
        notes.append(f"{name}: images are named by the column {guess!r}")
    named: list[tuple[str, Mapping[str, Any]]] = []
    nameless: list[int] = []
    for number, row in rows:
        key = name_column(row) or guess
        if key is None or row.get(key) is None:
            nameless.append(number)
            continue
        image = image_key(str(row[key]))
        named.append((image, {k: v for k, v in row.items() if k != key and not repeats_name(k, v, image)}))
    if nameless and len(nameless) == len(rows):
        raise IngestError(f"{name}: {row_name} {nameless[0]} has none of the columns {', '.join(NAME_COLUMNS)}")
    if nameless:
        notes.append(f"{name}: {len(nameless)} rows name no image: {row_name} {', '.join(map(str, nameless[:3]))}")
    return _joined(named, name, notes)


def _joined(rows: Sequence[tuple[str, Mapping[str, Any]]], name: str, notes: list[str]) -> Columns:
    """Columns by image, of rows that may name one image several times."""
    columns: Columns = {}
    replaced: list[str] = []
    for image, row in rows:
        values, differs = _merged(columns.get(image, {}), row)
        replaced += [image] if differs else []
        columns[image] = values
    if replaced:
        notes.append(f"{name}: {len(replaced)} images have rows that differ, the later counts: {listed(replaced)}")
    return columns


def _merged(
    before: Mapping[str, Any], after: Mapping[str, Any], *, later_counts: bool = True
) -> tuple[dict[str, Any], bool]:
    """The columns of two rows of one image, all captions among them, and whether any other value is lost."""
    merged, differs = {**before, **after} if later_counts else {**after, **before}, False
    for key in before.keys() & after.keys():
        old, new = before[key], after[key]
        if old == new:
            continue
        if header(key) in TEXT_COLUMNS and isinstance(old, str) and isinstance(new, str):
            merged[key] = f"{old}\n{new}"
        else:
            differs = True
    return merged, differs
