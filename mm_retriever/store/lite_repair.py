"""Repairs a Milvus Lite file that a killed process, a power cut or bit rot left, before Milvus Lite opens it.

Milvus Lite by itself empties a store whose manifest is spoiled, removes data files that the manifest does not name,
reads rows twice whose log outlived it, and cannot open a file that is cut short. Here is decided what may be believed:

- The manifest and the schema: what agrees with the copy that is kept; else the copy; without a copy, what can be read.
- A data file: what agrees with its record; without a record, what can be read whole. Another one is left out if the
  logs still hold all its rows, and is an error if they do not.
- A row of a log: what no data file has. No number in the manifest decides that, only the rows themselves.
- An index file: what agrees with its record. Others are removed; Milvus Lite builds them anew from the data.

Nothing that could hold rows is deleted: it is moved into the folder `mm_retriever` of its collection.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import shutil
import stat
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mm_retriever.errors import StoreDamagedError, StoreError, one_line
from mm_retriever.store.lite_durability import (
    RECORDS,
    damage,
    guard,
    is_recorded,
    keep_copy,
    opened,
    read_copy,
    record_file,
    record_path,
    recorded_files,
    sync,
    sync_folders,
    write_whole,
)

logger = logging.getLogger(__name__)

_DATA = re.compile(r"data/data_(\d{1,18})_(\d{1,18})\.parquet")
_DELTA = re.compile(r"delta/delta_(\d{1,18})_(\d{1,18})\.parquet")
_LOG = re.compile(r"wal_(?:data|delta)_(\d{1,18})\.arrow")
_MANIFEST_KEYS = {"version", "current_seq", "schema_version", "active_wal_number", "partitions", "index_specs"}
_READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)


def repair(place: Path) -> None:
    """Put right what is wrong with a Milvus Lite file that no process has open, and guard what this one will write.

    Raises:
        StoreDamagedError: something is damaged and cannot be put right without losing rows; nothing was removed.
        StoreError: something in it is a link, or cannot be read.
    """
    import fcntl  # is not there on Windows, where Milvus Lite is not either

    guard(place)
    collections = place / "collections"
    if not collections.is_dir():  # a new file, or a folder of something else
        return
    try:
        lock = os.open(place / "LOCK", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise _linked(place / "LOCK") from error
        logger.debug("%s is left as it is: %s", place, error)  # Milvus Lite itself will say it better
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _refuse_links(place)
        for folder in sorted(collections.iterdir()):
            if folder.is_dir():
                _repair_collection(folder, place)
    except BlockingIOError:  # another process has it
        return
    except OSError as error:
        raise StoreError(f"{error.filename or place} cannot be checked: {error.strerror or error}") from error
    finally:
        os.close(lock)


def _refuse_links(place: Path) -> None:
    """Milvus Lite writes no links, but follows them: it would read, and remove, files of another store."""
    for folder, folders, files in os.walk(place):
        for name in (*folders, *files):
            path = Path(folder, name)
            mode = path.lstat().st_mode
            if stat.S_ISLNK(mode):
                raise _linked(path)
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode) or stat.S_ISSOCK(mode)):  # reading could take for ever
                raise StoreError(f"{path} is a pipe or a device; a Milvus Lite file holds none: remove it")


def _linked(path: Path) -> StoreError:
    return StoreError(
        f"{path} is a link, and a Milvus Lite file holds none: what is done to the file would be done elsewhere. "
        "Remove the link, and put the file itself there if it was moved"
    )


def _repair_collection(folder: Path, place: Path) -> None:
    schema = _checked_schema(folder)
    if schema is None:
        _clear_name(folder, place)
        return
    manifest = _Manifest.read(folder)
    key = next((str(one["name"]) for one in schema["fields"] if one.get("is_primary")), "id")
    logs = _Logs(folder, key)
    _check_data_files(folder, manifest, logs)
    logs.drop_stored_rows(manifest)
    manifest.save()
    _remove_stale_indexes(folder)
    for record, file in recorded_files(folder):
        if not file.exists():
            record.unlink()


# ------------------------------------------------------------------------------------------------ schema and manifest


def _checked_schema(folder: Path) -> dict[str, Any] | None:
    """The schema of a collection, put back from its copy if it is spoiled; None if there is none."""
    path = folder / "schema.json"
    content = _content(path)
    copy = read_copy(folder, path.name)
    if copy is not None and content != copy:
        if content is None and not any(folder.rglob("*.parquet")) and not any(folder.rglob("*.arrow")):
            return None  # the collection was being dropped
        _put_back(folder, path, copy)
        content = copy
    if content is None:
        return None
    schema = _json(content)
    if not isinstance(schema, dict) or not isinstance(schema.get("fields"), list) or not schema["fields"]:
        raise _spoiled(path)
    if not all(isinstance(one, dict) and isinstance(one.get("name"), str) for one in schema["fields"]):
        raise _spoiled(path)
    _keep(folder, path.name)
    return schema


@dataclass
class _Manifest:
    """What a manifest says of files, as it may be believed.

    Attributes:
        files: (partition, name below the partition) of each data and delta file, as (path, first seq, last seq).
    """

    folder: Path
    payload: dict[str, Any]
    put_back: bool = False
    changed: bool = False
    files: list[tuple[str, str, Path]] = field(default_factory=list)

    @classmethod
    def read(cls, folder: Path) -> _Manifest:
        path = folder / "manifest.json"
        content, copy = _content(path), read_copy(folder, path.name)
        payload = None if content is None else _manifest_payload(content)
        copied = None if copy is None else _manifest_payload(copy)
        # One that was written after its copy is newer: its process was killed in between, or was another program.
        if copied is not None and content != copy and (payload is None or payload["version"] <= copied["version"]):
            _put_back(folder, path, copy or b"")
            manifest = cls(folder, copied, put_back=True)
        elif payload is not None:
            manifest = cls(folder, payload)
        elif content is None and not any(folder.glob("partitions/*/*/*.parquet")):
            return cls(folder, {})  # nothing was flushed yet
        else:
            raise _spoiled(path)
        manifest._collect()
        return manifest

    def _collect(self) -> None:
        for partition, contents in self.payload["partitions"].items():
            for name in (*contents.get("data_files", []), *contents.get("delta_files", [])):
                self.files.append((partition, name, self.folder / "partitions" / partition / name))

    def drop(self, partition: str, name: str) -> None:
        """Name a file no longer."""
        for names in self.payload["partitions"][partition].values():
            if name in names:
                names.remove(name)
        self.files = [one for one in self.files if one[:2] != (partition, name)]
        self.changed = True

    def save(self) -> None:
        """Write what was changed, and keep a copy of what has proven true."""
        if self.changed:
            self.payload["version"] += 1
            content = json.dumps(self.payload, indent=2, sort_keys=True, ensure_ascii=False).encode()
            write_whole(self.folder / "manifest.json", content)
        if self.payload:
            _keep(self.folder, "manifest.json")


def _manifest_payload(content: bytes) -> dict[str, Any] | None:
    """What a manifest says, None where it says nothing that can be meant."""
    payload = _json(content)
    if not isinstance(payload, dict) or not payload.keys() >= _MANIFEST_KEYS:
        return None
    partitions, version = payload.get("partitions"), payload.get("version")
    if type(version) is not int or version < 0 or not isinstance(partitions, dict) or not partitions:
        return None
    if type(payload.get("current_seq")) is not int or not isinstance(payload.get("index_specs", {}), dict):
        return None
    if not isinstance(payload.get("active_wal_number"), int | None):
        return None
    for partition, contents in partitions.items():
        if not partition or partition in (".", "..") or "/" in partition or "\0" in partition:
            return None
        if not isinstance(contents, dict) or not contents.keys() <= {"data_files", "delta_files"}:
            return None
        for kind, form in (("data_files", _DATA), ("delta_files", _DELTA)):
            names = contents.get(kind, [])
            if not isinstance(names, list) or len(names) != len({str(name) for name in names}):
                return None
            if not all(isinstance(name, str) and form.fullmatch(name) for name in names):
                return None
    return payload


def _put_back(folder: Path, path: Path, copy: bytes) -> None:
    """Put the last good content of a file in its place."""
    aside = None
    if path.exists():
        aside = _move_aside(folder, path, keep_name=True)
    write_whole(path, copy)
    logger.warning(
        "%s was damaged or changed by another program; the last copy of it was put back%s",
        path,
        f", and what it was is in {aside}" if aside else "",
    )


def _spoiled(path: Path) -> StoreDamagedError:
    return StoreDamagedError(
        f"{path} is damaged and there is no copy of it. Nothing was changed: restore this file, or the whole store, "
        "from a backup; or give another path and index again"
    )


# ------------------------------------------------------------------------------------------------ data files


def _check_data_files(folder: Path, manifest: _Manifest, logs: _Logs) -> None:
    """Leave out what cannot be read and is in the logs still."""
    unnamed = _unnamed_files(folder, manifest)
    bad: list[tuple[str, str, Path, str]] = []
    for partition, name, path in manifest.files:
        reason = _fault(folder, path)
        if reason is None:
            continue
        first, last = _sequence(name)
        if not logs.have_all(first, last) and (path.exists() or unnamed):
            raise StoreDamagedError(
                f"{path} is damaged: {reason}. Its rows are nowhere else. Nothing was changed: restore the whole store "
                "from a backup; or delete this file and index again, which stores its rows anew"
            )
        bad.append((partition, name, path, reason))
    for partition, name, path, reason in bad:
        if path.exists():
            aside = _move_aside(folder, path)
            logger.warning("%s is damaged (%s) and was moved to %s; its rows are in a log still", path, reason, aside)
        else:
            logger.warning("%s is missing; rows that were in it and in no log are gone: index again", path)
        manifest.drop(partition, name)
    last = max((_sequence(name)[1] for _, name, _ in manifest.files), default=0)
    if manifest.payload and manifest.payload["current_seq"] < last:  # what is written next must win over what is there
        manifest.payload["current_seq"] = last
        manifest.changed = True
    if manifest.put_back:  # a manifest that was put back may be older than these; Milvus Lite would remove them
        for path in unnamed:
            logger.warning("%s is not named in the manifest and was moved to %s", path, _move_aside(folder, path))


def _unnamed_files(folder: Path, manifest: _Manifest) -> list[Path]:
    named = {path for _, _, path in manifest.files}
    return [path for path in sorted(folder.glob("partitions/*/*/*.parquet")) if path not in named]


def _fault(folder: Path, path: Path) -> str | None:
    """What is wrong with a data file; one without a record that can be read is recorded from now on."""
    from pyarrow import ArrowException, parquet  # type: ignore[import-untyped]

    if not path.exists():
        return "it is missing"
    if is_recorded(folder, path):
        return damage(folder, path)
    try:
        with opened(path) as descriptor:
            if os.fstat(descriptor).st_size == 0:
                return "it is empty"
        if parquet.read_table(path).num_rows != parquet.read_metadata(path).num_rows:
            return "rows are missing in it"
    except (ArrowException, ValueError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # of the disk, not of the content
            raise
        return one_line(error, 200)
    with _unless_read_only():
        sync(path)  # the version of this package that wrote it may not have
        sync_folders(path.parent, folder)
        record_file(folder, path)
    return None


def _sequence(name: str) -> tuple[int, int]:
    match = _DATA.fullmatch(name) or _DELTA.fullmatch(name)
    return (int(match[1]), int(match[2])) if match else (0, 0)


# ------------------------------------------------------------------------------------------------ logs


class _Logs:
    """The logs of a collection: rows and removals that are in no data file yet, or were not when it ended."""

    def __init__(self, folder: Path, key: str) -> None:
        self._folder, self._key = folder, key
        self._paths = [path for path in sorted(folder.glob("wal/wal_*_*.arrow")) if _LOG.fullmatch(path.name)]
        for path in self._paths:
            reason = damage(folder, path)
            if reason is not None:
                raise StoreDamagedError(
                    f"{path} is damaged: {reason}. Nothing was changed: restore the store from a backup; or move this "
                    "file away and index again, which stores the rows anew that only it has"
                )
        self._numbers: set[int] | None = None

    def have_all(self, first: int, last: int) -> bool:
        """Whether the logs hold everything that was written between two sequence numbers."""
        if self._numbers is None:
            self._numbers = {
                number for path in self._paths for batch in self._batches(path) for number in _column(batch, "_seq")
            }
        return all(number in self._numbers for number in range(first, last + 1))

    def drop_stored_rows(self, manifest: _Manifest) -> None:
        """Take rows out of the logs that are in a data file, too: Milvus Lite would have each of them twice."""
        from pyarrow import parquet

        last = max((_sequence(name)[1] for _, name, _ in manifest.files), default=0)
        rows = [path for path in self._paths if path.name.startswith("wal_data")]
        removals = [path for path in self._paths if path not in rows]
        if not any(min(_column(batch, "_seq"), default=0) <= last for path in rows for batch in self._batches(path)):
            return
        stored: dict[Any, int] = {}
        removed: dict[Any, int] = {}
        for _, name, path in manifest.files:
            table = parquet.read_table(path, columns=[self._key, "_seq"])
            _latest(stored if _DATA.fullmatch(name) else removed, table, self._key)
        for path in removals:
            for batch in self._batches(path):
                _latest(removed, batch, self._key)
        for path in rows:
            kept, dropped = self._unstored(path, stored, removed)
            if not dropped:
                continue
            if kept:
                self._rewrite(path, kept)
            else:
                self._remove(path)
                twin = path.with_name(path.name.replace("wal_data", "wal_delta"))
                if twin in removals and self._is_stored(twin, stored, removed, manifest):
                    self._remove(twin)

    def _unstored(self, path: Path, stored: dict[Any, int], removed: dict[Any, int]) -> tuple[list[Any], int]:
        """The batches of a log without the rows that are stored, replaced or removed, and the number of those."""
        kept, dropped = [], 0
        for batch in self._batches(path):
            pairs = list(zip(_column(batch, self._key), _column(batch, "_seq"), strict=True))
            rows = [
                row
                for row, (key, number) in enumerate(pairs)
                if stored.get(key, -1) < number and removed.get(key, -1) < number
            ]
            dropped += len(pairs) - len(rows)
            if rows:
                kept.append(batch.take(rows))
        return kept, dropped

    def _is_stored(self, path: Path, stored: dict[Any, int], removed: dict[Any, int], manifest: _Manifest) -> bool:
        """Whether removals of a log are in data files, or have nothing left to remove."""
        from pyarrow import parquet

        in_files: dict[Any, int] = {}
        for _, name, file in manifest.files:
            if _DELTA.fullmatch(name):
                _latest(in_files, parquet.read_table(file, columns=[self._key, "_seq"]), self._key)
        return all(
            in_files.get(key, -1) >= number or stored.get(key, number) >= number
            for batch in self._batches(path)
            for key, number in zip(_column(batch, self._key), _column(batch, "_seq"), strict=True)
        )

    def _rewrite(self, path: Path, batches: list[Any]) -> None:
        import pyarrow

        sink = pyarrow.BufferOutputStream()
        with pyarrow.ipc.new_stream(sink, batches[0].schema) as writer:
            for batch in batches:
                writer.write_batch(batch)
        record_path(self._folder, path).unlink(missing_ok=True)
        write_whole(path, sink.getvalue().to_pybytes())

    def _remove(self, path: Path) -> None:
        path.unlink()
        record_path(self._folder, path).unlink(missing_ok=True)

    def _batches(self, path: Path) -> Iterator[Any]:
        """As Milvus Lite reads them: up to where a write was cut off by a kill, a power cut or a full disk."""
        import pyarrow

        with opened(path) as descriptor, os.fdopen(os.dup(descriptor), "rb") as source:
            try:
                for batch in pyarrow.ipc.open_stream(source):
                    batch.validate(full=True)
                    yield batch
            except pyarrow.ArrowInvalid:
                return
            except OSError as error:
                if error.errno is not None:  # of the disk; without a number, pyarrow's word for a body that ends early
                    raise


def _column(batch: Any, name: str) -> list[Any]:
    return list(batch.column(name).to_pylist())


def _latest(numbers: dict[Any, int], rows: Any, key: str) -> None:
    for one, number in zip(_column(rows, key), _column(rows, "_seq"), strict=True):
        if number > numbers.get(one, -1):
            numbers[one] = number


# ------------------------------------------------------------------------------------------------ the rest


def _remove_stale_indexes(folder: Path) -> None:
    """Remove index files that are not what was written, or may not be: they are built anew from the data."""
    for path in sorted(folder.glob("partitions/*/indexes/*")):
        if path.suffix in (".idx", ".sidx") and (not is_recorded(folder, path) or damage(folder, path)):
            path.unlink()
            record_path(folder, path).unlink(missing_ok=True)


def _clear_name(folder: Path, place: Path) -> None:
    """Move a collection without a schema out of the way: killed while it was made, or dropped.

    Milvus Lite says of it that there is none, and that none can be made.
    """
    if not any(folder.rglob("*.parquet")) and not any(folder.rglob("*.arrow")):
        shutil.rmtree(folder)
        return
    aside = place / f"{folder.name}.without-schema.{uuid.uuid4().hex[:8]}"
    folder.rename(aside)
    logger.warning(
        "the collection %r has no schema, its rows cannot be read; they were moved to %s", folder.name, aside
    )


def _move_aside(folder: Path, path: Path, *, keep_name: bool = False) -> Path:
    """Move (or copy) a file into our folder of the collection, where Milvus Lite removes nothing; return its place."""
    aside = folder / RECORDS / f"{path.name}.damaged.{uuid.uuid4().hex[:8]}"
    aside.parent.mkdir(exist_ok=True)
    if keep_name:
        shutil.copyfile(path, aside, follow_symlinks=False)
    else:
        path.rename(aside)
        record_path(folder, path).unlink(missing_ok=True)
    return aside


def _keep(folder: Path, name: str) -> None:
    with _unless_read_only():
        keep_copy(folder, name)


class _unless_read_only:  # noqa: N801 - a context manager that reads as a function
    """Lets a record be missing where a store may be read and not be written."""

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        return isinstance(error, OSError) and error.errno in _READ_ONLY


def _content(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def _json(content: bytes) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        return None
