"""Repairs a Milvus Lite file that a killed process, a power cut or bit rot left, before Milvus Lite opens it.

Milvus Lite itself empties a store whose manifest is damaged, removes data files that the manifest does not name, reads
rows twice whose log was not removed, and cannot open a file that is cut short. These are trusted:

- The manifest and the schema, if they equal their copies; else the copies; without a copy, what can be read.
- A data file that agrees with its record or, without a record, can be read whole. A bad one is left out if the logs
  still have all its rows, and is an error otherwise. Of a file that was not touched since it was recorded, as nearly
  all are, only the footer and two parts are read.
- A row of a log that no data file has. The rows themselves decide that, never a number in the manifest.
- An index file that agrees with its record, in the same way. Others are removed, and Milvus Lite builds them anew.

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
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from llama_index.core.bridge.pydantic import BaseModel, Field

from mm_retriever.errors import StoreDamagedError, StoreError, one_line
from mm_retriever.files import sync, write_atomically
from mm_retriever.store.lite_durability import (
    RECORDS,
    damage,
    guard,
    is_recorded,
    is_untouched,
    keep_copy,
    opened,
    read_copy,
    record_file,
    record_path,
    recorded_files,
    remove_file,
    sync_folders,
)
from mm_retriever.store.lite_logs import DataFile, Logs

logger = logging.getLogger(__name__)

_FILE = re.compile(r"(data|delta)/\1_(\d{1,18})_(\d{1,18})\.parquet")
_NOT_WRITABLE = (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOSPC, errno.EDQUOT)


def repair(place: Path) -> None:
    """Repair a Milvus Lite file that no process has open, and guard the writes of this process.

    Raises:
        StoreDamagedError: a repair would lose rows; nothing was removed.
        StoreError: it holds a link, or a file that cannot be read.
    """
    import fcntl  # missing on Windows, as Milvus Lite is

    guard(place)
    collections = place / "collections"
    if not collections.is_dir():  # a new file, or a folder of something else
        return
    try:
        lock = os.open(place / "LOCK", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise _linked(place / "LOCK") from error
        logger.debug("%s is left as it is: %s", place, error)  # Milvus Lite has the better message
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
    """Refuse links, which Milvus Lite never writes but follows: it would read, and remove, files of another store."""
    for folder, folders, files in os.walk(place):
        for name in (*folders, *files):
            path = Path(folder, name)
            mode = path.lstat().st_mode
            if stat.S_ISLNK(mode):
                raise _linked(path)
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode) or stat.S_ISSOCK(mode)):  # reading could block for ever
                raise StoreError(f"{path} is a pipe or a device; a Milvus Lite file holds none: remove it")


def _linked(path: Path) -> StoreError:
    return StoreError(
        f"{path} is a link, and a Milvus Lite file holds none: what is done to the file would be done elsewhere. "
        "Remove the link, and put the file itself there if it was moved"
    )


def _repair_collection(folder: Path, place: Path) -> None:
    schema = _checked_schema(folder)
    if schema is None:
        _remove_unfinished(folder, place)
        return
    manifest = _Manifest.read(folder)
    key = next((str(column["name"]) for column in schema["fields"] if column.get("is_primary")), "id")
    logs = Logs(folder, key)
    _check_data_files(folder, manifest, logs)
    logs.drop_stored_rows(manifest.files)
    manifest.save()
    for path in sorted(folder.glob("partitions/*/indexes/*")):
        if path.suffix in (".idx", ".sidx") and (not is_recorded(folder, path) or _recorded_fault(folder, path)):
            remove_file(folder, path)  # Milvus Lite builds it anew from the data
    for record, file in recorded_files(folder):
        if not file.exists():
            record.unlink()


# ------------------------------------------------------------------------------------------------ schema and manifest


def _checked_schema(folder: Path) -> dict[str, Any] | None:
    """The schema of a collection, restored from its copy if damaged; None without one."""
    path = folder / "schema.json"
    content, copy = _content(path), read_copy(folder, path.name)
    if copy is not None and content != copy and not _renamed(content, copy):
        if content is None and not _holds_rows(folder):
            return None  # the collection was being dropped
        _restore(folder, path, copy)
        content = copy
    if content is None:
        return None
    schema = _json(content)
    columns = schema.get("fields") if isinstance(schema, dict) else None
    if not isinstance(columns, list) or not columns:
        raise _damaged(path)
    if not all(isinstance(column, dict) and isinstance(column.get("name"), str) for column in columns):
        raise _damaged(path)
    with _if_writable():
        keep_copy(folder, path.name)
    return dict(schema)


def _renamed(content: bytes | None, copy: bytes) -> bool:
    """Whether a schema differs from its copy only by the name of the collection, which nothing reads."""
    schema, copied = _json(content or b""), _json(copy)
    if not isinstance(schema, dict) or not isinstance(copied, dict):
        return False
    return {**schema, "collection_name": None} == {**copied, "collection_name": None}


def _holds_rows(folder: Path) -> bool:
    return any(folder.rglob("*.parquet")) or any(folder.rglob("*.arrow"))


class _PartitionForm(BaseModel, extra="forbid"):
    data_files: list[Annotated[str, Field(pattern=r"^data/data_[0-9]{1,18}_[0-9]{1,18}\.parquet$")]] = Field([])
    delta_files: list[Annotated[str, Field(pattern=r"^delta/delta_[0-9]{1,18}_[0-9]{1,18}\.parquet$")]] = Field([])


class _ManifestForm(BaseModel):
    """The parts of a manifest that decide which files are read; the name of a partition is that of a folder."""

    version: int = Field(ge=0)
    current_seq: int
    schema_version: Any
    active_wal_number: int | None
    partitions: dict[Annotated[str, Field(pattern=r"^[^/\x00]+$")], _PartitionForm] = Field(min_length=1)
    index_specs: dict[str, Any]


@dataclass
class _Manifest:
    """The trusted part of a manifest."""

    folder: Path
    payload: dict[str, Any]
    restored: bool = False
    changed: bool = False
    files: list[DataFile] = field(default_factory=list)

    @classmethod
    def read(cls, folder: Path) -> _Manifest:
        path = folder / "manifest.json"
        content, copy = _content(path), read_copy(folder, path.name)
        payload = None if content is None else _manifest_payload(content)
        copied = None if copy is None else _manifest_payload(copy)
        # A manifest is newer than its copy if its process was killed before copying it, or was another program.
        if copied is not None and content != copy and (payload is None or payload["version"] <= copied["version"]):
            _restore(folder, path, copy or b"")
            manifest = cls(folder, copied, restored=True)
        elif payload is not None:
            manifest = cls(folder, payload)
        elif content is None and not any(folder.glob("partitions/*/*/*.parquet")):
            return cls(folder, {})  # no data file was written yet
        else:
            raise _damaged(path)
        for partition, contents in manifest.payload["partitions"].items():
            for name in (*contents.get("data_files", []), *contents.get("delta_files", [])):
                if match := _FILE.fullmatch(name):
                    place = folder / "partitions" / partition / name
                    is_delta, first, last = match[1] == "delta", int(match[2]), int(match[3])
                    manifest.files.append(DataFile(partition, name, place, is_delta, first, last))
        return manifest

    @property
    def last(self) -> int:
        """The highest sequence number in a file."""
        return max((file.last for file in self.files), default=0)

    def drop(self, file: DataFile) -> None:
        """Remove a file from the manifest."""
        for names in self.payload["partitions"][file.partition].values():
            if file.name in names:
                names.remove(file.name)
        self.files.remove(file)
        self.changed = True

    def save(self) -> None:
        """Write the manifest if it was changed, and keep a copy of it."""
        if self.changed:
            self.payload["version"] += 1
            content = json.dumps(self.payload, indent=2, sort_keys=True, ensure_ascii=False).encode()
            write_atomically(self.folder / "manifest.json", content, synced=True)
        if self.payload:
            with _if_writable():
                keep_copy(self.folder, "manifest.json")


def _manifest_payload(content: bytes) -> dict[str, Any] | None:
    """The contents of a manifest; None if Milvus Lite cannot have written it."""
    try:
        parsed = _ManifestForm.model_validate_json(content, strict=True)
    except ValueError:
        return None
    for name, partition in parsed.partitions.items():
        lists = (partition.data_files, partition.delta_files)
        if name in (".", "..") or any(len(names) != len(set(names)) for names in lists):
            return None
    return dict(json.loads(content))


def _restore(folder: Path, path: Path, copy: bytes) -> None:
    """Restore the last good content of a file; its current content is kept beside the records."""
    aside = None
    if path.exists():
        aside = _place_aside(folder, path)
        shutil.copyfile(path, aside, follow_symlinks=False)
    write_atomically(path, copy, synced=True)
    logger.warning(
        "%s was damaged or changed by another program; the last copy of it was put back%s",
        path,
        f", and what it was is in {aside}" if aside else "",
    )


def _damaged(path: Path) -> StoreDamagedError:
    return StoreDamagedError(
        f"{path} is damaged and there is no copy of it. Nothing was changed: restore this file, or the whole store, "
        "from a backup; or give another path and index again"
    )


# ------------------------------------------------------------------------------------------------ data files


def _check_data_files(folder: Path, manifest: _Manifest, logs: Logs) -> None:
    """Leave out damaged files whose rows the logs still have."""
    named = {file.path for file in manifest.files}
    unnamed = [path for path in sorted(folder.glob("partitions/*/*/*.parquet")) if path not in named]
    bad = [(file, reason) for file in manifest.files if (reason := _fault(folder, file.path))]
    for file, reason in bad:
        if not logs.have_all(file.first, file.last) and (file.path.exists() or unnamed):
            raise StoreDamagedError(
                f"{file.path} is damaged: {reason}. Its rows are nowhere else. Nothing was changed: restore the whole "
                "store from a backup; or delete this file and index again, which stores its rows anew"
            )
    for file, reason in bad:
        if file.path.exists():
            aside = _move_aside(folder, file.path)
            logger.warning(
                "%s is damaged (%s) and was moved to %s; its rows are in a log still", file.path, reason, aside
            )
        else:
            logger.warning("%s is missing; rows that were in it and in no log are gone: index again", file.path)
        manifest.drop(file)
    if manifest.payload and manifest.payload["current_seq"] < manifest.last:  # new rows must win over stored ones
        manifest.payload["current_seq"] = manifest.last
        manifest.changed = True
    if manifest.restored:  # it may be older than these, and Milvus Lite would remove them
        for path in unnamed:
            logger.warning("%s is not named in the manifest and was moved to %s", path, _move_aside(folder, path))


def _fault(folder: Path, path: Path) -> str | None:
    """What is wrong with a data file; an intact one without a record is recorded."""
    from pyarrow import ArrowException, parquet

    if not path.exists():
        return "it is missing"
    recorded = is_recorded(folder, path)
    if recorded and (reason := _recorded_fault(folder, path)):
        return reason
    try:
        with opened(path) as descriptor:
            if os.fstat(descriptor).st_size == 0:
                return "it is empty"
        footer = parquet.read_metadata(path)
        groups = (footer.row_group(number).num_rows for number in range(footer.num_row_groups))
        if footer.num_rows != (sum(groups) if recorded else parquet.read_table(path).num_rows):
            return "rows are missing in it"
    except (ArrowException, ValueError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # of the disk, not of the content
            raise
        return one_line(error, 200)
    if recorded:
        return None
    with _if_writable():
        sync(path)  # the version of this package that wrote it may not have
        sync_folders(path.parent, folder)
        record_file(folder, path)
    return None


def _recorded_fault(folder: Path, path: Path) -> str | None:
    """What is wrong with a file that has a record; a copied or touched file is read whole, once."""
    if is_untouched(folder, path):
        return damage(folder, path, sampled=True)
    reason = damage(folder, path)
    if reason is None:
        with _if_writable():
            sync(path)
            record_file(folder, path)
    return reason


# ------------------------------------------------------------------------------------------------ the rest


def _remove_unfinished(folder: Path, place: Path) -> None:
    """Move a collection without a schema away; its process was killed while creating or dropping the collection.

    While the folder exists, Milvus Lite can neither open nor create a collection of that name.
    """
    if not _holds_rows(folder):
        shutil.rmtree(folder)
        return
    aside = place / f"{folder.name}.without-schema.{uuid.uuid4().hex[:8]}"
    folder.rename(aside)
    logger.warning(
        "the collection %r has no schema, its rows cannot be read; they were moved to %s", folder.name, aside
    )


def _place_aside(folder: Path, path: Path) -> Path:
    """A new name in the folder of records, where Milvus Lite removes nothing."""
    aside = folder / RECORDS / f"{path.name}.damaged.{uuid.uuid4().hex[:8]}"
    aside.parent.mkdir(exist_ok=True)
    return aside


def _move_aside(folder: Path, path: Path) -> Path:
    aside = path.rename(_place_aside(folder, path))
    record_path(folder, path).unlink(missing_ok=True)
    return aside


@contextmanager
def _if_writable() -> Iterator[None]:
    """Ignore that a record cannot be written to a read-only store, or on a full disk: rows can be read without it."""
    try:
        yield
    except OSError as error:
        if error.errno not in _NOT_WRITABLE:
            raise


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
