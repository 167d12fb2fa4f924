"""Files of rows that a Milvus server imports by itself, each row exactly once.

A bulk import adds rows beside stored ones of the same id, imports a file as often as it is requested, and shows the
rows some time after it reports success. So this module checks the rows and not the tasks: a file whose rows are all
there once is left alone, one whose rows are there in part or twice is removed and imported anew, and while a task for a
file is open no other is started. A run that died can be repeated, with the same result.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pymilvus.client.types import BulkInsertState
from tqdm import tqdm

from mm_retriever.errors import StoreError, StoreMismatchError, StoreUnavailableError
from mm_retriever.store.collection import Collection
from mm_retriever.store.filters import one_of
from mm_retriever.store.image_store import ImageStore
from mm_retriever.store.parquet import read_account, read_columns, read_ids, read_some_vectors
from mm_retriever.store.rows import chunks
from mm_retriever.store.schema import ID_FIELD, VECTOR_FIELD

_ROUNDS = 3
"""Imports of one file whose rows are there twice afterwards: the first, and another for each rival importer."""

_AT_ONCE = 64
"""Tasks that are open at a time; a server takes about a thousand of all its clients together."""

_POLL_SECONDS = 0.5
_IDS_PER_COUNT = 1_000
_COMPARED_VECTORS = 32
_FAILED = ("Failed", "Failed and cleaned")
_ENDED = ("Completed", *_FAILED)


@dataclass(frozen=True)
class ImportReport:
    """The result of `import_shards`: rows imported, rows that were there already, and seconds of wall clock."""

    imported: int
    present: int
    seconds: float

    def __str__(self) -> str:
        return f"{self.imported} rows imported, {self.present} there already, in {self.seconds:.1f} s"


def import_files(
    store: ImageStore,
    files: Sequence[Path],
    *,
    remote_folder: str,
    words: str | None,
    timeout: float,
    show_progress: bool,
) -> ImportReport:
    """Let the server of a store import the files; return when each of their rows is there exactly once.

    Args:
        store: on a Milvus server.
        files: as `ParquetRows` wrote them, each with rows.
        remote_folder: where the server's object storage has copies of them, under the same names.
        words: `words_name` of the index in the files.
        timeout: seconds without progress on the server after which to give up.
        show_progress: whether to show a progress bar.
    """
    start = time.perf_counter()
    collection = store._collection
    if collection.connection.lite_path is not None:
        raise StoreError(
            f"{collection.connection.where} is a Milvus Lite file, which imports nothing by itself: "
            "use ingest_images, or open a Milvus server"
        )
    index = collection.words
    if (stored := index and index.name) != words:
        raise StoreMismatchError(
            f"index of words: {words or 'none'} in the files, {stored or 'none'} in collection {collection.name!r}. "
            "Embed, and open the store, with the same hybrid="
        )
    _check_columns(collection, files)
    run = _Import(collection, files, remote_folder, timeout)
    with tqdm(total=len(files), desc="Importing", unit="file", disable=not show_progress) as bar:
        return ImportReport(*run.rows_imported_and_present(bar), seconds=time.perf_counter() - start)


def _check_columns(collection: Collection, files: Sequence[Path]) -> None:
    """Refuse files whose columns are not the collection's, as when another program made it."""
    connection = collection.connection
    with connection.request("reading the schema"):
        facts = connection.ask(connection.client.describe_collection, collection_name=collection.name)
    expected = {field["name"] for field in facts["fields"] if not field.get("is_function_output")}
    for path in files:
        if (names := set(read_columns(path))) != expected:
            raise StoreMismatchError(
                f"{path.name} has the columns {', '.join(sorted(names))}; "
                f"collection {collection.name!r} has {', '.join(sorted(expected))}"
            )


class _Import:
    """One call of `import_files`."""

    def __init__(self, collection: Collection, files: Sequence[Path], remote_folder: str, timeout: float) -> None:
        self._collection = collection
        self._connection = collection.connection
        self._files = {
            f"{remote_folder.rstrip('/')}/{path.name}" if remote_folder else path.name: path for path in files
        }
        self._timeout = timeout
        self._partly_there: set[str] = set()

    def rows_imported_and_present(self, bar: tqdm[Any]) -> tuple[int, int]:
        """Import the files that are not there whole; return the rows imported and the rows that were there before."""
        tasks = self._tasks()
        self._wait([task.task_id for task in tasks if self._may_add_rows(task)])
        if tasks:
            self._show_imported_rows()
        missing = list(self._files)
        if self._collection.count(""):
            missing = [name for name in missing if not self._is_whole(name)]
        imported = sum(read_account(self._files[name])[0] for name in missing)
        present = sum(read_account(path)[0] for path in self._files.values()) - imported
        bar.update(len(self._files) - len(missing))
        for _ in range(_ROUNDS):
            if not missing:
                return imported, present
            for names in chunks(missing, _AT_ONCE):
                self._import(names)
                bar.update(len(names))
            self._show_imported_rows()
            missing = [name for name in missing if not self._is_well_imported(name)]
            bar.update(-len(missing))
        raise StoreError(
            f"rows of {missing[0]!r} were there more than once after each of {_ROUNDS} imports, and were removed: "
            "is another program importing the same files? Repeat the call when it is done"
        )

    # ------------------------------------------------------------------------------------------ rows

    def _stored(self, ids: Sequence[str]) -> tuple[int, int]:
        """How many of the ids are stored, and in how many rows."""
        different = rows = 0
        for part in chunks(ids, _IDS_PER_COUNT):
            if stored := len(self._collection.columns(part, ())):
                different += stored
                rows += self._collection.count(one_of(ID_FIELD, part))
        return different, rows

    def _is_whole(self, name: str) -> bool:
        """Whether each row of a file is there once."""
        ids = read_ids(self._files[name])
        different, rows = self._stored(ids)
        if rows and (different, rows) != (len(ids), len(ids)):
            self._partly_there.add(name)
        return different == rows == len(ids)

    def _is_well_imported(self, name: str) -> bool:
        """Whether each row is there once, as it is in the file; otherwise the rows of the file are removed."""
        path = self._files[name]
        ids = read_ids(path)
        different, rows = self._stored(ids)
        if different == len(ids):
            expected = read_some_vectors(path, _COMPARED_VECTORS)
            stored = self._collection.columns(list(expected), (VECTOR_FIELD,))
            same = all(np.array_equal(expected[id_], np.float32(row[VECTOR_FIELD])) for id_, row in stored.items())
            if same and rows == different:
                return True
        self._collection.delete_ids(ids)
        if different == len(ids) and rows > different:
            return False
        raise StoreError(
            f"what the server imported from {name!r} is not what {str(path)!r} holds: copy the file again, then "
            "repeat the call. The rows of this file were removed, but not those that only the server's copy has"
        )

    def _show_imported_rows(self) -> None:
        """Make the server show imported rows at once, and not up to a minute later."""
        with self._connection.request("loading imported rows"):
            load = {"collection_name": self._collection.name, "timeout": self._timeout}
            self._connection.client.load_collection(**load)  # after a restart it is not loaded
            self._connection.client.refresh_load(**load)

    # ------------------------------------------------------------------------------------------ tasks

    def _import(self, names: Sequence[str]) -> None:
        started = {self._start(name): name for name in names}
        # A request whose answer was lost was repeated; the server may have started a task for each.
        twice = {task.task_id for task in self._tasks() if self._may_add_rows(task)}
        for task in self._wait([*twice.union(started)]):
            if task.state_name in _FAILED and task.task_id in started:
                raise StoreError(
                    f"the server did not import {started[task.task_id]!r}: {task.failed_reason or task.state_name}. "
                    "What it imported before is there; the same call goes on"
                )

    def _start(self, name: str) -> int:
        if name in self._partly_there:
            self._collection.delete_ids(read_ids(self._files[name]))
        place = {"collection_name": self._collection.name, "partition_name": ""}
        with self._connection.request(f"starting to import {name!r}"):
            return int(self._connection.ask(self._handler.do_bulk_insert, files=[name], **place))

    def _tasks(self) -> list[BulkInsertState]:
        """The import tasks of the collection that the server remembers, failed ones left out."""
        with self._connection.request("listing import tasks"):
            tasks = self._connection.ask(
                self._handler.list_bulk_insert_tasks, limit=0, collection_name=self._collection.name
            )
        return [task for task in tasks if task.state_name not in _FAILED]

    def _may_add_rows(self, task: BulkInsertState) -> bool:
        """Whether a task is open, and for one of our files or for files that it does not name."""
        return task.state_name not in _ENDED and (not task.files or any(name in task.files for name in self._files))

    def _wait(self, numbers: Sequence[int]) -> list[BulkInsertState]:
        """Wait for the tasks with these numbers and return their final states.

        Raises:
            StoreUnavailableError: none of them made progress within the timeout.
        """
        waiting, ended = list(numbers), []
        last: object = None
        while waiting:
            with self._connection.request("importing"):
                tasks = [
                    self._connection.ask(self._handler.get_bulk_insert_state, task_id=number) for number in waiting
                ]
            ended += [task for task in tasks if task.state_name in _ENDED]
            waiting = [task.task_id for task in tasks if task.state_name not in _ENDED]
            now = [(task.task_id, task.state, task.row_count, task.progress) for task in tasks]
            if now != last:
                last, deadline = now, time.monotonic() + self._timeout
            elif time.monotonic() > deadline:
                raise StoreUnavailableError(
                    f"Milvus at {self._connection.where} made no progress with {len(waiting)} import tasks for "
                    f"{self._timeout:g} s. It may still; a server that was killed gives up lost tasks after a quarter "
                    "of an hour. The same call waits for them and goes on"
                )
            if waiting:
                time.sleep(_POLL_SECONDS)
        return ended

    @property
    def _handler(self) -> Any:
        """The handler of pymilvus' client, which has no bulk insert of its own; `pymilvus.utility` would reconnect."""
        return self._connection.client._get_connection()
