"""One Milvus collection of ours: its schema and index, whose vectors it holds, its rows written, read and searched.

Owns what is asked of a collection and how it stays consistent; every request goes through a `Connection`. Knows rows,
vectors and expressions, nothing of nodes and queries.
"""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from pymilvus import AnnSearchRequest, CollectionSchema, DataType, MilvusClient, RRFRanker
from pymilvus.client.types import ConsistencyLevel
from pymilvus.exceptions import MilvusException

from mm_retriever.errors import StoreError, StoreMismatchError
from mm_retriever.store.checksums import damaged_rows, row_is_damaged, vector_is_damaged
from mm_retriever.store.connection import Connection
from mm_retriever.store.filters import (
    CHECKSUM_FIELD,
    CONTENT_FIELD,
    DOC_ID_FIELD,
    ID_FIELD,
    MAX_TEXT_BYTES,
    TEXT_FIELD,
    TYPE_FIELD,
    VECTOR_FIELD,
    all_of,
    one_of,
    quoted,
)
from mm_retriever.store.identity import StoredIdentity, same_model
from mm_retriever.store.lite_durability import sync_logs, sync_new_collection
from mm_retriever.store.words import SparseEmbedding, SparseVector, WordIndex, new_word_index, word_index_of

logger = logging.getLogger(__name__)

INDEXES = ("FLAT", "HNSW", "AUTOINDEX")
METRICS = ("IP", "COSINE")

WRITE_ROWS = 256
"""Rows sent with one request."""

_PAGE_ROWS = 10_000
_IDS_PER_REQUEST = 1_000
_SAMPLED_ROWS = 64
"""Looked at when a collection is opened; the data files of Milvus Lite are checked whole by then."""

_STRONG_AFTER_DELETE_SECONDS = 5.0
_NOT_LOADED = 101
_INDEX_EXISTS = 35
_MODEL_PROPERTY = "mm_retriever.model"
_NOTE_PROPERTY = "mm_retriever.model_note"
_SPARSE_PROPERTY = "mm_retriever.sparse_model"
_ANALYZER_PROPERTY = "mm_retriever.analyzer"
_RRF_K = 60
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,254}")

T = TypeVar("T")
Row: TypeAlias = dict[str, Any]
Hit: TypeAlias = Mapping[str, Any]
"""A row that was found: its id, its "distance" and the columns asked for, in "entity"."""


class Collection:
    """One collection, on a connection of its own. Nothing is asked of Milvus before `open`.

    Args:
        connection: dedicated to this collection.
        name: of the collection.
        dimension: numbers in one vector.
        model_id: whose vectors they are.
        model_note: name and float format of that model, for people; kept with a new collection.
        index: "auto" or one of `INDEXES`, in any case.
        metric: one of `METRICS`, in any case.

    Attributes:
        index_type: what the vectors are indexed by, once open.
        words: the index of words; None if there is none.
    """

    def __init__(
        self,
        connection: Connection,
        name: str,
        *,
        dimension: int,
        model_id: str,
        index: str,
        metric: str,
        model_note: str = "",
    ) -> None:
        self.connection, self.name, self.dimension, self.model_id = connection, name, dimension, model_id
        self.model_note = model_note
        self.metric = metric.upper()
        self.index_type = "auto" if index.lower() == "auto" else index.upper()
        self.words: WordIndex | None = None
        self._scans_are_strong = True
        self._last_delete = -_STRONG_AFTER_DELETE_SECONDS

    # ------------------------------------------------------------------------------------------ schema and index

    def open(
        self, hybrid: bool | SparseEmbedding, *, overwrite: bool, create: bool = True, analyzer: str | None = None
    ) -> None:
        """Make the collection, or check that it is ours; then load it: only a loaded one can be searched.

        Raises:
            StoreError: there is none, and `create` is False.
        """
        with self.connection.request("opening the collection"), self.connection.turn():
            exists = self._ask(self._client.has_collection)
            if not exists and not create:
                raise missing_collection(self.connection, self.name)
            if exists and not overwrite:
                self._check(hybrid, analyzer)
            else:
                self.words = new_word_index(hybrid, analyzer)
                self._check_server()
                if exists:
                    self._ask(self._client.drop_collection)
                if not self._create():
                    self._check(hybrid, analyzer)
            if not self._ask(self._client.list_indexes, field_name=VECTOR_FIELD):
                self._create_index(self.index_type)
            self._create_words_index()
            self._check_index()
            self.load()
        if not exists or overwrite:
            self._sync(sync_new_collection)
        elif damaged := [row[ID_FIELD] for row in self.some(["*"], "", _SAMPLED_ROWS) if row_is_damaged(row)]:
            logger.warning("%s: %s", self.connection.where, damaged_rows(damaged))

    def clear(self) -> None:
        """Remove every row; the collection stays open."""
        with self.connection.request("clearing the collection"), self.connection.turn():
            self._ask(self._client.drop_collection)
            self._create()
            if not self._ask(self._client.list_indexes, field_name=VECTOR_FIELD):
                self._create_index(self.index_type)
            self._create_words_index()
            self.load()
        self._sync(sync_new_collection)

    def _create(self) -> bool:
        """Make the collection; False if it is there.

        So it is where the process that served a Milvus Lite file made it and was killed before it could say so.
        """
        # A server keeps the description; Milvus Lite keeps properties, and neither is sure to keep the other.
        identity = {_MODEL_PROPERTY: self.model_id}
        if self.model_note:
            identity[_NOTE_PROPERTY] = self.model_note
        if self.words is not None and self.words.model is not None:
            identity[_SPARSE_PROPERTY] = self.words.model.model_id
        elif self.words is not None:
            identity[_ANALYZER_PROPERTY] = self.words.analyzer
        description = "" if self._lite else json.dumps(identity)
        schema = collection_schema(self.dimension, self.words, description)
        properties = {"properties": identity} if self._lite else {}
        self._scans_are_strong = True
        try:
            self._ask(self._client.create_collection, schema=schema, consistency_level="Strong", **properties)
        except MilvusException:
            if not self._lite or not self._ask(self._client.has_collection):
                raise
            return False
        return True

    def _create_index(self, index: str) -> None:
        if index == "auto":
            on_server = "HNSW" if self._client.is_self_hosted else "AUTOINDEX"
            index = "FLAT" if self._lite else on_server
        build = {"params": {"M": 16, "efConstruction": 200}} if index == "HNSW" else {}
        self._index(VECTOR_FIELD, index, self.metric, **build)

    def _create_words_index(self) -> None:
        """Index the words, if the collection has any; again is nothing new."""
        words = self.words
        if words is not None and not self._ask(self._client.list_indexes, field_name=words.vector_field):
            self._index(words.vector_field, "SPARSE_INVERTED_INDEX", words.metric)

    def _index(self, field: str, index_type: str, metric: str, **build: Any) -> None:
        params = self._client.prepare_index_params()
        params.add_index(field, index_name=field, index_type=index_type, metric_type=metric, **build)
        # sync: waiting takes half a second, and Milvus Lite prints that it cannot; loading waits all the same
        try:
            self._ask(self._client.create_index, index_params=params, sync=False)
        except MilvusException as error:
            if error.code != _INDEX_EXISTS:  # asked again after a takeover; `_check_index` looks at what is there
                raise

    def _check_server(self) -> None:
        """Refuse an index of words where the server is too old, before a collection is dropped or half of one made."""
        if self.words is None or self._lite:
            return
        said = str(self.connection.ask(self._client.get_server_version))
        version = re.match(r"v?(\d+)\.(\d+)", said)
        first, hybrid = ((2, 4), "a sparse model") if self.words.model else ((2, 5), "True")
        if version and (int(version[1]), int(version[2])) < first:
            needed = ".".join(map(str, first))
            raise StoreError(
                f"{self.connection.where} is Milvus {said.lstrip('v')}; hybrid={hybrid} needs {needed} or later"
            )

    def _check(self, hybrid: bool | SparseEmbedding, analyzer: str | None) -> None:
        description = self._ask(self._client.describe_collection)
        fields = {field["name"]: field for field in description["fields"]}
        missing = {ID_FIELD, DOC_ID_FIELD, TEXT_FIELD, VECTOR_FIELD} - fields.keys()
        if missing or not description.get("enable_dynamic_field"):
            lack = f"the fields {', '.join(sorted(missing))}" if missing else "dynamic fields"
            raise self._mismatch(f"was made by another program: it lacks {lack}")
        dimension = int(fields[VECTOR_FIELD]["params"]["dim"])
        if dimension != self.dimension:
            raise self._mismatch(f"holds vectors of {dimension} numbers, the model gives {self.dimension}")
        words = word_index_of(
            description,
            hybrid,
            _stored(description, _SPARSE_PROPERTY),
            analyzer=analyzer,
            stored_analyzer=_stored(description, _ANALYZER_PROPERTY),
        )
        if isinstance(words, str):
            raise self._mismatch(words)
        self.words = words
        self._scans_are_strong = self._lite or description.get("consistency_level") == ConsistencyLevel.Strong
        stored = stored_model(description)
        if stored is None:
            logger.warning(
                "collection %r at %s does not say which model its vectors come from; it is taken to be %r",
                self.name,
                self.connection.where,
                self.model_id,
            )
        elif not same_model(stored, self.model_id):
            note = f" ({kept})" if (kept := _stored(description, _NOTE_PROPERTY)) else ""
            given = f" ({self.model_note})" if self.model_note else ""
            raise self._mismatch(
                f"holds vectors of the model {stored!r}{note}, the model given is {self.model_id!r}{given}"
            )

    def _check_index(self) -> None:
        name = self._ask(self._client.list_indexes, field_name=VECTOR_FIELD)[0]
        found = self._ask(self._client.describe_index, index_name=name)
        metric, index_type = found.get("metric_type"), str(found.get("index_type"))
        if metric != self.metric:
            raise self._mismatch(f"measures with {metric}, {self.metric} is asked for")
        if self.index_type not in ("auto", index_type):
            raise self._mismatch(f"has a {index_type} index, {self.index_type} is asked for")
        self.index_type = index_type

    def _mismatch(self, difference: str) -> StoreMismatchError:
        return StoreMismatchError(
            f"collection {self.name!r} at {self.connection.where} {difference}. "
            "Give another collection name, or overwrite=True to drop its rows and start anew"
        )

    # ------------------------------------------------------------------------------------------ writing

    def write(self, rows: Sequence[Row]) -> None:
        """Store up to `WRITE_ROWS` rows of different ids; a row whose id is there already is replaced whole.

        On Milvus Lite they survive a power cut from then on.
        """
        # On Milvus Lite an upsert leaves columns of the old row that the new one lacks; its insert replaces rows whole.
        # On a server an insert leaves the old row there, and an upsert replaces it whole.
        call = self._client.insert if self._lite else self._client.upsert
        with self.connection.request(f"storing {len(rows)} rows"):
            self._ask(call, data=list(rows))
        self._sync(sync_logs)

    def delete_where(self, expression: str) -> None:
        """Remove every row that matches."""
        for page in self.scan((), expression):  # ids first: older servers delete by primary key alone
            self.delete_ids([row[ID_FIELD] for row in page])

    def delete_ids(self, ids: Sequence[str]) -> None:
        """Remove the rows with these ids."""
        for some in chunks(ids, _IDS_PER_REQUEST):
            with self.connection.request(f"removing {len(some)} rows"):
                self._ask(self._client.delete, filter=one_of(ID_FIELD, some))
        self._last_delete = time.monotonic()
        self._sync(sync_logs)

    def _sync(self, step: Callable[[Path, str], None]) -> None:
        """Have what was written to a Milvus Lite file on the disk; a server sees to that itself."""
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

    def columns(self, ids: Sequence[str], names: Sequence[str], expression: str = "") -> dict[str, Row]:
        """Return the named columns of the rows with these ids that match, by id."""
        rows: dict[str, Row] = {}
        with_vectors = VECTOR_FIELD in names or "*" in names  # whoever stores one again would give it a new checksum
        asked = [*names, CHECKSUM_FIELD] if with_vectors else names
        for some in chunks(ids, _IDS_PER_REQUEST):
            page = self._fetch(all_of(one_of(ID_FIELD, some), expression), asked)
            if with_vectors and (damaged := [str(row[ID_FIELD]) for row in page if vector_is_damaged(row)]):
                raise damaged_rows(damaged)
            rows.update((row[ID_FIELD], row) for row in without_checksums(page, names))
        return rows

    def scan(self, names: Sequence[str], expression: str, page_rows: int | None = None) -> Iterator[list[Row]]:
        """Yield the rows that match (id and the named columns) in pages, by id; rows may be removed meanwhile."""
        if not self._scans_are_strong:
            self.count("")  # has the server catch up with what was written
        # The flags of pymilvus' own iterator, which pastes the last id into its expression unquoted. It drops any level
        # of consistency but the collection's own.
        in_order = {"limit": page_rows or _PAGE_ROWS, "iterator": "True", "reduce_stop_for_best": "True"}
        after = ""
        while page := self._fetch(all_of(expression, after), names, **in_order):
            yield page
            after = f"({ID_FIELD} > {quoted(page[-1][ID_FIELD])})"

    def some(self, names: Sequence[str], expression: str, limit: int) -> list[Row]:
        """Return any rows that match, at most so many."""
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
            found = self._read(
                self._client.search,
                data=[vector],
                filter=expression,
                limit=limit,
                output_fields=list(names),
                search_params=self._vector_params(limit),
                anns_field=VECTOR_FIELD,
                **self._strong_after_delete,
            )
        return list(found[0]) if found else []

    def word_search(
        self, words: WordIndex, asked: str | SparseVector, expression: str, limit: int, names: Sequence[str]
    ) -> list[Hit]:
        """Return the rows that fit the words best among those that match; their distances are above 0."""
        with self.connection.request("searching words"):
            found = self._read(
                self._client.search,
                data=[asked],
                filter=expression,
                limit=limit,
                output_fields=list(names),
                search_params={"metric_type": words.metric},
                anns_field=words.vector_field,
                **self._strong_after_delete,
            )
        # Milvus Lite gives BM25 scores below 0, a server above
        return [{**hit, ID_FIELD: hit[ID_FIELD], "distance": abs(hit["distance"])} for hit in found[0]]

    def fused_search(
        self,
        vector: tuple[list[float], int],
        words: tuple[WordIndex, str | SparseVector, int] | None,
        expression: str,
        limit: int,
        names: Sequence[str],
    ) -> list[Hit]:
        """Reciprocal rank fusion of a search by vector and one by words, each with its depth in rows."""
        asked, depth = vector
        halves = [AnnSearchRequest([asked], VECTOR_FIELD, self._vector_params(depth), depth, expr=expression)]
        if words is not None:
            index, text, many = words
            params = {"metric_type": index.metric}
            halves.append(AnnSearchRequest([text], index.vector_field, params, many, expr=expression))
        with self.connection.request("searching vectors and words"):
            found = self._read(
                self._client.hybrid_search,
                reqs=halves,
                ranker=RRFRanker(_RRF_K),
                limit=limit,
                output_fields=list(names),
                **self._strong_after_delete,
            )
        return list(found[0]) if found else []

    def _vector_params(self, limit: int) -> dict[str, Any]:
        breadth = {"params": {"ef": min(32_768, max(256, 4 * limit))}} if self.index_type == "HNSW" else {}
        return {"metric_type": self.metric, **breadth}

    # ------------------------------------------------------------------------------------------ requests

    def _read(self, call: Callable[..., Any], **options: Any) -> Any:
        """The answer to a read; a collection that a restarted server has not loaded (yet) is loaded first."""
        with self.connection.deadline() as until:
            while True:
                try:
                    return self._ask(call, **options)
                except MilvusException as error:
                    if error.code != _NOT_LOADED or until.left <= 0:
                        raise
                self.load()

    def load(self) -> None:
        """Have the collection ready for reads."""
        # Milvus Lite has loaded it when it answers. Waiting for that would be for ever where the process that loaded it
        # has ended meanwhile: the next one has not.
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
        # Milvus Lite always reads what was written last, and knows nothing of levels
        return {} if self._lite else {"consistency_level": "Strong"}

    @property
    def _strong_after_delete(self) -> dict[str, str]:
        # A server hides a row from weaker reads only some time after it was deleted; a strong read waits for that.
        if self._lite or time.monotonic() - self._last_delete < _STRONG_AFTER_DELETE_SECONDS:
            return self._strong
        return {"consistency_level": "Session"}  # what this process wrote is there


def collection_schema(dimension: int, words: WordIndex | None, description: str = "") -> CollectionSchema:
    """Return the columns of a collection; metadata are dynamic ones."""
    schema = MilvusClient.create_schema(auto_id=False, enable_dynamic_field=True, description=description)
    schema.add_field(ID_FIELD, DataType.VARCHAR, is_primary=True, max_length=MAX_TEXT_BYTES)
    schema.add_field(DOC_ID_FIELD, DataType.VARCHAR, max_length=MAX_TEXT_BYTES)
    schema.add_field(TEXT_FIELD, DataType.VARCHAR, max_length=MAX_TEXT_BYTES)
    # The node has fields of its own: among the metadata it would be parsed for every row that a filter looks at.
    schema.add_field(CONTENT_FIELD, DataType.VARCHAR, max_length=MAX_TEXT_BYTES)
    schema.add_field(TYPE_FIELD, DataType.VARCHAR, max_length=MAX_TEXT_BYTES)
    schema.add_field(VECTOR_FIELD, DataType.FLOAT_VECTOR, dim=dimension)
    if words is not None:
        words.add_to(schema)
    return schema


def without_checksums(rows: Sequence[Row], names: Sequence[str]) -> Sequence[Row]:
    """Return the rows with the named columns alone: "*" is no wish to see checksums."""
    for row in rows if CHECKSUM_FIELD not in names else ():
        row.pop(CHECKSUM_FIELD, None)
    return rows


def check_options(collection: str, dimension: int, index: str, metric: str) -> None:
    """Refuse what Milvus would misread; Milvus Lite would take any index and metric, and search by something else."""
    if not _NAME.fullmatch(collection):
        raise StoreError(f"collection {collection!r}: use up to 255 ASCII letters, digits and '_', no digit first")
    if dimension < 1:
        raise StoreError(f"dimension {dimension!r}: a vector has at least one number")
    if index.lower() != "auto" and index.upper() not in INDEXES:
        raise StoreError(f"index {index!r} is not one of auto, {', '.join(INDEXES)}")
    if metric.upper() not in METRICS:
        hint = "; L2 ranks unit vectors in the same order" if metric.upper() == "L2" else ""
        raise StoreError(f"metric {metric!r} is not one of {', '.join(METRICS)}{hint}")


def stored_model(description: Mapping[str, Any]) -> str | None:
    """Return the name of the model whose vectors a collection holds; None where it does not say."""
    return _stored(description, _MODEL_PROPERTY)


def stored_note(description: Mapping[str, Any]) -> str:
    """Return name and float format of the model whose vectors a collection holds, for people; "" if it does not say."""
    return _stored(description, _NOTE_PROPERTY) or ""


def stored_identity(connection: Connection, name: str) -> StoredIdentity:
    """Return what a collection says of its vectors.

    Raises:
        StoreError: there is no such collection, or it is another program's.
    """
    client, options = connection.client, {"timeout": connection.timeout}
    with connection.request("reading what the collection holds"):
        if not client.has_collection(name, **options):
            raise missing_collection(connection, name)
        description = client.describe_collection(name, **options)
        fields = {field["name"]: field for field in description["fields"]}
        if VECTOR_FIELD not in fields:
            raise StoreError(f"collection {name!r} at {connection.where} was made by another program")
        indexes = client.list_indexes(name, field_name=VECTOR_FIELD, **options)
        metric = client.describe_index(name, indexes[0], **options).get("metric_type") if indexes else "IP"
    return StoredIdentity(
        dimension=int(fields[VECTOR_FIELD]["params"]["dim"]),
        model_id=stored_model(description) or "not said",
        metric=str(metric),
        model_note=stored_note(description),
        sparse_model=_stored(description, _SPARSE_PROPERTY),
    )


def missing_collection(connection: Connection, name: str) -> StoreError:
    """Return the error for a collection that is not there; it lists those that are."""
    client, timeout = connection.client, connection.timeout
    names = sorted(client.list_collections(timeout=timeout))
    held = [f"{one!r} ({client.get_collection_stats(one, timeout=timeout)['row_count']} rows)" for one in names[:20]]
    more = f" and {len(names) - 20} more" if len(names) > 20 else ""
    there = f"there are: {', '.join(held)}{more}" if held else "it holds none yet"
    return StoreError(f"there is no collection {name!r} at {connection.where}; {there}")


def _stored(description: Mapping[str, Any], name: str) -> str | None:
    properties = description.get("properties") or {}
    if name in properties:
        return str(properties[name])
    try:
        return str(json.loads(description.get("description") or "")[name])
    except (ValueError, KeyError, TypeError):
        return None


def chunks(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """Yield the items in order, so many at a time."""
    for start in range(0, len(items), size):
        yield items[start : start + size]
