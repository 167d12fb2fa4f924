"""One Milvus collection: its schema and indexes, the model of its vectors, and its rows.

Owns the requests that write, read and search a collection, and their consistency. Knows rows, vectors and expressions,
nothing of nodes and queries.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from pymilvus import AnnSearchRequest, RRFRanker
from pymilvus.client.types import ConsistencyLevel
from pymilvus.exceptions import MilvusException

from mm_retriever.errors import StoreError, StoreMismatchError
from mm_retriever.store.connection import Connection
from mm_retriever.store.filters import all_of, id_list, one_of, quoted
from mm_retriever.store.lite_durability import sync_logs, sync_new_collection
from mm_retriever.store.rows import chunks, damaged_rows, row_is_damaged, vector_is_damaged, without_checksums
from mm_retriever.store.schema import (
    CHECKSUM_FIELD,
    ID_FIELD,
    METRICS,
    RRF_K,
    SINCE,
    VECTOR_FIELD,
    build_params,
    collection_schema,
    declared_columns,
    index_for,
    lacks,
    model_properties,
    same_model,
    search_params,
    stored_model,
    vector_length,
)
from mm_retriever.store.switching import LOOK_SECONDS, ModelWatch, come_back, drop_named, is_away
from mm_retriever.store.words import SparseEmbedding, SparseVector, WordIndex, new_word_index, word_index_of

logger = logging.getLogger(__name__)

_PAGE_ROWS = 10_000
_IDS_PER_REQUEST = 1_000
_SAMPLED_ROWS = 64
"""Rows checked when a collection is opened, after the samples of Milvus Lite's data files."""

_STRONG_AFTER_DELETE_SECONDS = 5.0
_NOT_LOADED = 101
_INDEX_EXISTS = 35
Row: TypeAlias = dict[str, Any]
Hit: TypeAlias = Mapping[str, Any]
"""A search result: the id of a row, its "distance", and the columns asked for in "entity"."""


class Collection:
    """One collection, on its own connection. Sends nothing to Milvus before `open`.

    Dimension, model and metric may be left open ("" and None); `open` then reads them from the existing collection.

    Attributes:
        model_note: name and float format of the model, for people.
        index_type: the type of the vector index, once open.
        rows: expected number of rows of a new collection, if known.
        made_from: the previous model, where `reindex` makes the collection.
        words: the full-text index, None without one.
        declared: columns of another program's schema, which filters cannot name.
    """

    def __init__(
        self,
        connection: Connection,
        name: str,
        *,
        dimension: int | None = None,
        model_id: str = "",
        model_note: str = "",
        index: str = "auto",
        metric: str | None = None,
        rows: int | None = None,
    ) -> None:
        self.rows = rows
        self.connection, self.name, self.model_id, self.model_note = connection, name, model_id, model_note
        self.dimension = dimension or 0
        self.metric = (metric or "").upper()
        self.index_type = "auto" if index.lower() == "auto" else index.upper()
        self.words: WordIndex | None = None
        self.made_from = ""
        self.declared: frozenset[str] = frozenset()
        self._watch = ModelWatch(connection, name)
        self._scans_are_strong = True
        self._last_delete = -_STRONG_AFTER_DELETE_SECONDS

    # ------------------------------------------------------------------------------------------ schema and index

    def open(
        self,
        hybrid: bool | SparseEmbedding | None,
        *,
        overwrite: bool = False,
        create: bool = False,
        analyzer: str | None = None,
    ) -> None:
        """Create the collection, or check the existing one; then load it, which searching needs.

        Raises:
            StoreError: it is missing, and `create` is False.
        """
        with self.connection.request("opening the collection"):
            while True:
                with self.connection.turn():
                    exists = self._ask(self._client.has_collection)
                    if exists or not is_away(self.connection, self.name):
                        if not exists and not create:
                            raise self._missing()
                        self._open(hybrid, analyzer, exists=exists, overwrite=overwrite)
                        break
                come_back(self.connection, self.name)
        if not exists or overwrite:
            self._sync(sync_new_collection)
        elif damaged := [row[ID_FIELD] for row in self.some(["*"], "", _SAMPLED_ROWS) if row_is_damaged(row)]:
            logger.warning("%s: %s", self.connection.where, damaged_rows(damaged))

    def _open(
        self, hybrid: bool | SparseEmbedding | None, analyzer: str | None, *, exists: bool, overwrite: bool
    ) -> None:
        if exists and not overwrite:
            self._check(hybrid, analyzer)
        else:
            self.words = new_word_index(hybrid, analyzer)
            self._check_server()
            if exists:
                drop_named(self.connection, self.name)
            if not self._create():
                self._check(hybrid, analyzer)
        self._create_indexes()
        self._check_index()
        self.load()

    def clear(self) -> None:
        """Remove every row; the collection stays open."""
        with self.connection.request("clearing the collection"), self.connection.turn():
            drop_named(self.connection, self.name)
            self._create()
            self._create_indexes()
            self.load()
        self._sync(sync_new_collection)

    def _create(self) -> bool:
        """Create the collection; False if it exists.

        It exists if the process that served the Milvus Lite file created it and was killed before it could answer.
        """
        if not self.dimension:
            raise StoreError("dimension: a new collection needs to know how many numbers a vector has")
        # A server is sure to store the description, Milvus Lite the properties; neither is sure to store the other.
        stored = model_properties(self.model_id, self.model_note, self.made_from)
        stored |= {} if self.words is None else self.words.properties
        self._watch.remember(self.model_id or None, self.dimension)
        schema = collection_schema(self.dimension, "" if self._lite else json.dumps(stored))
        if self.words is not None:
            self.words.add_to(schema)
        properties = {"properties": stored} if self._lite else {}
        self._scans_are_strong = True
        try:
            self._ask(self._client.create_collection, schema=schema, consistency_level="Strong", **properties)
        except MilvusException:
            if not self._lite or not self._ask(self._client.has_collection):
                raise
            return False
        return True

    def _create_indexes(self) -> None:
        """Create the vector index and the full-text index where they are missing."""
        if not self._ask(self._client.list_indexes, field_name=VECTOR_FIELD):
            self_hosted = self._lite or self._client.is_self_hosted
            auto = index_for(self.rows, lite=self._lite, self_hosted=self_hosted)
            index = auto if self.index_type == "auto" else self.index_type
            if index in SINCE and not self._lite:
                self.connection.check_version(SINCE[index], f"index={index!r}")
            build = build_params(index, self.rows)
            self._index(VECTOR_FIELD, index, self.metric or METRICS[0], **({"params": build} if build else {}))
        words = self.words
        if words is not None and not self._ask(self._client.list_indexes, field_name=words.vector_field):
            self._index(words.vector_field, "SPARSE_INVERTED_INDEX", words.metric)

    def _index(self, field: str, index_type: str, metric: str, **build: Any) -> None:
        params = self._client.prepare_index_params()
        params.add_index(field, index_name=field, index_type=index_type, metric_type=metric, **build)
        # sync=False: waiting takes half a second, and Milvus Lite prints that it cannot; loading waits anyway
        try:
            self._ask(self._client.create_index, index_params=params, sync=False)
        except MilvusException as error:
            if error.code != _INDEX_EXISTS:  # a repeated request; `_check_index` checks the existing index
                raise

    def _check_server(self) -> None:
        """Refuse a full-text index on a server that is too old, before a collection is dropped or created."""
        if self.words is not None and not self._lite:
            first, hybrid = ((2, 4), "a sparse model") if self.words.model else ((2, 5), "True")
            self.connection.check_version(first, f"hybrid={hybrid}")

    def _check(self, hybrid: bool | SparseEmbedding | None, analyzer: str | None) -> None:
        description = self._ask(self._client.describe_collection)
        if (lack := lacks(description)) is not None:
            raise self._mismatch(f"was made by another program: it lacks {lack}")
        self.declared = declared_columns(description)
        dimension = vector_length(description)
        if self.dimension not in (0, dimension):
            raise self._mismatch(f"holds vectors of {dimension} numbers, the model gives {self.dimension}")
        self.dimension = dimension
        self._watch.remember(stored_model(description)[0], dimension)
        words = word_index_of(description, hybrid, analyzer)
        if isinstance(words, str):
            raise self._mismatch(words)
        self.words = words
        self._scans_are_strong = self._lite or description.get("consistency_level") == ConsistencyLevel.Strong
        stored, note = stored_model(description)
        if stored is None and self.model_id:
            logger.warning(
                "collection %r at %s does not say which model its vectors come from; it is taken to be %r",
                self.name,
                self.connection.where,
                self.model_id,
            )
        elif stored is not None and self.model_id and not same_model(stored, self.model_id):
            given = f" ({self.model_note})" if self.model_note else ""
            kept = f" ({note})" if note else ""
            raise self._mismatch(
                f"holds vectors of the model {stored!r}{kept}, the model given is {self.model_id!r}{given}"
            )
        if not self.model_id:
            self.model_id, self.model_note = stored or "", note

    def _check_index(self) -> None:
        name = self._ask(self._client.list_indexes, field_name=VECTOR_FIELD)[0]
        index = self._ask(self._client.describe_index, index_name=name)
        metric, index_type = str(index.get("metric_type")), str(index.get("index_type"))
        if metric not in METRICS:  # another program's
            raise self._mismatch(f"measures with {metric}, and only {' and '.join(METRICS)} are served")
        if self.metric not in ("", metric):
            raise self._mismatch(f"measures with {metric}, {self.metric} is asked for")
        if self.index_type not in ("auto", index_type):
            raise self._mismatch(f"has a {index_type} index, {self.index_type} is asked for")
        self.metric, self.index_type = metric, index_type

    def _mismatch(self, difference: str) -> StoreMismatchError:
        return StoreMismatchError(
            f"collection {self.name!r} at {self.connection.where} {difference}. "
            "Give another collection name, or overwrite=True to drop its rows and start anew"
        )

    def _missing(self) -> StoreError:
        names = sorted(self.connection.ask(self._client.list_collections))
        counts = [f"{name!r} ({self.connection.count(name)} rows)" for name in names[:20]]
        more = f" and {len(names) - 20} more" if len(names) > 20 else ""
        others = f"there are: {', '.join(counts)}{more}" if counts else "it holds none yet"
        return StoreError(f"there is no collection {self.name!r} at {self.connection.where}; {others}")

    # ------------------------------------------------------------------------------------------ writing

    def write(self, rows: Sequence[Row]) -> None:
        """Store rows of different ids; a row replaces the stored one of its id.

        Afterwards the rows of a Milvus Lite file survive a power cut.
        """
        # Milvus Lite: insert replaces a whole row, upsert keeps columns of the old row that the new one lacks.
        # Server: upsert replaces a whole row, insert keeps the old row beside the new one.
        call = self._client.insert if self._lite else self._client.upsert
        with self.connection.request(f"storing {len(rows)} rows"):
            self._watch.check(0)
            self._ask(call, data=list(rows))
        self._sync(sync_logs)

    def delete_where(self, expression: str) -> None:
        """Remove every row that matches."""
        for page in self.scan((), expression):  # ids first: older servers delete by primary key alone
            self.delete_ids([row[ID_FIELD] for row in page])

    def delete_ids(self, ids: Iterable[str]) -> None:
        """Remove the rows with these ids."""
        for part in chunks(id_list(ids), _IDS_PER_REQUEST):
            with self.connection.request(f"removing {len(part)} rows"):
                self._ask(self._client.delete, filter=one_of(ID_FIELD, part))
        self._last_delete = time.monotonic()
        self._sync(sync_logs)

    def flush(self) -> None:
        """Make Milvus Lite move rows from memory into data files, where searches are fast."""
        with self.connection.request("flushing"):
            self._ask(self._client.flush)

    def _sync(self, step: Callable[[Path, str], None]) -> None:
        """Sync a Milvus Lite file to disk; a server does so itself."""
        if self.connection.lite_path is None:
            return
        try:
            step(Path(self.connection.lite_path), self.name)
        except OSError as error:
            raise StoreError(
                f"the disk of {self.connection.where} failed while rows were put on it, and the last ones may not "
                f"survive a power cut: {error.strerror or error}"
            ) from error

    # ------------------------------------------------------------------------------------------ reading

    def columns(self, ids: Iterable[str], names: Sequence[str], expression: str = "") -> dict[str, Row]:
        """Return the named columns of the rows with these ids that match, by id."""
        rows: dict[str, Row] = {}
        with_vectors = VECTOR_FIELD in names or "*" in names  # checked: stored again, they would get a new checksum
        requested = [*names, CHECKSUM_FIELD] if with_vectors else names
        for part in chunks(id_list(ids), _IDS_PER_REQUEST):
            page = self._fetch(all_of(one_of(ID_FIELD, part), expression), requested)
            if with_vectors and (damaged := [str(row[ID_FIELD]) for row in page if vector_is_damaged(row)]):
                raise damaged_rows(damaged)
            rows.update((row[ID_FIELD], row) for row in without_checksums(page, names))
        return rows

    def scan(self, names: Sequence[str], expression: str, page_rows: int | None = None) -> Iterator[list[Row]]:
        """Yield the rows that match (id and the named columns) in pages, by id; rows may be removed meanwhile."""
        if not self._scans_are_strong:
            self.count("")  # makes the server catch up with what was written
        # The flags of pymilvus' own iterator, which itself pastes ids into its expression unquoted. With them a server
        # ignores every consistency level but the collection's own.
        in_order = {"limit": page_rows or _PAGE_ROWS, "iterator": "True", "reduce_stop_for_best": "True"}
        after = ""
        while page := self._fetch(all_of(expression, after), names, **in_order):
            yield page
            after = f"({ID_FIELD} > {quoted(page[-1][ID_FIELD])})"

    def some(self, names: Sequence[str], expression: str, limit: int) -> list[Row]:
        """Return up to `limit` matching rows, in no particular order."""
        return self._fetch(expression, names, limit=limit)

    def count(self, expression: str) -> int:
        """Return how many rows match; "" counts all."""
        if expression and self._lite:  # Milvus Lite counts by fetching whole rows
            return sum(len(page) for page in self.scan((), expression))
        return int(self._fetch(expression, ["count(*)"])[0]["count(*)"])

    def _fetch(self, expression: str, names: Sequence[str], **options: Any) -> list[Row]:
        with self.connection.request("reading rows"):
            rows: list[Row] = self._read(
                self._client.query,
                filter=expression,
                output_fields=list(names) or [ID_FIELD],
                **self._strong,
                **options,
            )
        return rows

    # ------------------------------------------------------------------------------------------ searching

    def search(self, vector: list[float], expression: str, limit: int, names: Sequence[str]) -> list[Hit]:
        """Return the rows nearest to a vector among those that match, best first."""
        with self.connection.request("searching"):
            return self._search(vector, VECTOR_FIELD, self._vector_params(limit), expression, limit, names)

    def word_search(
        self, words: WordIndex, query: str | SparseVector, expression: str, limit: int, names: Sequence[str]
    ) -> list[Hit]:
        """Return the matching rows with the best full-text scores, which are above 0, best first."""
        with self.connection.request("searching words"):
            params = {"metric_type": words.metric}
            hits = self._search(query, words.vector_field, params, expression, limit, names)
        # BM25 scores are negative on Milvus Lite, positive on a server
        return [{**hit, ID_FIELD: hit[ID_FIELD], "distance": abs(hit["distance"])} for hit in hits]

    def _search(
        self, query: Any, field: str, params: dict[str, Any], expression: str, limit: int, names: Sequence[str]
    ) -> list[Hit]:
        self._watch.check(LOOK_SECONDS)
        options = {"filter": expression, "limit": limit, "output_fields": list(names), **self._strong_after_delete}
        hits = self._read(self._client.search, data=[query], anns_field=field, search_params=params, **options)
        return list(hits[0]) if hits else []

    def fused_search(
        self,
        vector: tuple[list[float], int],
        words: tuple[WordIndex, str | SparseVector, int] | None,
        expression: str,
        limit: int,
        names: Sequence[str],
    ) -> list[Hit]:
        """Fuse a vector search and a full-text search, each with its depth in rows, by reciprocal ranks."""
        query, depth = vector
        parts = [AnnSearchRequest([query], VECTOR_FIELD, self._vector_params(depth), depth, expr=expression)]
        if words is not None:
            index, text, most = words
            params = {"metric_type": index.metric}
            parts.append(AnnSearchRequest([text], index.vector_field, params, most, expr=expression))
        options = {"limit": limit, "output_fields": list(names), **self._strong_after_delete}
        with self.connection.request("searching vectors and words"):
            self._watch.check(LOOK_SECONDS)
            hits = self._read(self._client.hybrid_search, reqs=parts, ranker=RRFRanker(RRF_K), **options)
        return list(hits[0]) if hits else []

    def _vector_params(self, limit: int) -> dict[str, Any]:
        breadth = search_params(self.index_type, limit)
        return {"metric_type": self.metric, **({"params": breadth} if breadth else {})}

    # ------------------------------------------------------------------------------------------ requests

    def _read(self, call: Callable[..., Any], **options: Any) -> Any:
        """The answer to a read; loads the collection where a restarted server has not."""
        with self.connection.deadline() as until:
            while True:
                try:
                    return self._ask(call, **options)
                except MilvusException as error:
                    if until.left <= 0 or (error.code != _NOT_LOADED and not self._watch.is_back(error)):
                        raise
                self._watch.check(0)
                self.load()

    def load(self) -> None:
        """Load the collection, which reads need."""
        # Milvus Lite answers when it has loaded it. Polling for that would never end where the process that loaded it
        # has ended: the next one has not loaded it.
        self._ask(self._client.load_collection, **({"_async": True} if self._lite else {}))

    def _ask(self, call: Callable[..., Any], **options: Any) -> Any:
        return self.connection.ask(call, collection_name=self.name, **options)

    @property
    def _client(self) -> Any:
        return self.connection.client

    @property
    def _lite(self) -> bool:
        return self.connection.lite_path is not None

    @property
    def _strong(self) -> dict[str, str]:
        # Milvus Lite has no consistency levels: it always reads the latest rows
        return {} if self._lite else {"consistency_level": "Strong"}

    @property
    def _strong_after_delete(self) -> dict[str, str]:
        # On a server, weaker reads still show a row for some time after it was deleted; a strong read does not.
        if self._lite or time.monotonic() - self._last_delete < _STRONG_AFTER_DELETE_SECONDS:
            return self._strong
        return {"consistency_level": "Session"}  # sees this process' own writes
