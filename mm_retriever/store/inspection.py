"""What a store holds, whether it is damaged (rows by checksums, files by records), and the recall of its index."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from mm_retriever.errors import MMRetrieverError, StoreDamagedError, StoreMismatchError, one_line, shown
from mm_retriever.notebook import show
from mm_retriever.store.collection import Collection
from mm_retriever.store.columns import Columns
from mm_retriever.store.connection import Connection, check_exists
from mm_retriever.store.lite_durability import damaged_files
from mm_retriever.store.rows import damaged_rows, has_checksum, row_is_damaged
from mm_retriever.store.schema import CONTENT_FIELD, ID_FIELD, VECTOR_FIELD, stored_model
from mm_retriever.store.switching import left_by_reindex

T = TypeVar("T")

QUERIES = 100
TOP = 10
_TIE = 1e-5  # scores this near are equal: sums in another order differ by as much
_PAGE_VECTORS = 2_000


@dataclass(frozen=True)
class Recall:
    """The recall of a collection's index, measured with its own vectors as queries.

    Attributes:
        rows: number of rows in the collection.
        queries: number of vectors that were searched with.
        recall: share of the nearest rows that were found, from 0 to 1.
        milliseconds: median time of one search.
        index: the type of the index.
    """

    rows: int
    queries: int
    recall: float
    milliseconds: float
    index: str

    def __str__(self) -> str:
        if not self.queries:
            return f"{self.index}: no rows to measure"
        return (
            f"{self.index} finds {self.recall:.1%} of the {TOP} nearest, by {self.queries} of {self.rows} own vectors; "
            f"{self.milliseconds:.1f} ms a search"
        )


def measure_recall(collection: Collection) -> Recall:
    """Return the recall of an open collection; reads all of its vectors once, in pages."""
    chooser = random.Random(0)  # noqa: S311 - the same rows every time
    chosen: list[str] = []
    rows = 0
    for page in collection.scan((), ""):
        for row in page:  # a reservoir: each row is as likely as any other
            rows += 1
            if len(chosen) < QUERIES:
                chosen.append(row[ID_FIELD])
            elif (place := chooser.randrange(rows)) < QUERIES:
                chosen[place] = row[ID_FIELD]
    stored = collection.columns(chosen, (VECTOR_FIELD,))
    queries = [[float(number) for number in row[VECTOR_FIELD]] for row in stored.values()]
    if not queries:
        return Recall(rows, 0, 0.0, 0.0, collection.index_type)
    least = _least_scores(np.array(queries, dtype=np.float32), _vectors(collection), collection.metric == "COSINE")
    hits_found, milliseconds = 0, []
    for query, bound in zip(queries, least, strict=True):
        start = time.perf_counter()
        hits = collection.search(query, "", min(TOP, rows), ())
        milliseconds.append(1_000 * (time.perf_counter() - start))
        hits_found += sum(float(hit["distance"]) >= bound - _TIE for hit in hits)
    share = hits_found / (len(queries) * min(TOP, rows))
    return Recall(rows, len(queries), share, statistics.median(milliseconds), collection.index_type)


def _vectors(collection: Collection) -> Iterator[NDArray[np.float32]]:
    for page in collection.scan((VECTOR_FIELD,), "", page_rows=_PAGE_VECTORS):
        yield np.array([row[VECTOR_FIELD] for row in page], dtype=np.float32)


def _least_scores(
    queries: NDArray[np.float32], pages: Iterator[NDArray[np.float32]], cosine: bool
) -> NDArray[np.float32]:
    """(Q,): for each query the score of its `TOP`th nearest row, by comparing it with every row."""
    best = np.full((len(queries), 0), -np.inf, dtype=np.float32)
    if cosine:
        queries = queries / np.linalg.norm(queries, axis=1, keepdims=True)
    for vectors in pages:
        if cosine:
            vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        scores = np.concatenate((best, queries @ vectors.T), axis=1)
        best = -np.sort(-scores, axis=1)[:, :TOP]
    least: NDArray[np.float32] = best[:, -1]
    return least


_PAGE_ROWS = 1_000
_SAMPLE = 6  # images of a store that a notebook shows


@dataclass(frozen=True)
class Verification:
    """The result of reading one collection.

    Attributes:
        rows: how many were read.
        without_checksum: those of them that an earlier version stored without a checksum.
        damaged: the ids of rows that are not what was stored.
        damaged_files: what is wrong with a file of a Milvus Lite store, by its path.
    """

    rows: int = 0
    without_checksum: int = 0
    damaged: tuple[str, ...] = ()
    damaged_files: dict[str, str] = field(default_factory=dict)

    def raise_damage(self) -> None:
        """Do nothing if nothing is damaged.

        Raises:
            StoreDamagedError: names files and ids.
        """
        if self.damaged_files:
            path, reason = next(iter(self.damaged_files.items()))
            more = f", and {len(self.damaged_files) - 1} more files" if len(self.damaged_files) > 1 else ""
            raise StoreDamagedError(f"{path} is damaged: {reason}{more}; restore the store from a backup")
        if self.damaged:
            raise damaged_rows(self.damaged)

    def __str__(self) -> str:
        checked = self.rows - self.without_checksum
        parts = [f"{self.rows} rows read, {checked} checked, {len(self.damaged)} damaged"]
        if self.without_checksum:
            parts.append(f"{self.without_checksum} stored before there were checksums")
        parts += [f"id {shown(id_)} is damaged" for id_ in self.damaged]
        parts += [f"{path}: {reason}" for path, reason in self.damaged_files.items()]
        return "; ".join(parts)


def verify_collection(collection: Collection) -> Verification:
    """Read every row of an open collection, and every file of a Milvus Lite store."""
    rows, unknown, damaged = 0, 0, []
    for page in collection.scan(["*"], "", page_rows=_PAGE_ROWS):
        rows += len(page)
        unknown += sum(not has_checksum(row) for row in page)
        damaged += [str(row[ID_FIELD]) for row in page if row_is_damaged(row)]
    place = collection.connection.lite_path
    return Verification(rows, unknown, tuple(damaged), {} if place is None else damaged_files(Path(place)))


def verify_store(uri: str | Path, *, token: str | None = None, timeout: float = 30.0) -> dict[str, Verification | str]:
    """Return the verification of each collection of a store, or why it cannot be verified.

    Raises:
        StoreDamagedError: a Milvus Lite file that cannot be opened for its damage.
        StoreError: there is no such file, it is locked, or the server does not answer.
    """
    with _collections(uri, token, timeout) as (connection, names):
        return {name: _of_ours(connection, name, verify_collection) for name in names}


def _of_ours(connection: Connection, name: str, look: Callable[[Collection], T]) -> T | str:
    """What `look` returns for a collection, or that another program made it."""
    collection = Collection(connection, name)
    try:
        collection.open(None)
    except StoreMismatchError:
        return "made by another program"
    return look(collection)


def recall_store(uri: str | Path, *, token: str | None = None, timeout: float = 30.0) -> dict[str, Recall | str]:
    """Return the recall of the index of each collection of a store, or why it cannot be measured.

    Raises:
        StoreError: there is no such file, it is locked, or the server does not answer.
    """
    with _collections(uri, token, timeout) as (connection, names):
        return {name: _of_ours(connection, name, measure_recall) for name in names}


def store_columns(uri: str | Path, *, token: str | None = None, timeout: float = 30.0) -> dict[str, list[str] | str]:
    """Return the columns that filters may name in each collection, by a sample of its rows, or why they are not known.

    A server is not asked to load a collection for this.

    Raises:
        StoreError: there is no such file, it is locked, or the server does not answer.
    """
    with _collections(uri, token, timeout) as (connection, names):
        return {name: _columns(connection, name) for name in names}


def _columns(connection: Connection, name: str) -> list[str] | str:
    with connection.request("asking what is loaded"):
        if not connection.is_loaded(name):
            return "not looked at: the server has not loaded the collection"
    try:
        collection = _of_ours(connection, name, lambda opened: opened)
    except StoreDamagedError as error:
        return f"cannot be read: {one_line(error)}"
    if isinstance(collection, str):
        return collection
    declared = collection.declared
    return Columns(lambda expression, limit: collection.some([CONTENT_FIELD], expression, limit), declared).names


def describe_store(uri: str | Path, *, token: str | None = None, timeout: float = 30.0) -> dict[str, dict[str, Any]]:
    """Return the number of ``rows``, ``dimension``, ``model`` and ``model_note`` of each collection.

    ``left_by_reindex`` is the collection whose `reindex` made this one and has not come to its end. Nothing is loaded
    or changed.

    Raises:
        StoreError: there is no such Milvus Lite file, it is locked, or the server does not answer.
    """
    with _collections(uri, token, timeout) as (connection, names), connection.request("describing the collections"):
        return {name: _described(connection, name) for name in names}


def _described(connection: Connection, name: str) -> dict[str, Any]:
    description = connection.ask(connection.client.describe_collection, name)
    dimensions = [column["params"]["dim"] for column in description["fields"] if "dim" in column.get("params", {})]
    model, note = stored_model(description)
    return {
        "rows": connection.count(name),
        "dimension": dimensions[0] if dimensions else None,
        "model": model or "not said",
        **({"model_note": note} if note else {}),
        **({"left_by_reindex": whole} if (whole := left_by_reindex(name)) else {}),
    }


@contextmanager
def _collections(uri: str | Path, token: str | None, timeout: float) -> Iterator[tuple[Connection, list[str]]]:
    check_exists(uri)
    with Connection(uri, token=token, timeout=timeout) as connection:
        with connection.request("listing the collections"):
            names = sorted(connection.ask(connection.client.list_collections))
        yield connection, names


def store_html(store: Any) -> str:
    """Return what a notebook displays of an `ImageStore`: what it holds, and a few of its images."""
    facts: dict[str, object] = {"collection": store.collection_name, "dimension": store.dim, "model": store.model_id}
    try:
        rows = store.count()
        facts = {"rows": rows, **facts, "words indexed": "yes" if store.hybrid else "no"}
        some: list[Any] = next(store.scan(), []) if rows else []
        nodes = store.get_nodes([str(row["id"]) for row in some[:_SAMPLE]]) if some else []
    except MMRetrieverError as error:  # closed, or a server that is away
        facts, nodes = {**facts, "cannot be read": error}, []
    escaped = tuple((name, one_line(fact, 300)) for name, fact in facts.items())
    return replace(show(nodes), title=f"store {store.uri}", facts=escaped, lines=())._repr_html_()
