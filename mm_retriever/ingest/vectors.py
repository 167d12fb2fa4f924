"""Vectors of images and texts, failures of the model, and reuse of stored vectors.

An image that the model cannot take does not cost its batch; a broken model ends the run. For file contents whose digest
is in the store, the stored vector is used; the digests of a whole store are not kept in memory.
"""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from llama_index.core.vector_stores.types import FilterCondition, FilterOperator, MetadataFilter, MetadataFilters

from mm_retriever.embedding import ComposedEmbedding
from mm_retriever.errors import ModelServerError, reason_of
from mm_retriever.own_keys import FILE_STAMP, own_columns, own_value
from mm_retriever.store import ImageStore

_NEVER_WORKED = 3
"""Failures without any success after which the model counts as broken, and not the images."""

_BROKEN = 32
"""Failures in a row after which a model that has worked counts as broken, as when a device is lost."""

T = TypeVar("T")
Vector = npt.NDArray[np.float32]


class Vectors:
    """Embeds inputs; gives a vector or the reason of the failure for each."""

    def __init__(self, embed_model: ComposedEmbedding) -> None:
        self._embed_model = embed_model
        self._embedded = 0
        self._failures = 0

    def of_images(self, prepared: Sequence[Any]) -> list[Vector | str]:
        """Embed what `prepare_image` returned."""
        return self._embed(prepared, self._embed_model.embed_images)

    def of_texts(self, texts: Sequence[str]) -> list[Vector | str]:
        """Embed texts."""
        return self._embed(
            texts, lambda texts: np.asarray(self._embed_model.get_text_embedding_batch(list(texts)), dtype=np.float32)
        )

    def _embed(self, inputs: Sequence[T], embed: Callable[[Sequence[T]], Vector]) -> list[Vector | str]:
        if not inputs:
            return []
        try:
            vectors = embed(inputs)
        except Exception as error:  # whatever a model raises
            if isinstance(error, ModelServerError) and error.passing:
                raise  # after all retries: the server is at fault, not the images
            if len(inputs) > 1:
                return [self._embed([item], embed)[0] for item in inputs]
            self._failures += 1
            if self._failures >= (_BROKEN if self._embedded else _NEVER_WORKED):
                raise
            return [f"the model failed: {reason_of(error)}"]
        self._embedded += len(inputs)
        self._failures = 0
        return [row if np.isfinite(row).all() else "the model gave NaN or infinity for it" for row in vectors]


REQUESTS = 8
"""Batches that are looked up singly, each with a pass over the collection, before all digests are fetched."""

_COLUMNS = own_columns("digest", "file_path", "width", "height", FILE_STAMP)
_DIGESTS = own_columns("digest")
_PLACES = 64  # rows of one digest that are read; further copies add nothing


class KnownVectors:
    """Finds rows of a store by the digest of their files; `retried` calls the store. Close it at the end."""

    def __init__(self, store: ImageStore, retried: Callable[..., Any]) -> None:
        self._store = store
        self._retried = retried
        self._requests = 0
        self._empty = retried(store.count) == 0
        self._ids: sqlite3.Connection | None = None

    def close(self) -> None:
        """Remove the temporary file of digests."""
        if self._ids is not None:
            self._ids.close()

    def rows(self, digests: Collection[str]) -> dict[str, list[Mapping[str, Any]]]:
        """Return the rows of each known digest, with vector, path and size."""
        wanted = sorted(set(digests))
        if not wanted:
            return {}
        if self._empty or self._requests >= REQUESTS:
            ids = self._kept_ids(wanted)
        else:
            self._requests += 1
            ids = self._found_ids(wanted)
        names = (*_COLUMNS, self._store.embedding_field)
        rows: dict[str, list[Mapping[str, Any]]] = {}
        for row in self._retried(self._store.columns, ids, names).values():
            digest, size = own_value(row, "digest"), (own_value(row, "width"), own_value(row, "height"))
            if digest in digests and all(isinstance(side, int) for side in size):
                rows.setdefault(str(digest), []).append(row)
        return rows

    def add(self, digest: str, row_id: str) -> None:
        """Remember a row that was just written."""
        if self._empty or self._ids is not None:
            self._database().execute("INSERT OR REPLACE INTO known VALUES (?, ?)", (row_id, digest))

    def _found_ids(self, digests: list[str]) -> list[str]:
        conditions = [MetadataFilter(key=key, operator=FilterOperator.IN, value=digests) for key in _DIGESTS]
        either = MetadataFilters(filters=[*conditions], condition=FilterCondition.OR)
        counts: Counter[object] = Counter()
        ids = []
        for page in self._store.scan(_DIGESTS, either):
            for row in page:
                digest = own_value(row, "digest")
                counts[digest] += 1
                if counts[digest] <= _PLACES:
                    ids.append(row["id"])
        return ids

    def _kept_ids(self, digests: list[str]) -> list[str]:
        query, database = "SELECT id FROM known WHERE digest = ? LIMIT ?", self._database()
        return [row[0] for digest in digests for row in database.execute(query, (digest, _PLACES))]

    def _database(self) -> sqlite3.Connection:
        """The digests, in a temporary file, because those of millions of rows do not fit into memory."""
        if self._ids is None:
            self._ids = sqlite3.connect("", isolation_level=None)
            self._ids.execute("CREATE TABLE known (id TEXT PRIMARY KEY, digest TEXT) WITHOUT ROWID")
            self._ids.execute("CREATE INDEX by_digest ON known (digest)")
            if not self._empty:
                for page in self._store.scan(_DIGESTS):
                    known = [(row["id"], digest) for row in page if isinstance(digest := own_value(row, "digest"), str)]
                    self._ids.executemany("INSERT OR REPLACE INTO known VALUES (?, ?)", known)
        return self._ids
