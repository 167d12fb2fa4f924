"""Metadata files beside the images: JSON, JSON Lines, CSV and TSV, whose rows name an image and say something about it.

Owns how such a file names its images, what its values become, and which row belongs to which image. What is not used
is counted and said. Opens no image and knows no store.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import math
import os
import posixpath
import re
import threading
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, time
from decimal import Decimal
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal, TypeAlias
from urllib.parse import unquote

from mm_retriever.errors import IngestError, shown
from mm_retriever.ingest.sources import Source, items

SidecarSource: TypeAlias = str | Path | Mapping[str, Mapping[str, Any]] | Literal[False]
"""A file, or the same as a mapping; False: none, not even one that lies in the folder."""

FOUND_NAMES = ("metadata.jsonl", "metadata.csv")
"""What Hugging Face image folders call their sidecar; found without being named."""

NAME_COLUMNS = ("file_path", "file_name", "filename", "file", "path", "image_path", "image")
"""The usual names of the column that says which image a row is about; a few more are understood."""

TEXT_COLUMNS = ("text", "caption")
"""The first of these that a row has becomes the text of its node."""

MAX_ROW_BYTES = 60_000
"""Of the columns of one image, and of its text: what Milvus holds, less what ingestion adds."""

_NAMES_SHOWN = 3
_LONGEST_INTEGER = 2**63 - 1
_EXACT_FLOAT = 2**53

# The first that a row has names its image. `SourceFile` is exiftool's, which writes a bare `FileName` too.
_NAMES = (
    *("sourcefile", "filepath", "filename", "file", "path", "imagepath", "image", "imagefile", "imagename"),
    *("imagefilename", "filelocation", "img", "imgpath", "imgname", "url", "imageurl", "imgurl"),
)
_ID_NAMES = ("imageid", "id")
_IMAGE_NAME = re.compile(r"[^\r\n]*\.(jpe?g|jpe|jfif|png|webp|gif|tiff?|bmp|avif|hei[cf]|pnm|ppm)", re.IGNORECASE)

_MISSING = frozenset(("", "n/a", "null", "none", "nan", "-"))
_MISSING_NUMBERS = _MISSING | {"na", "n.a.", "n.a", "--", "?", "nil", "#n/a", "#value!", "undefined", "<na>"}
_INTEGER = re.compile(r"-?(0|[1-9][0-9]*)")
_DECIMAL = re.compile(r"-?((0|[1-9][0-9]*)(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?")
_THOUSANDS = re.compile(r"-?[1-9][0-9]{0,2}(,[0-9]{3})+(\.[0-9]+)?")
_DECIMAL_COMMA = re.compile(r"-?(0|[1-9][0-9]*|[1-9][0-9]{0,2}(\.[0-9]{3})+)(,[0-9]+)?")
_CSV_LIMIT = threading.Lock()


@dataclass(frozen=True)
class SidecarRow:
    """What a sidecar says about one image.

    Args:
        text: of its node; "" if it says none.
        columns: metadata.
    """

    text: str = ""
    columns: dict[str, Any] = field(default_factory=dict)


class Sidecar:
    """Rows by the name of the image: a path, a file name, or one without its suffix.

    Args:
        columns: columns by name.
        source: what to call the sidecar in messages.
        notes: what was noticed while it was read.
    """

    def __init__(
        self, columns: Mapping[str, Mapping[str, Any]], *, source: str = "sidecar", notes: Sequence[str] = ()
    ) -> None:
        self.source = source
        self.rows: dict[str, SidecarRow] = {}
        left_out: Counter[str] = Counter()
        for name, values in columns.items():
            self.rows[_key(name)] = _row(values, f"{source}: {name!r}", left_out)
        self.notes = (*notes, *_left_out_notes(left_out, source))

    def __len__(self) -> int:
        return len(self.rows)

    def columns(self, *names: str) -> dict[str, Any]:
        """Return the columns under the first of the names that has any; the names are compared as they are."""
        return next((self.rows[key].columns for key in map(_key, names) if key in self.rows), {})


def read_sidecar(source: str | Path | Mapping[str, Mapping[str, Any]]) -> Sidecar:
    """Return the rows of a sidecar file.

    Args:
        source: a `.json` file (an object of objects by file name, or a list of objects that name their file, such as
            exiftool writes), a `.jsonl` file with such an object on each line, a `.csv` or `.tsv` file with a header,
            or a mapping like the first kind of JSON. In CSV a column is numeric where every cell is a number or
            missing (empty, N/A, null, None, NaN, "-").

    Raises:
        IngestError: the file cannot be read, or names no images.
    """
    if isinstance(source, Mapping):
        return Sidecar(_checked(source, "sidecar"))
    path = Path(source)
    kind = _KINDS.get(path.suffix.lower())
    if kind is None:
        raise IngestError(f"sidecar file {path.name!r}: give a .json, .jsonl, .csv or .tsv file")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise IngestError(f"cannot read the sidecar file {str(path)!r}: {error.strerror or error}") from error
    text, notes = _decoded(data, path)
    return Sidecar(kind(text, path.name, notes), source=path.name, notes=notes)


def find_sidecars(folder: str) -> Sidecar:
    """Return the rows of the `metadata.jsonl` and `metadata.csv` files in a folder and up to two levels below it.

    Names are taken from where each file lies. One that names no images, or cannot be read, is said in the notes.
    """
    rows: dict[str, Mapping[str, Any]] = {}
    notes: list[str] = []
    sources: list[str] = []
    for place in _folders(folder, levels=2):
        for name in FOUND_NAMES:
            path = Path(place, name)
            below = posixpath.relpath(Path(place).as_posix(), Path(folder).as_posix())
            where = name if below == "." else f"{below}/{name}"
            try:
                if not path.is_file():
                    continue
            except OSError as error:  # of a folder that cannot be looked into, which must not end the run
                notes.append(f"{where} in the folder cannot be looked for: {error.strerror or error}")
                continue
            try:
                found = read_sidecar(path)
            except IngestError as error:
                notes.append(f"{where} in the folder is not used: {error}")
                continue
            sources.append(where)
            notes += found.notes
            for key, row in found.rows.items():
                own = key if below == "." or os.path.isabs(key) else f"{below}/{key}"  # noqa: PTH117 - a key
                rows.setdefault(own, {**row.columns, **({"text": row.text} if row.text else {})})
    if sources:
        notes.insert(0, f"columns are taken from {_listed(sources)}, found in the folder")
    return Sidecar(rows, source=", ".join(sources[:_NAMES_SHOWN]) or "sidecar", notes=notes)


# ------------------------------------------------------------------------------------------ which row is whose


def match_sidecar(sidecar: SidecarSource | None, source: Source, folder: str | None) -> SidecarMatch:
    """Return whose the rows are of the sidecar that is given, or else of those that lie in the folder.

    Args:
        sidecar: None looks into the folder; False takes none.
        source: of the images. What can be gone through only once is not gone through here.
        folder: the source, if it is one.
    """
    if sidecar is None:
        rows = find_sidecars(folder) if folder is not None else Sidecar({})
    else:
        rows = Sidecar({}) if sidecar is False else read_sidecar(sidecar)
    if not isinstance(source, str | os.PathLike | Sequence):
        return SidecarMatch(rows, None)
    return SidecarMatch(rows, ((item.sidecar_names, item.path) for item in items(source, lambda name, reason: None)))


class SidecarMatch:
    """Finds the row of each image, and knows at the end which rows were not used.

    A row belongs to the image of that path; or else, where only one image fits, to the one whose path ends like it,
    has that file name, or that name without its suffix. Case, Unicode form, backslashes and `./` make no difference
    there.

    Args:
        sidecar: the rows.
        images: names and path of everything that will be asked for; None if nobody knows yet, and then a name that
            fits several images is given to the first.
    """

    def __init__(self, sidecar: Sidecar, images: Iterable[tuple[Sequence[str], str | None]] | None) -> None:
        self._sidecar = sidecar
        self._exact = {key: [key] for key in sidecar.rows}
        self._folded: dict[str, list[str]] = defaultdict(list)
        for key in sidecar.rows:
            self._folded[_folded(key)].append(key)
        self._endings: dict[str, list[str]] = defaultdict(list)  # of keys with folders, from the second part on
        for key in sidecar.rows:
            parts = _folded(key).split("/")
            for start in range(1, len(parts) - 1):
                self._endings["/".join(parts[start:])].append(key)
        self._owners: dict[str, tuple[int, str]] = {}  # row -> how well it fits its image, and that image
        self._shared: set[str] = set()  # rows that fit several images equally well
        self._doubtful: set[str] = set()  # images that several rows fit equally well
        self._used: set[str] = set()
        self._known = images is not None
        if self._sidecar.rows:
            for names, path in images or ():
                self._claim(names, path)

    def row(self, names: Sequence[str], path: str | None) -> SidecarRow | None:
        """Return what the sidecar says about an image.

        Args:
            names: the path below the folder or as it was given, and the file name.
            path: the absolute path; None for a URL.
        """
        if not names or not self._sidecar.rows:
            return None
        if not self._known:
            self._claim(names, path)
        fit, key = self._best(names, path)
        if key is None or self._owners.get(key) != (fit, path or names[0]) or (self._known and key in self._shared):
            return None
        self._used.add(key)
        return self._sidecar.rows[key]

    @property
    def has_rows(self) -> bool:
        """Whether there is a sidecar that says anything."""
        return bool(self._sidecar.rows)

    @property
    def unused(self) -> list[str]:
        """Names of the rows that belong to no image that was asked for."""
        return [key for key in self._sidecar.rows if key not in self._used]

    @property
    def notes(self) -> tuple[str, ...]:
        """What is to be said: about the file, rows that fit several images, and rows that fit none."""
        source, unused = self._sidecar.source, self.unused
        notes = [*self._sidecar.notes]
        if self._shared:
            names = _listed(sorted(self._shared))
            notes.append(f"{source}: {names}: several images fit; give their paths below the folder instead")
        if self._doubtful:
            notes.append(f"{source}: {_listed(sorted(self._doubtful))}: several rows fit, so none was taken")
        if lost := [key for key in unused if key not in self._shared]:
            notes.append(f"{source}: {len(lost)} of {len(self._sidecar)} rows match no image: {_listed(lost)}")
        return tuple(notes)

    def _claim(self, names: Sequence[str], path: str | None) -> None:
        if not names:
            return
        image = path or names[0]
        fit, key = self._best(names, path)
        if key is None:
            if fit >= 0:
                self._doubtful.add(image)
            return
        owner = self._owners.get(key)
        if owner is None or fit < owner[0]:
            self._owners[key] = (fit, image)
            self._shared.discard(key)
        elif fit == owner[0] and image != owner[1]:
            self._shared.add(key)

    def _best(self, names: Sequence[str], path: str | None) -> tuple[int, str | None]:
        """How well the best row fits, 0 is best, and that row; (-1, None) if none fits, (n, None) if several do."""
        for fit, keys in self._candidates(names, path):
            if keys:
                return fit, keys[0] if len(keys) == 1 else None
        return -1, None

    def _candidates(self, names: Sequence[str], path: str | None) -> Iterator[tuple[int, list[str]]]:
        """Rows for the image and how well they fit, the best first."""
        below, name = _key(names[0]), _key(names[-1])
        whole = _key(path) if path is not None else below
        yield 0, self._exact.get(below, [])
        yield 0, self._exact.get(whole, [])
        folded_below, folded_name = _folded(below), _folded(name)
        yield 1, self._folded.get(folded_below, [])
        parts = _folded(whole).split("/")
        endings = ["/".join(parts[start:]) for start in range(len(parts) - 1)]
        for ending in endings:
            yield 2, self._folded.get(ending, [])
        # A longer path, from another machine, that ends with the folder and what is in it.
        depth = folded_below.count("/") + 2
        yield 3, self._endings.get("/".join(parts[-depth:]), []) if len(parts) > depth else []
        yield 4, self._exact.get(name, [])
        yield 5, self._folded.get(folded_name, [])
        yield 6, self._without_suffix(folded_below)
        for ending in endings:
            yield 7, self._without_suffix(ending)
        yield 8, self._without_suffix(folded_name)

    def _without_suffix(self, name: str) -> list[str]:
        return [key for key in self._folded.get(posixpath.splitext(name)[0], []) if not _IMAGE_NAME.fullmatch(key)]


def _key(name: str) -> str:
    """The name of an image as it is compared: a file URL as a path, '/' between folders, no './'."""
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


def _folded(key: str) -> str:
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", key).casefold())


def _listed(names: Sequence[str]) -> str:
    first = ", ".join(repr(name[:120]) for name in names[:_NAMES_SHOWN])
    return f"{first} and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else first


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


# ------------------------------------------------------------------------------------------ values


def _row(values: Mapping[str, Any], where: str, left_out: Counter[str]) -> SidecarRow:
    columns: dict[str, Any] = {}
    for key, value in values.items():
        if not isinstance(key, str) or not key:
            raise IngestError(f"{where}: a column needs a name, got {shown(key)}")
        if _is_missing(plain := _plain(value, f"{where}: column {key!r}")):
            continue
        columns[key] = plain
    text = ""
    for name in TEXT_COLUMNS:
        found = next((key for key in columns if _header(key) == name), None)
        if found is not None and isinstance(columns[found], str | int | float | list):
            value = columns.pop(found)
            text = "\n".join(map(str, value)) if isinstance(value, list) else str(value)
            if len(text.encode("utf-8", "replace")) > MAX_ROW_BYTES:
                left_out[found] += 1
                text = ""
            break
    columns, too_long = within_bounds(columns)
    left_out.update(too_long)
    return SidecarRow(text, columns)


def within_bounds(columns: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return the columns without the largest, so that Milvus can hold the others, and the names of those left out."""
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


def _left_out_notes(left_out: Counter[str], source: str) -> list[str]:
    return [
        f"{source}: column {key!r} is left out of {count} rows: more than {MAX_ROW_BYTES} bytes for one image"
        for key, count in left_out.items()
    ]


def _is_missing(value: object) -> bool:
    return value is None or value == "" or (isinstance(value, float) and not math.isfinite(value))


def _plain(value: Any, where: str, depth: int = 0) -> Any:
    """A value as JSON has it: what numpy, pandas, dates and decimals bring becomes numbers and text."""
    if value is None or isinstance(value, bool | str):
        return value if not isinstance(value, str) else str(value)
    if depth > 16:
        raise IngestError(f"{where}: nested more than 16 deep")
    if isinstance(value, Integral):
        return int(value) if abs(int(value)) <= _LONGEST_INTEGER else str(int(value))  # exact, if only as text
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


# ------------------------------------------------------------------------------------------ files


def _decoded(data: bytes, path: Path) -> tuple[str, list[str]]:
    if data[:4] == b"PK\x03\x04" or data[:8] == b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1":
        raise IngestError(f"{path.name}: is a workbook or an archive, not text; save it as CSV")
    encoding = "utf-8-sig"
    if data[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        encoding = "utf-16"
    elif b"\0" in data[:200]:
        encoding = "utf-16-be" if data[:1] == b"\0" else "utf-16-le"
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        if encoding != "utf-8-sig":
            raise IngestError(f"cannot read the sidecar file {str(path)!r}: {error}") from error
        text, encoding = data.decode("cp1252", "replace"), "cp1252"
    if "\0" in text:
        raise IngestError(f"cannot read the sidecar file {str(path)!r}: it is not text")
    notes = [f"{path.name}: is not UTF-8, so it was read as Windows-1252 (Latin-1)"] if encoding == "cp1252" else []
    return text, notes


Rows: TypeAlias = list[tuple[int, Mapping[str, Any]]]
"""Rows of a file, each with its number."""


def _loads(text: str, where: str) -> Any:
    try:
        return json.loads(text, parse_int=_json_integer)
    except RecursionError:
        raise IngestError(f"{where}: nested too deeply to be a sidecar") from None
    except ValueError as error:
        raise IngestError(f"{where}: not JSON ({error})") from error


def _json_integer(digits: str) -> int | str:
    return int(digits) if len(digits) <= 20 else digits


def _from_json(text: str, name: str, notes: list[str]) -> dict[str, dict[str, Any]]:
    try:
        content = _loads(text, name)
    except IngestError:
        lines = text.split("\n")  # JSON Lines under another name
        if len(lines) > 1 and lines[0].strip().startswith("{") and lines[0].strip().endswith("}"):
            return _from_json_lines(text, name, notes)
        raise
    if isinstance(content, Mapping):
        return _checked(content, name)
    if isinstance(content, list) and all(isinstance(row, Mapping) for row in content):
        return _by_image(list(enumerate(content, start=1)), name, notes, "row")
    raise IngestError(f"{name}: needs an object of objects by file name, or a list of objects that name their file")


def _from_json_lines(text: str, name: str, notes: list[str]) -> dict[str, dict[str, Any]]:
    rows: Rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        row = _loads(line, f"{name}: line {number}")
        if not isinstance(row, Mapping):
            raise IngestError(f"{name}: line {number}: needs an object that names its file, got {type(row).__name__}")
        rows.append((number, row))
    return _by_image(rows, name, notes, "line")


def _checked(content: Mapping[Any, Any], name: str) -> dict[str, dict[str, Any]]:
    rows: dict[str, dict[str, Any]] = {}
    for image, values in content.items():
        if not isinstance(image, str | os.PathLike) or not isinstance(values, Mapping | str):
            raise IngestError(f"{name}: {image!r}: needs an object of columns, got {type(values).__name__}")
        rows[os.fspath(image)] = {"text": values} if isinstance(values, str) else dict(values)
    return rows


def _from_csv(text: str, name: str, notes: list[str]) -> dict[str, dict[str, Any]]:
    return _from_table(text, name, notes, ",;\t|")


def _from_tsv(text: str, name: str, notes: list[str]) -> dict[str, dict[str, Any]]:
    return _from_table(text, name, notes, "\t,;|")


def _from_table(text: str, name: str, notes: list[str], delimiters: str) -> dict[str, dict[str, Any]]:
    first, _, rest = text.partition("\n")
    if separator := re.fullmatch(r"sep=(.)\r?", first, re.IGNORECASE):  # Excel's own way to name it
        text, delimiters = rest, separator[1]
    delimiter = _delimiter(text, delimiters)
    try:
        with _long_fields():
            reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
            lines = [(reader.line_num, cells) for cells in reader if any(cell.strip() for cell in cells)]
    except csv.Error as error:
        raise IngestError(f"{name}: not CSV ({error})") from error
    if not lines:
        return {}
    header = _headers(lines[0][1], name, notes)
    width = len(header)
    for number, cells in lines[1:]:
        if any(cell.strip() for cell in cells[width:]):
            raise IngestError(f"{name}: line {number} has more cells than the header")
    columns = {
        key: [cells[place] if place < len(cells) else "" for _, cells in lines[1:]]
        for place, key in enumerate(header)
        if key
    }
    names = {key for key in columns if _header(key) in (*_NAMES, *TEXT_COLUMNS)}
    typed = {
        key: _typed(cells, is_text=key in names, comma=delimiter != ";", where=f"{name}: column {key!r}", notes=notes)
        for key, cells in columns.items()
    }
    rows: Rows = [
        (number, {key: cells[place] for key, cells in typed.items() if cells[place] is not None})
        for place, (number, _) in enumerate(lines[1:])
    ]
    if rows and not any(_name_key(row) for _, row in rows) and _IMAGE_NAME.fullmatch(lines[0][1][0].strip()):
        raise IngestError(f"{name}: the first line is no header but names an image; add one such as file_name,caption")
    return _by_image(rows, name, notes, "line")


def _delimiter(text: str, candidates: str) -> str:
    """The sign that splits the first line into the most columns, first of all one that names the image."""
    first = next((line for line in text.splitlines() if line.strip()), "")
    scores: dict[str, tuple[bool, int]] = {}
    for sign in candidates:
        with _long_fields():
            try:
                cells = next(csv.reader([first], delimiter=sign), [])
            except csv.Error:
                continue
        scores[sign] = (any(_header(cell) in _NAMES for cell in cells), len(cells))
    return max(scores, key=scores.__getitem__, default=",")  # of equals the first


class _long_fields:  # noqa: N801 - a context
    """Lets fields of any length through the csv module, whose limit is one for the whole process."""

    def __enter__(self) -> None:
        _CSV_LIMIT.acquire()
        self._before = csv.field_size_limit(2**31 - 1)

    def __exit__(self, *error: object) -> None:
        csv.field_size_limit(self._before)
        _CSV_LIMIT.release()


def _headers(cells: Sequence[str], name: str, notes: list[str]) -> list[str]:
    """Names of the columns, "" for one without; of two equal names the second gets a number."""
    header: list[str] = []
    for cell in cells:
        key = " ".join(cell.split())
        if key and key in header:
            number = next(n for n in range(2, len(cells) + 2) if f"{key}_{n}" not in header)
            notes.append(f"{name}: there are two columns {key!r}; the later one is {key}_{number}")
            key = f"{key}_{number}"
        header.append(key)
    if "" in header[:-1] or (len(header) > 1 and header[-1] == "" and len(cells) == 1):
        notes.append(f"{name}: {header.count('')} column without a name is left out")
    return header


def _typed(cells: Sequence[str], *, is_text: bool, comma: bool, where: str, notes: list[str]) -> list[Any]:
    """The cells as numbers where all that are not missing are numbers, else as text; None for what is missing."""
    stripped = [cell.strip() for cell in cells]
    if not is_text:
        numbers = [cell for cell in stripped if cell.casefold() not in _MISSING_NUMBERS]
        read = _number_reader(numbers, comma=comma) if numbers else None
        if read is not None:
            return [None if cell.casefold() in _MISSING_NUMBERS else read(cell) for cell in stripped]
    if gone := sum(1 for cell in stripped if cell and cell.casefold() in _MISSING):
        notes.append(f"{where}: {gone} cells such as N/A, null, None or - are taken as missing")
    return [None if plain.casefold() in _MISSING else cell for cell, plain in zip(cells, stripped, strict=True)]


def _number_reader(cells: Sequence[str], *, comma: bool) -> Callable[[str], int | float] | None:
    """How to read the cells if all are numbers; None if not, or if some would lose digits.

    Args:
        cells: none of them missing.
        comma: whether "1,234" is one thousand and more; otherwise a comma needs another cell to say what it means.
    """
    if all(_INTEGER.fullmatch(cell) for cell in cells):
        fits = all(len(cell) <= 20 and abs(int(cell)) <= _LONGEST_INTEGER for cell in cells)
        return int if fits else None
    if all(_DECIMAL.fullmatch(cell) for cell in cells):
        read: Callable[[str], int | float] = float
    elif all(_DECIMAL.fullmatch(cell) or _THOUSANDS.fullmatch(cell) for cell in cells) and (
        comma or any("." in cell for cell in cells)
    ):
        read = _without_commas
        if all("." not in cell for cell in cells):
            return _integer_without_commas
    elif all(_DECIMAL_COMMA.fullmatch(cell) for cell in cells) and any(
        "," in cell and not _THOUSANDS.fullmatch(cell) for cell in cells
    ):
        read = _with_decimal_comma
    else:
        return None
    for cell in cells:
        value = read(cell)
        if not math.isfinite(value) or (_INTEGER.fullmatch(cell) and abs(value) > _EXACT_FLOAT):
            return None
    return read


def _without_commas(cell: str) -> float:
    return float(cell.replace(",", ""))


def _integer_without_commas(cell: str) -> int:
    return int(cell.replace(",", ""))


def _with_decimal_comma(cell: str) -> float:
    return float(cell.replace(".", "").replace(",", "."))


# ------------------------------------------------------------------------------------------ rows to images


def _by_image(rows: Rows, name: str, notes: list[str], what: str) -> dict[str, dict[str, Any]]:
    """Columns by image. Several captions of one are all kept; of other values the later counts, which is said."""
    other = None if any(_name_key(row) for _, row in rows) else _other_name_key([row for _, row in rows])
    if other is not None:
        notes.append(f"{name}: images are named by the column {other!r}")
    found: dict[str, dict[str, Any]] = {}
    nameless: list[int] = []
    replaced: list[str] = []
    for number, row in rows:
        key = _name_key(row) or (other if other is not None and row.get(other) is not None else None)
        if key is None:
            nameless.append(number)
            continue
        image = str(row[key])
        values = {one: value for one, value in row.items() if one != key and not _names_same(one, value, image)}
        if (before := found.get(image)) is not None:
            values, differs = _merged(before, values)
            replaced += [image] if differs else []
        found[image] = values
    if nameless and len(nameless) == len(rows):
        raise IngestError(f"{name}: {what} {nameless[0]} has none of the columns {', '.join(NAME_COLUMNS)}")
    if nameless:
        notes.append(
            f"{name}: {len(nameless)} rows name no image: {what} {', '.join(map(str, nameless[:_NAMES_SHOWN]))}"
        )
    if replaced:
        notes.append(f"{name}: {len(replaced)} images have rows that differ, the later counts: {_listed(replaced)}")
    return found


def _merged(before: Mapping[str, Any], after: Mapping[str, Any]) -> tuple[dict[str, Any], bool]:
    merged, differs = {**before, **after}, False
    for key in before.keys() & after.keys():
        if before[key] == after[key]:
            continue
        if _header(key) in TEXT_COLUMNS and isinstance(before[key], str) and isinstance(after[key], str):
            merged[key] = f"{before[key]}\n{after[key]}"
        else:
            differs = True
    return merged, differs


def _header(key: str) -> str:
    """The name of a column as it is compared: `File Name`, `file_name` and exiftool's `File:FileName` are one."""
    return re.sub(r"[\s_-]", "", key.rsplit(":", 1)[-1]).casefold()


def _name_key(row: Mapping[str, Any]) -> str | None:
    names = {_header(key): key for key, value in row.items() if isinstance(value, str) and value.strip()}
    return next((names[name] for name in _NAMES if name in names), None)


def _other_name_key(rows: Sequence[Mapping[str, Any]]) -> str | None:
    """The column whose values all look like files of images, or else one called `id`."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    for key in keys:
        values = [row[key] for row in rows if row.get(key) is not None]
        if values and all(isinstance(value, str) and _IMAGE_NAME.fullmatch(value.strip()) for value in values):
            return key
    return next((key for name in _ID_NAMES for key in keys if _header(key) == name), None)


def _names_same(key: str, value: object, image: str) -> bool:
    """Whether a column names the image again, as exiftool's `FileName` does beside `SourceFile`."""
    if _header(key) not in _NAMES or not isinstance(value, str):
        return False
    return _folded(posixpath.basename(_key(value))) == _folded(posixpath.basename(_key(image)))


_KINDS = {
    ".json": _from_json,
    ".jsonl": _from_json_lines,
    ".ndjson": _from_json_lines,
    ".csv": _from_csv,
    ".tsv": _from_tsv,
    ".tab": _from_tsv,
}
