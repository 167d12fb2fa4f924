"""What Milvus Lite lacks against power cuts and bit rot: syncing, checksums of its files, copies of two of them.

Milvus Lite syncs its manifest but not the data that the manifest names, then removes the log that still had the rows.
So `guard` has it sync each data file before the manifest names it, and `sync_logs` syncs its logs. For each file that
Milvus Lite will read again, the folder `mm_retriever` of its collection has a record of checksums; `lite_repair.py`
compares the files with their records before Milvus Lite opens them.

A record is a text file of lines "start end crc32 check": the checksum of the bytes from start to end, then a checksum
of the line itself. A line that fails its own check is ignored. A log grows, and its record grows with it. The record of
any other file has a line for the whole, one for each mebibyte of a larger one, and "stamp ... check", which tells the
file as it was then from any later one: a file that nobody touched since is looked at in parts when it is opened.
"""

from __future__ import annotations

import functools
import json
import os
import random
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from mm_retriever.errors import StoreError
from mm_retriever.files import flush, sync, write_atomically
from mm_retriever.threads import ForkLock

RECORDS = "mm_retriever"
"""Our folder in the folder of a collection."""

COPIED = ("manifest.json", "schema.json")
_CHUNK = 2**20
_guarded: set[str] = set()
_installing = ForkLock()
_synced: dict[str, tuple[int, ...]] = {}  # log: its state when this process last synced it


# ------------------------------------------------------------------------------------------------ syncing


def sync_folders(lowest: Path, highest: Path) -> None:
    """Sync the folder entries of the lowest folder, the highest and all between them."""
    for folder in (lowest, *lowest.parents):
        with suppress(OSError):  # some file systems sync no folders
            sync(folder)
        if folder == highest:
            return


def sync_new_collection(place: Path, name: str) -> None:
    """Sync a new or emptied collection and all folders above it to disk."""
    folder = place / "collections" / name
    for file in COPIED:
        with suppress(FileNotFoundError):
            sync(folder / file)
    sync_folders(folder, place)
    device = place.stat().st_dev
    for above in place.parents:  # they may have been created for this file
        if above.stat().st_dev != device:
            return
        with suppress(OSError):  # another user's folder
            sync(above)


def sync_renamed_collection(place: Path, name: str) -> None:
    """Sync a renamed collection to disk; no request may reach it meanwhile."""
    folder = place / "collections" / name
    for record, file in list(recorded_files(folder)):
        if not file.exists():  # a log that renaming moved into a data file; the next log may get its number
            record.unlink(missing_ok=True)
    keep_copy(folder, "schema.json")  # it has the name
    sync_new_collection(place, name)


def sync_logs(place: Path, name: str) -> None:
    """Sync every row and removal that Milvus Lite has acknowledged for a collection to disk.

    Rows that are no longer in a log are in a data file, which was synced before the log was removed. Any process of the
    user may call this, not only the one that serves the file.

    Raises:
        OSError: the disk failed or is full; the last rows may not survive a power cut.
    """
    folder = place / "collections" / name
    for log in sorted(folder.glob("wal/wal_*_*.arrow")):
        try:
            with opened(log) as descriptor:
                _sync_log(folder, log, descriptor)
        except FileNotFoundError:  # its rows went into a data file meanwhile
            _synced.pop(str(log), None)


def _sync_log(folder: Path, log: Path, descriptor: int) -> None:
    stat = os.fstat(descriptor)
    state = (stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)  # inodes are used again
    known = _synced.get(str(log))
    if known == state:
        return
    flush(descriptor)
    if known is None or known[0] != state[0]:
        sync_folders(log.parent, folder)
    # The record reveals bit rot; it need not survive a power cut itself.
    record = record_path(folder, log)
    start = max((span[1] for span in _read_record(record)), default=0)
    if start < stat.st_size:
        record.parent.mkdir(exist_ok=True)
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW
        with os.fdopen(os.open(record, flags, 0o666), "ab", buffering=0) as file:
            file.write(_line(start, stat.st_size, _checksum(descriptor, start, stat.st_size)))
    _synced[str(log)] = state


# ------------------------------------------------------------------------------------------------ records and copies


def record_path(folder: Path, file: Path) -> Path:
    """Return the path of a file's record of checksums."""
    return folder / RECORDS / f"{quote(file.relative_to(folder).as_posix(), safe='')}.crc"


def recorded_files(folder: Path) -> Iterator[tuple[Path, Path]]:
    """Yield each record of a collection, and its file."""
    for record in (folder / RECORDS).glob("*.crc"):
        yield record, folder / unquote(record.name.removesuffix(".crc"))


def record_file(folder: Path, file: Path) -> None:
    """Record the checksums of a file that no longer changes."""
    whole, lines = 0, []
    with opened(file) as descriptor:
        status = os.fstat(descriptor)
        for start in range(0, status.st_size, _CHUNK):
            data = os.pread(descriptor, _CHUNK, start)
            whole = zlib.crc32(data, whole)
            lines.append(_line(start, start + len(data), zlib.crc32(data)))
    lines = [_line(0, status.st_size, whole), *(lines if len(lines) > 1 else ())]
    (folder / RECORDS).mkdir(exist_ok=True)
    write_atomically(record_path(folder, file), b"".join([_stamp(status), *lines]), synced=True)


def remove_file(folder: Path, file: Path) -> None:
    """Remove a file of a collection, and its record."""
    file.unlink()
    record_path(folder, file).unlink(missing_ok=True)


def is_recorded(folder: Path, file: Path) -> bool:
    """Whether a file has a record with at least one valid line."""
    return bool(_read_record(record_path(folder, file)))


def is_untouched(folder: Path, file: Path) -> bool:
    """Whether a file was not written to since it was recorded; bit rot goes unnoticed here."""
    try:
        return _stamp(file.lstat()) in record_path(folder, file).read_bytes().splitlines(keepends=True)
    except FileNotFoundError:
        return False


def damage(folder: Path, file: Path, *, sampled: bool = False) -> str | None:
    """Return how a file differs from its record; None if it does not, or has no record.

    Args:
        folder: of the collection.
        file: in it.
        sampled: read only the last mebibyte and one other.

    Raises:
        OSError: the file cannot be read.
    """
    spans = _read_record(record_path(folder, file))
    if not spans:
        return None
    end = max(stop for _, stop, _ in spans)
    whole = [span for span in spans if span[:2] == (0, end)]
    parts = [span for span in spans if span not in whole]
    checked = [parts[-1], random.choice(parts)] if sampled and parts else whole or parts  # noqa: S311
    with opened(file) as descriptor:
        size = os.fstat(descriptor).st_size
        if size < end or (size > end and file.suffix != ".arrow"):
            return f"{size} bytes, and it was written with {end}"
        for start, stop, checksum in checked:
            if _checksum(descriptor, start, stop) != checksum:
                return f"the bytes {start} to {stop} are not those that were written"
    return None


@contextmanager
def opened(path: Path) -> Iterator[int]:
    """Open a file of the store for reading and yield its descriptor; a link is refused."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _line(start: int, end: int, checksum: int) -> bytes:
    span = f"{start} {end} {checksum:08x}"
    return f"{span} {zlib.crc32(span.encode()):08x}\n".encode()


def _stamp(status: os.stat_result) -> bytes:
    """The line of a record that identifies the state of a file; early versions ignore it."""
    words = f"stamp {status.st_ino} {status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}"
    return f"{words} {zlib.crc32(words.encode()):08x}\n".encode()


def _read_record(record: Path) -> list[tuple[int, int, int]]:
    spans = []
    try:
        lines = record.read_bytes().splitlines(keepends=True)
    except FileNotFoundError:
        return []
    for line in lines:
        try:
            start, end, checksum, _ = line.split(b" ")
            span = (int(start), int(end), int(checksum, 16))
        except ValueError:
            continue
        if span[0] <= span[1] and _line(*span) == line:
            spans.append(span)
    return spans


def _checksum(descriptor: int, start: int, end: int) -> int:
    checksum = 0
    while start < end:
        data = os.pread(descriptor, min(_CHUNK, end - start), start)
        if not data:
            return -1
        checksum = zlib.crc32(data, checksum)
        start += len(data)
    return checksum


def _copy_path(folder: Path, name: str) -> Path:
    return folder / RECORDS / f"{name}.copy"


def keep_copy(folder: Path, name: str) -> None:
    """Keep a copy of a collection's manifest or schema, with its checksum."""
    content = (folder / name).read_bytes()
    if read_copy(folder, name) != content:
        (folder / RECORDS).mkdir(exist_ok=True)
        write_atomically(_copy_path(folder, name), f"{zlib.crc32(content):08x}\n".encode() + content, synced=True)


def read_copy(folder: Path, name: str) -> bytes | None:
    """Return the last good content of the file; None where there is no copy, or it is damaged itself."""
    try:
        checksum, _, content = _copy_path(folder, name).read_bytes().partition(b"\n")
    except FileNotFoundError:
        return None
    return content if checksum == f"{zlib.crc32(content):08x}".encode() else None


def damaged_files(place: Path) -> dict[str, str]:
    """Return how each file of a Milvus Lite file differs from its record or copy, by its path."""
    damaged: dict[str, str] = {}
    for folder in sorted((place / "collections").iterdir()) if (place / "collections").is_dir() else ():
        for record, file in sorted(recorded_files(folder)):
            try:
                reason = damage(folder, file)
            except FileNotFoundError:  # merged into another, or emptied: Milvus Lite removes what it no longer needs
                continue
            except OSError as error:
                reason = f"it cannot be read: {error.strerror or error}"
            if reason is not None and record.exists() and file.exists():
                damaged[str(file)] = reason
        for name in COPIED:
            copy = read_copy(folder, name)
            if copy is not None and not _agrees(folder / name, copy):
                damaged[str(folder / name)] = "it is not what was written"
    return damaged


def _agrees(file: Path, copy: bytes) -> bool:
    try:
        content = file.read_bytes()
        if content == copy:
            return True
        version, copied = (json.loads(text)["version"] for text in (content, copy))
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return file.name == "manifest.json" and isinstance(version, int) and version > copied


# ------------------------------------------------------------------------------------------------ inside Milvus Lite


def guard(place: Path) -> None:
    """Make Milvus Lite, in this process, sync and record what it writes below this folder.

    This replaces functions of milvus_lite 3.2, which offers no public way to act between writing a data file and naming
    it in the manifest. Without these steps a power cut could lose stored rows, so the file is not opened.

    Raises:
        StoreError: the installed milvus_lite lacks these functions.
    """
    with _installing:
        try:
            from milvus_lite.engine import compaction, flush
            from milvus_lite.storage.manifest import Manifest
            from milvus_lite.storage.segment import Segment

            steps: tuple[tuple[Any, str, Callable[[Any], Any]], ...] = (
                (flush, "write_data_file", _syncing),
                (flush, "write_delta_file", _syncing),
                (compaction, "write_data_file", _syncing),
                (Manifest, "save", _copying),
                (Segment, "build_or_load_index", _recording),
            )
            originals = [(owner, name, step, getattr(owner, name)) for owner, name, step in steps]
        except (ImportError, AttributeError) as error:
            raise StoreError(
                f"this package cannot protect stored rows from power cuts with the installed milvus-lite ({error}); "
                "install milvus-lite 3.2"
            ) from error
        for owner, name, step, original in originals:
            if not hasattr(original, "of_mm_retriever"):
                replacement: Any = functools.wraps(original)(step(original))
                replacement.of_mm_retriever = True
                setattr(owner, name, replacement)
        _guarded.add(str(place))


def _is_guarded(path: Path) -> bool:
    return any(str(above) in _guarded for above in path.parents)


def _syncing(write: Callable[..., str]) -> Callable[..., str]:
    """A writer of data or delta files that syncs and records them before the manifest can name them."""

    def written(table: Any, partition_dir: str, *arguments: Any, **options: Any) -> str:
        name = write(table, partition_dir, *arguments, **options)
        file = Path(partition_dir, name)
        if _is_guarded(file):
            folder = Path(partition_dir).parent.parent
            sync(file)
            sync_folders(file.parent, folder)
            record_file(folder, file)
        return name

    return written


def _copying(save: Callable[..., None]) -> Callable[..., None]:
    """A `save` that keeps copies of manifest and schema."""

    def saved(manifest: Any) -> None:
        save(manifest)
        folder = Path(manifest.data_dir)
        if _is_guarded(folder):
            for name in COPIED:
                keep_copy(folder, name)

    return saved


def _recording(build_or_load: Callable[..., None]) -> Callable[..., None]:
    """A builder that records index files; one without a record is built anew at the next opening."""

    def built(segment: Any, spec: Any, index_dir: str) -> None:
        build_or_load(segment, spec, index_dir)
        file = Path(segment.index_file_path(index_dir, spec.index_type, spec.field_name))
        if _is_guarded(file):
            folder = file.parents[3]
            if file.exists() and not record_path(folder, file).exists():
                sync(file)
                record_file(folder, file)

    return built
