"""What Milvus Lite leaves out for a power cut and for bit rot: syncing, checksums of its files, copies of two of them.

Milvus Lite syncs its manifest and not the data that the manifest names, then removes the log that still had the rows.
Here are the steps that are added:

- In the process that serves a file, `guard` has Milvus Lite sync each data file, and the folders above it, before the
  manifest names it, and keeps a copy of each manifest.
- In any process, `sync_logs` returns when all that the logs hold is on the disk.
- For each file that Milvus Lite will read again there is a record of its checksums, in the folder `mm_retriever` of its
  collection. The repair (`lite_repair.py`) holds the files against the records before Milvus Lite opens them.

A record is a text file of lines "start end crc32 check": the bytes from start to end have this checksum, and the line
itself has the last one. A line that does not agree with its own check says nothing. A log grows, so its record does.
"""

from __future__ import annotations

import functools
import json
import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from mm_retriever.errors import StoreError
from mm_retriever.files import flush
from mm_retriever.forks import ForkLock

RECORDS = "mm_retriever"
"""The folder of ours in the folder of a collection."""

_COPIED = ("manifest.json", "schema.json")
_PIECE = 2**20

_guarded: set[str] = set()
_installing = ForkLock()
_synced: dict[str, tuple[int, ...]] = {}  # log: its state when it was last synced from this process


# ------------------------------------------------------------------------------------------------ syncing


def sync(place: Path) -> None:
    """Return when a file, or what a folder lists, is on the disk; a folder that cannot be synced is passed over."""
    is_folder = place.is_dir()
    try:
        descriptor = os.open(place, os.O_RDONLY)
    except PermissionError:
        if is_folder:  # above the store, where others rule
            return
        raise
    try:
        flush(descriptor)
    except OSError:
        if not is_folder:
            raise
    finally:
        os.close(descriptor)


def sync_folders(lowest: Path, highest: Path) -> None:
    """Sync what the folders list, from the lowest up to the highest."""
    for folder in (lowest, *lowest.parents):
        sync(folder)
        if folder == highest:
            return


def sync_new_collection(place: Path, name: str) -> None:
    """Return when a collection that was made or emptied just now, and all folders above it, are on the disk."""
    folder = place / "collections" / name
    for file in ("schema.json", "manifest.json"):
        with suppress(FileNotFoundError):
            sync(folder / file)
    sync_folders(folder, place)
    device = place.stat().st_dev
    for above in place.parents:  # may have been made for this file
        if above.stat().st_dev != device:
            return
        sync(above)


def sync_logs(place: Path, name: str) -> None:
    """Return when every row and removal that Milvus Lite has acknowledged for a collection is on the disk.

    What is no longer in a log is in a data file, and that was synced before the log was removed. Any process of the
    user may call it, whichever serves the file.

    Raises:
        OSError: the disk failed or is full; what was written last may not survive a power cut.
    """
    folder = place / "collections" / name
    try:
        logs = sorted(folder.glob("wal/wal_*_*.arrow"))
    except FileNotFoundError:
        return
    for log in logs:
        try:
            descriptor = os.open(log, os.O_RDONLY | os.O_NOFOLLOW)
        except FileNotFoundError:  # its rows went into a data file meanwhile
            _synced.pop(str(log), None)
            continue
        try:
            stat = os.fstat(descriptor)
            state = (stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)  # inodes are used again
            known = _synced.get(str(log))
            if known == state:
                continue
            flush(descriptor)
            if known is None or known[0] != state[0]:
                sync_folders(log.parent, folder)
            _record_growth(folder, log, descriptor, stat.st_size)
            _synced[str(log)] = state
        finally:
            os.close(descriptor)


def write_whole(path: Path, content: bytes) -> None:
    """Replace a file at once, and return when it is on the disk."""
    draft = path.with_name(f"{path.name}.tmp")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o666)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        flush(file.fileno())
    draft.replace(path)
    sync(path.parent)


# ------------------------------------------------------------------------------------------------ records


def record_path(folder: Path, file: Path) -> Path:
    """Return where the checksums of a file of a collection are kept."""
    return folder / RECORDS / f"{quote(file.relative_to(folder).as_posix(), safe='')}.crc"


def recorded_files(folder: Path) -> Iterator[tuple[Path, Path]]:
    """Yield each record of a collection, and the file that it is for."""
    for record in (folder / RECORDS).glob("*.crc"):
        yield record, folder / unquote(record.name.removesuffix(".crc"))


def record_file(folder: Path, file: Path) -> None:
    """Record the checksum of a file that no longer changes."""
    with opened(file) as descriptor:
        size = os.fstat(descriptor).st_size
        line = _line(0, size, _checksum(descriptor, 0, size))
    (folder / RECORDS).mkdir(exist_ok=True)
    write_whole(record_path(folder, file), line)


def is_recorded(folder: Path, file: Path) -> bool:
    """Whether there is a record that says something of the file."""
    return bool(_read_record(record_path(folder, file)))


def damage(folder: Path, file: Path) -> str | None:
    """Return what of a file is not as it was recorded, None if all is (also where there is no record).

    Raises:
        OSError: the file cannot be read.
    """
    spans = _read_record(record_path(folder, file))
    if not spans:
        return None
    with opened(file) as descriptor:
        size = os.fstat(descriptor).st_size
        end = max(span[1] for span in spans)
        if size < end or (size > end and file.suffix != ".arrow"):
            return f"{size} bytes, and it was written with {end}"
        for start, stop, checksum in spans:
            if _checksum(descriptor, start, stop) != checksum:
                return f"the bytes {start} to {stop} are not those that were written"
    return None


@contextmanager
def opened(path: Path) -> Iterator[int]:
    """A descriptor for reading a file of the store, which is never reached through a link."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _record_growth(folder: Path, log: Path, descriptor: int, size: int) -> None:
    """Record what a log has got since its last line; the record is for finding rot and need not survive a power cut."""
    record = record_path(folder, log)
    start = max((span[1] for span in _read_record(record)), default=0)
    if start >= size:
        return
    record.parent.mkdir(exist_ok=True)
    line = _line(start, size, _checksum(descriptor, start, size))
    append = os.open(record, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    try:
        os.write(append, line)
    finally:
        os.close(append)


def _line(start: int, end: int, checksum: int) -> bytes:
    said = f"{start} {end} {checksum:08x}"
    return f"{said} {zlib.crc32(said.encode()):08x}\n".encode()


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
        piece = os.pread(descriptor, min(_PIECE, end - start), start)
        if not piece:
            return -1
        checksum = zlib.crc32(piece, checksum)
        start += len(piece)
    return checksum


# ------------------------------------------------------------------------------------------------ copies


def copy_path(folder: Path, name: str) -> Path:
    """Return where the copy of a collection's manifest or schema is kept."""
    return folder / RECORDS / f"{name}.copy"


def keep_copy(folder: Path, name: str) -> None:
    """Keep a copy of a collection's manifest or schema, with its checksum, in step with it."""
    content = (folder / name).read_bytes()
    if read_copy(folder, name) != content:
        (folder / RECORDS).mkdir(exist_ok=True)
        write_whole(copy_path(folder, name), f"{zlib.crc32(content):08x}\n".encode() + content)


def read_copy(folder: Path, name: str) -> bytes | None:
    """Return the last good content of the file; None where there is no copy, or it is damaged itself."""
    try:
        checksum, _, content = copy_path(folder, name).read_bytes().partition(b"\n")
    except FileNotFoundError:
        return None
    return content if checksum == f"{zlib.crc32(content):08x}".encode() else None


# ------------------------------------------------------------------------------------------------ steps added


def guard(place: Path) -> None:
    """Have Milvus Lite, in this process, sync and record what it writes below this folder.

    This replaces private functions of milvus_lite (3.2.2): it offers no other way to get between a data file and the
    manifest that names it. Where they are missing, a power cut could lose stored rows, so the file is not opened.

    Raises:
        StoreError: the milvus_lite that is installed is built differently.
    """
    with _installing:
        _install()
        _guarded.add(str(place))


def _install() -> None:
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
        found = [(owner, name, step, getattr(owner, name)) for owner, name, step in steps]
    except (ImportError, AttributeError) as error:
        raise StoreError(
            f"the installed milvus-lite is not one that this package knows to keep safe in a power cut ({error}); "
            "install milvus-lite 3.2"
        ) from error
    for owner, name, step, original in found:
        if not hasattr(original, "of_mm_retriever"):
            added: Any = functools.wraps(original)(step(original))
            added.of_mm_retriever = True
            setattr(owner, name, added)


def _is_guarded(path: Path) -> bool:
    return any(str(above) in _guarded for above in path.parents)


def _syncing(write: Callable[..., str]) -> Callable[..., str]:
    """A data or delta file is on the disk, and recorded, before the manifest can name it."""

    def written(table: Any, partition_dir: str, *arguments: Any, **options: Any) -> str:
        name = write(table, partition_dir, *arguments, **options)
        partition = Path(partition_dir)
        if _is_guarded(partition):
            folder = partition.parent.parent
            file = partition / name
            sync(file)
            sync_folders(file.parent, folder)
            record_file(folder, file)
        return name

    return written


def _copying(save: Callable[..., None]) -> Callable[..., None]:
    """There is a copy of the manifest, and of the schema."""

    def saved(manifest: Any) -> None:
        save(manifest)
        folder = Path(manifest.data_dir)
        if _is_guarded(folder):
            for name in _COPIED:
                keep_copy(folder, name)

    return saved


def _recording(build_or_load: Callable[..., None]) -> Callable[..., None]:
    """An index file is recorded; one without a record is built anew at the next opening."""

    def built(segment: Any, spec: Any, index_dir: str) -> None:
        build_or_load(segment, spec, index_dir)
        file = Path(segment.index_file_path(index_dir, spec.index_type, spec.field_name))
        if _is_guarded(file):
            folder = file.parents[3]
            if file.exists() and not record_path(folder, file).exists():
                record_file(folder, file)

    return built


# ------------------------------------------------------------------------------------------------ looking


def damaged_files(place: Path) -> dict[str, str]:
    """Return what is wrong with each file of a Milvus Lite file that is not as it was recorded, by its path."""
    found: dict[str, str] = {}
    for folder in sorted((place / "collections").iterdir()) if (place / "collections").is_dir() else ():
        for record, file in sorted(recorded_files(folder)):
            try:
                reason = damage(folder, file)
            except (
                FileNotFoundError
            ):  # merged into another, or emptied: Milvus Lite keeps no log or file that it needs not
                continue
            except OSError as error:
                reason = f"it cannot be read: {error.strerror or error}"
            if reason is not None and record.exists() and file.exists():
                found[str(file)] = reason
        for name in _COPIED:
            copy = read_copy(folder, name)
            if copy is not None and not _agrees(folder / name, copy):
                found[str(folder / name)] = "it is not what was written"
    return found


def _agrees(file: Path, copy: bytes) -> bool:
    try:
        content = file.read_bytes()
        if content == copy:
            return True
        version, copied = (json.loads(one)["version"] for one in (content, copy))
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return file.name == "manifest.json" and isinstance(version, int) and version > copied
