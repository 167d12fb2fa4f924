"""Rows in Parquet files that Milvus imports by itself, written with pymilvus' own writer.

A file has the columns of a collection, and its writer's account of it in the footer, so that either both exist or
neither. Knows nothing of servers.
"""

from __future__ import annotations

import json
import logging
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from llama_index.core.schema import BaseNode

from mm_retriever.errors import MissingExtraError, StoreError, reason_of
from mm_retriever.files import sync
from mm_retriever.store.rows import node_to_row
from mm_retriever.store.schema import ID_FIELD, VECTOR_FIELD, collection_schema
from mm_retriever.store.words import SparseEmbedding, new_word_index

DYNAMIC_FIELD = "$meta"
"""The column of all metadata, as JSON."""

_ACCOUNT = b"mm_retriever"

logging.getLogger("pymilvus.bulk_writer.buffer").setLevel(logging.WARNING)  # or it prints a line for each file


class ParquetRows:
    """The rows of one file, in memory until it is written.

    Args:
        dimension: numbers in one vector.
        hybrid: the index of words of the collection that will take the file, as `open_store` knows it.
    """

    def __init__(self, dimension: int, hybrid: bool | SparseEmbedding = False) -> None:
        try:
            from pymilvus.bulk_writer.buffer import Buffer
            from pymilvus.bulk_writer.constants import BulkFileType
        except ImportError as error:
            raise MissingExtraError.of(error, "pymilvus[bulk-writer]", "bulk") from error
        _parquet()  # a missing package is reported before anything is embedded
        self._dimension = dimension
        self._words = new_word_index(hybrid)
        # Not LocalBulkWriter around it: that writes in a thread, where errors are lost, under names of its own.
        schema = collection_schema(dimension)
        if self._words is not None:
            self._words.add_to(schema)
        self._buffer = Buffer(schema, BulkFileType.PARQUET)
        self._bytes = 0

    def __len__(self) -> int:
        return int(self._buffer.row_count)

    def add(self, nodes: Sequence[BaseNode]) -> None:
        """Add the rows that `ImageStore.add` would store.

        Raises:
            NodeError: a node cannot be stored; none was added.
        """
        rows = [node_to_row(node, self._dimension) for node in nodes]
        if self._words is not None:
            columns = self._words.columns(nodes)
            rows = [{**row, **more} for row, more in zip(rows, columns, strict=True)]
        for row in rows:
            self._bytes += sum(len(value) for value in row.values() if isinstance(value, str)) + 4 * self._dimension
            self._buffer.append_row(row)

    def write(self, path: Path, drafts: Path, account: Mapping[str, Any]) -> bool:
        """Put the whole file in place; False if the file exists already, which then stays.

        Args:
            path: of the file. Once it exists it survives a power cut.
            drafts: a folder on the same file system. Drafts that killed writers of the same file left are removed.
            account: what to write into the footer, as JSON.
        """
        draft = drafts / f"{path.stem}.{uuid.uuid4().hex}"
        try:
            _copy_with_account(self._written(draft.with_name(f"{draft.name}.parquet")), draft, account)
            if path.exists():
                return False
            draft.replace(path)
            sync(path.parent)
            return True
        except FileNotFoundError:
            if not path.exists():
                raise
            return False  # another writer of the file was faster, and removed our draft
        finally:
            remove_drafts(path, drafts, only="" if path.exists() else draft.name)

    def _written(self, rough: Path) -> Path:
        if len(self):
            self._buffer.persist(str(rough.with_suffix("")), buffer_size=self._bytes, buffer_row_count=len(self))
        else:
            # `persist` needs a row, as pandas cannot tell an empty column of vectors; the schema has no public name.
            _parquet().write_table(self._buffer._deduce_arrow_schema().empty_table(), rough)
        return rough


def remove_drafts(path: Path, drafts: Path, *, only: str = "") -> None:
    """Remove all drafts of a file, also those of killed writers, or the draft `only`."""
    for draft in drafts.glob(f"{only or path.stem + '.'}*"):
        draft.unlink(missing_ok=True)


def read_account(path: Path) -> tuple[int, dict[str, Any]]:
    """Return the number of rows in a file, and its writer's account.

    Raises:
        StoreError: there is no such file, or another program wrote it.
    """
    parquet = _parquet()
    try:
        footer = parquet.read_metadata(path)
        return int(footer.num_rows), dict(json.loads(footer.metadata[_ACCOUNT]))
    except (OSError, KeyError, TypeError, ValueError) as error:  # Arrow's own are of these kinds
        raise StoreError(f"{str(path)!r} is no file of rows that this package wrote ({reason_of(error)})") from error


def read_columns(path: Path) -> list[str]:
    """Return the names of the columns of a file, without that of the metadata."""
    return [name for name in _parquet().read_schema(path).names if name != DYNAMIC_FIELD]


def read_ids(path: Path) -> list[str]:
    """Return the ids of the rows of a file, in order."""
    with _parquet().ParquetFile(path) as file:
        return list(file.read(columns=[ID_FIELD]).column(ID_FIELD).to_pylist())


def read_some_vectors(path: Path, count: int) -> dict[str, npt.NDArray[np.float32]]:
    """Return the vectors of about `count` rows, by id, spread over the first row group of a file."""
    with _parquet().ParquetFile(path) as file:
        group = file.read_row_group(0, columns=[ID_FIELD, VECTOR_FIELD])
    chosen = group.take(list(range(0, group.num_rows, max(1, group.num_rows // count))))
    vectors = chosen.column(VECTOR_FIELD).to_pylist()
    return {
        id_: np.asarray(vector, dtype=np.float32)
        for id_, vector in zip(chosen.column(ID_FIELD).to_pylist(), vectors, strict=True)
    }


def _copy_with_account(rough: Path, draft: Path, account: Mapping[str, Any]) -> None:
    """Write a file again with an account in its footer, one row group at a time."""
    with _parquet().ParquetFile(rough) as source:
        footer = {**(source.schema_arrow.metadata or {}), _ACCOUNT: json.dumps(account).encode()}
        with _parquet().ParquetWriter(draft, source.schema_arrow.with_metadata(footer)) as writer:
            for group in range(source.num_row_groups):
                writer.write_table(source.read_row_group(group))
    rough.unlink(missing_ok=True)
    sync(draft)


def _parquet() -> Any:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise MissingExtraError.of(error, "pymilvus[bulk-writer]", "bulk") from error
    return pyarrow.parquet
