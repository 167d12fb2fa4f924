"""The logs of a Milvus Lite collection, and which of their rows are in no data file.

Owns reading and shortening a log. Knows nothing of manifests; use it through `lite_repair.py`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mm_retriever.errors import StoreDamagedError
from mm_retriever.files import write_atomically
from mm_retriever.store.lite_durability import damage, opened, record_path, remove_file

_LOG = re.compile(r"wal_(?:data|delta)_(\d{1,18})\.arrow")


@dataclass(frozen=True)
class DataFile:
    """A data or delta file that the manifest names, with the first and last sequence number of its rows."""

    partition: str
    name: str
    path: Path
    is_delta: bool
    first: int
    last: int


class Logs:
    """The logs of a collection: rows and removals that were not in data files when its process ended."""

    def __init__(self, folder: Path, key: str) -> None:
        self._folder, self._key = folder, key
        self._paths = [path for path in sorted(folder.glob("wal/wal_*_*.arrow")) if _LOG.fullmatch(path.name)]
        for path in self._paths:
            if (reason := damage(folder, path)) is not None:
                raise StoreDamagedError(
                    f"{path} is damaged: {reason}. Nothing was changed: restore the store from a backup; or move this "
                    "file away and index again, which stores the rows anew that only it has"
                )

    def have_all(self, first: int, last: int) -> bool:
        """Whether the logs hold everything that was written between two sequence numbers."""
        numbers = {number for path in self._paths for batch in _batches(path) for number in _column(batch, "_seq")}
        return all(number in numbers for number in range(first, last + 1))

    def drop_stored_rows(self, files: Sequence[DataFile]) -> None:
        """Remove rows from the logs that are in data files too; Milvus Lite would read them twice."""
        last = max((file.last for file in files), default=0)
        rows = [path for path in self._paths if path.name.startswith("wal_data")]
        removals = [path for path in self._paths if path not in rows]
        if not any(min(_column(batch, "_seq"), default=0) <= last for path in rows for batch in _batches(path)):
            return
        from pyarrow import parquet

        stored: dict[Any, int] = {}  # the latest sequence number of each key
        deleted: dict[Any, int] = {}
        for file in files:
            table = parquet.read_table(file.path, columns=[self._key, "_seq"])
            _latest(deleted if file.is_delta else stored, table, self._key)
        removed = dict(deleted)
        for path in removals:
            for batch in _batches(path):
                _latest(removed, batch, self._key)
        for path in rows:
            kept, dropped = self._unstored(path, stored, removed)
            if not dropped:
                continue
            if kept:
                self._rewrite(path, kept)
                continue
            remove_file(self._folder, path)
            delta = path.with_name(path.name.replace("wal_data", "wal_delta"))
            if delta in removals and self._are_done(delta, stored, deleted):
                remove_file(self._folder, delta)

    def _unstored(self, path: Path, stored: dict[Any, int], removed: dict[Any, int]) -> tuple[list[Any], int]:
        """The batches of a log without rows that are stored, replaced or removed, and the number of rows left out."""
        kept, dropped = [], 0
        for batch in _batches(path):
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

    def _are_done(self, path: Path, stored: dict[Any, int], deleted: dict[Any, int]) -> bool:
        """Whether each removal of a log is in a data file, or has no row to remove."""
        return all(
            deleted.get(key, -1) >= number or stored.get(key, number) >= number
            for batch in _batches(path)
            for key, number in zip(_column(batch, self._key), _column(batch, "_seq"), strict=True)
        )

    def _rewrite(self, path: Path, batches: list[Any]) -> None:
        import pyarrow

        sink = pyarrow.BufferOutputStream()
        with pyarrow.ipc.new_stream(sink, batches[0].schema) as writer:
            for batch in batches:
                writer.write_batch(batch)
        record_path(self._folder, path).unlink(missing_ok=True)
        write_atomically(path, sink.getvalue().to_pybytes(), synced=True)


def _batches(path: Path) -> Iterator[Any]:
    """The batches of a log up to a write that a kill, a power cut or a full disk cut off, as Milvus Lite reads them."""
    import pyarrow

    with opened(path) as descriptor, os.fdopen(os.dup(descriptor), "rb") as source:
        try:
            for batch in pyarrow.ipc.open_stream(source):
                batch.validate(full=True)
                yield batch
        except pyarrow.ArrowInvalid:
            return
        except OSError as error:
            if error.errno is not None:  # of the disk; pyarrow's own, for a body that ends early, has no number
                raise


def _column(batch: Any, name: str) -> list[Any]:
    return list(batch.column(name).to_pylist())


def _latest(numbers: dict[Any, int], rows: Any, key: str) -> None:
    for value, number in zip(_column(rows, key), _column(rows, "_seq"), strict=True):
        numbers[value] = max(number, numbers.get(value, -1))
