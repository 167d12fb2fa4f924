"""Copying a collection's rows under vectors of another model into a new collection, which then takes its name.

Owns the rows of the new collection, and when it may take the name. Knows nothing of models and images.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from llama_index.core.schema import BaseNode, ImageNode, TextNode

from mm_retriever.errors import StoreError, StoreLockedError, StoreMismatchError
from mm_retriever.store import switching
from mm_retriever.store.collection import Collection, Row
from mm_retriever.store.connection import Connection, check_exists
from mm_retriever.store.rows import damaged_rows, has_checksum, row_checksum, row_is_damaged, row_to_node, stored_row
from mm_retriever.store.schema import (
    CHECKSUM_FIELD,
    CONTENT_FIELD,
    DOC_ID_FIELD,
    ID_FIELD,
    INDEXES,
    MADE_FROM_PROPERTY,
    NODE_FIELDS,
    TEXT_FIELD,
    TYPE_FIELD,
    VECTOR_FIELD,
    WRITE_ROWS,
    same_model,
    stored_property,
)

_TEXTS = (DOC_ID_FIELD, TEXT_FIELD, CONTENT_FIELD, TYPE_FIELD)


class Succession:
    """A collection, and the new one that is to take its name; a context manager.

    Args:
        uri: a Milvus Lite file, or the URI of a server.
        collection: name of the collection.
        token: for servers that ask for one.
        timeout: seconds for each request.
        dimension: of the new vectors.
        model_id: the new model.
        model_note: name and float format of the new model, for people.

    Attributes:
        old: the collection.
        is_done: whether it has vectors of the new model already, so that there is nothing to do.

    Raises:
        StoreError: the collection is missing, or it is unclear which of two collections an earlier run left is wanted.
        StoreLockedError: another process of this machine reindexes the same collection.
    """

    def __init__(
        self,
        uri: str | Path,
        collection: str,
        *,
        token: str | None,
        timeout: float,
        dimension: int,
        model_id: str,
        model_note: str,
    ) -> None:
        check_exists(uri)
        with ExitStack() as closing:
            self._connection = closing.enter_context(Connection(uri, token=token, timeout=timeout))
            if not closing.enter_context(switching.reindex_lock(self._connection, collection)):
                raise StoreLockedError(
                    f"another process reindexes the collection {collection!r} at {self._connection.where}: "
                    "wait for it to end"
                )
            with self._connection.request("looking for what an earlier reindex left"):
                switching.give_back(self._connection, collection)
            self.old = Collection(self._connection, collection)
            self.old.open(None)
            with self._connection.request("looking for aliases"):
                switching.refuse_alias(self._connection, collection)
            self.is_done = bool(self.old.model_id) and same_model(self.old.model_id, model_id)
            self._name = switching.name_beside(collection, model_id)
            self._remove_leftovers()
            if not self.is_done:
                self._new = self._opened(dimension, model_id, model_note)
            self._closing = closing.pop_all()

    def __enter__(self) -> Succession:
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.close()

    def _opened(self, dimension: int, model_id: str, model_note: str) -> Collection:
        old = self.old
        index = old.index_type if old.index_type in INDEXES else "auto"
        model: dict[str, Any] = {"dimension": dimension, "model_id": model_id, "model_note": model_note}
        new = Collection(self._connection, self._name, **model, index=index, metric=old.metric)
        new.made_from = old.model_id or "a model that the collection did not name"
        words, analyzer = old.words, None
        if words is not None and words.model is None:
            analyzer = words.analyzer
        hybrid = False if words is None else words.model or True
        try:
            new.open(hybrid, create=True, analyzer=analyzer)
        except StoreMismatchError:  # left by a run before the old collection was created anew
            new.open(hybrid, create=True, analyzer=analyzer, overwrite=True)
        return new

    def _remove_leftovers(self) -> None:
        """Remove what earlier runs left, except rows under the new model."""
        connection, name = self._connection, self.old.name
        with connection.request("looking for what an earlier reindex left"):
            names = connection.ask(connection.client.list_collections)
            description = connection.ask(connection.client.describe_collection, name)
            for left in names:
                if switching.left_by_reindex(left) != name or (left == self._name and not self.is_done):
                    continue
                if left == switching.name_before(name) and not stored_property(description, MADE_FROM_PROPERTY):
                    raise StoreError(
                        f"{connection.where} has the collection {left!r} of a reindex that was broken off, and "
                        f"{name!r} was made anew since. Look at both, and remove the one that is not wanted"
                    )
                switching.drop(connection, left, name)

    # ------------------------------------------------------------------------------------------ rows

    def old_rows(self) -> Iterator[list[Row]]:
        """Yield the whole rows of the old collection in pages, by id.

        Raises:
            StoreDamagedError: a row is not what was stored.
        """
        for page in self.old.scan(["*", CHECKSUM_FIELD], "", page_rows=WRITE_ROWS):
            if damaged := [str(row[ID_FIELD]) for row in page if row_is_damaged(row)]:
                raise damaged_rows(damaged)
            yield page

    def new_rows(self, ids: Sequence[str]) -> dict[str, Row]:
        """Return the rows of the new collection with these ids, without vectors."""
        return self._new.columns(ids, NODE_FIELDS)

    def count_new(self) -> int:
        """Return how many rows the new collection has."""
        return self._new.count("")

    def write(self, rows: Sequence[tuple[Row, BaseNode | None, np.ndarray[Any, Any]]]) -> None:
        """Store rows of the old collection, or the nodes given in their place, under new vectors."""
        new_rows = [self._row(*row) for row in rows]
        words = self._new.words
        if words is not None and words.model is None:
            columns = words.columns([node or row_to_node(row) for row, node, _ in rows])
            new_rows = [{**row, **more} for row, more in zip(new_rows, columns, strict=True)]
        self._new.write(new_rows)

    def _row(self, row: Row, node: BaseNode | None, vector: np.ndarray[Any, Any]) -> Row:
        words = self.old.words
        computed = set() if words is None else {words.text_field, words.vector_field} - {TEXT_FIELD}
        left_out = {CHECKSUM_FIELD, *computed}  # and the empty fields of another program's schema: None is not stored
        kept = {name: value for name, value in row.items() if name not in left_out and value is not None}
        kept |= {name: row.get(name) or "" for name in _TEXTS}  # another program's collection may lack some
        kept[VECTOR_FIELD] = np.asarray(vector, dtype=np.float32)
        if isinstance(node, TextNode | ImageNode):
            kept |= stored_row(node.model_copy(update={"embedding": vector.tolist()}), len(vector))
        elif has_checksum(row):
            kept[CHECKSUM_FIELD] = row_checksum(kept)
        if words is not None and words.model is not None:
            kept[words.vector_field] = row[words.vector_field]
        return kept

    def remove_gone(self) -> None:
        """Remove the rows of the new collection that the old one no longer has."""
        for page in self._new.scan((), "", page_rows=1_000):
            ids = [row[ID_FIELD] for row in page]
            present = self.old.columns(ids, ())
            self.remove([id_ for id_ in ids if id_ not in present])

    def remove(self, ids: Sequence[str]) -> None:
        """Remove rows of the new collection."""
        if ids:
            self._new.delete_ids(ids)

    # ------------------------------------------------------------------------------------------ the switch

    def switch(self, state: str, rows: int) -> bool:
        """Give the new collection the name of the old one, and remove the old one.

        Args:
            state: of the old collection when its rows were copied, from `RowsState`.
            rows: the number that the new collection must have.

        Returns:
            False if the old collection was written to since, so that its rows must be copied again.
        """
        if self.count_new() != rows:
            return False

        def unchanged(name: str) -> bool:
            return self._state(name, exact=state.startswith("+")) == state

        return switching.switch(self._connection, self.old.name, self._name, unchanged)

    def _state(self, name: str, *, exact: bool) -> str:
        names = NODE_FIELDS if exact else (CHECKSUM_FIELD,)
        frozen = Collection(self._connection, name)
        frozen.open(None)
        state = RowsState(exact=exact)
        for page in frozen.scan(names, ""):
            state.add(page)
        return str(state)


class RowsState:
    """A digest of the ids and checksums of a collection's rows by id; equal digests, equal rows.

    Args:
        exact: whether the nodes are included too, for rows without a checksum.
    """

    def __init__(self, *, exact: bool) -> None:
        self._exact = exact
        self._digest = hashlib.sha256()

    def add(self, page: Sequence[Mapping[str, Any]]) -> None:
        """Include the next rows."""
        names = (ID_FIELD, *NODE_FIELDS) if self._exact else (ID_FIELD, CHECKSUM_FIELD)
        for row in page:
            self._digest.update(json.dumps([row.get(name) for name in names]).encode())

    def __str__(self) -> str:
        return ("+" if self._exact else "") + self._digest.hexdigest()
