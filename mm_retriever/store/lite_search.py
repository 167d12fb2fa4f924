"""Keeps what Milvus Lite computes anew for every search: which rows are live, and the values of metadata keys.

For each search it goes through all rows in Python, copies their vectors, and parses the metadata of each row if there
is a filter. Here the results are kept as long as the data files are the same; data files never change, they are only
replaced. Answers are the same.

Source: ``milvus_lite/search/executor_indexed.py`` and ``filter/eval/hybrid_backend.py`` of milvus-lite 3.2
(Apache-2.0); the search is rewritten, the filter is kept.
"""

from __future__ import annotations

import functools
import inspect
import json
import logging
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mm_retriever.threads import ForkLock

logger = logging.getLogger(__name__)

_KNOWN = (
    *("query_vectors", "segments", "memtable", "delta_index", "top_k", "metric_type", "pk_field", "vector_field"),
    *("partition_names", "compiled_filter", "output_fields", "indexed_filter_plan", "project_record_fn"),
    "search_params",
)
_FEW = 0.2  # share of rows that a filter leaves, below which their vectors are copied rather than all compared
_installing = ForkLock()

Mask = NDArray[np.bool_]


def hasten() -> None:
    """Make Milvus Lite search faster in this process; any other version than 3.2 stays as it is.

    This replaces functions of milvus_lite 3.2, which has no public way to keep anything between searches.
    """
    with _installing:
        try:
            from milvus_lite.engine import collection
            from milvus_lite.search.filter.eval import hybrid_backend
            from milvus_lite.storage.segment import Segment

            search, augment = collection.execute_search_with_index, hybrid_backend._augment_table
            read_row, project = Segment.row_to_dict, collection.project_record
        except (ImportError, AttributeError) as error:
            logger.info("searches are as fast as Milvus Lite's own: %s", error)
            return
        if hasattr(search, "of_mm_retriever"):
            return
        if tuple(inspect.signature(search).parameters) != _KNOWN:
            logger.info("searches are as fast as Milvus Lite's own: it is not version 3.2")
            return
        replacements: tuple[tuple[Any, str, Any], ...] = (
            (collection, "execute_search_with_index", functools.wraps(search)(_searching(search))),
            (hybrid_backend, "_augment_table", functools.wraps(augment)(_augmenting(augment))),
            (Segment, "row_to_dict", functools.wraps(read_row)(_row_to_dict)),
            (collection, "project_record", functools.wraps(project)(_projecting(project))),
        )
        for owner, name, replacement in replacements:
            replacement.of_mm_retriever = True
            setattr(owner, name, replacement)


# ------------------------------------------------------------------------------------------ live rows


class _Live:
    """The rows of the data files that are the newest of their id, and not removed."""

    def __init__(self, segments: Sequence[Any], removed: dict[Any, int]) -> None:
        self.segments, self.removed = tuple(segments), removed
        newest: dict[Any, int] = {}
        for segment in self.segments:
            for id_, number in zip(segment.pks, segment.seqs.tolist(), strict=True):
                if number > newest.get(id_, -1):
                    newest[id_] = number
        self.masks: list[Mask] = []
        for segment in self.segments:
            rows = zip(segment.pks, segment.seqs.tolist(), strict=True)
            live = [number == newest[id_] and removed.get(id_, -1) <= number for id_, number in rows]
            self.masks.append(np.array(live, dtype=bool))

    def holds(self, segments: Sequence[Any], removed: dict[Any, int]) -> bool:
        """Whether nothing was written to the data files since."""
        same = len(segments) == len(self.segments) and all(map(_is, segments, self.segments))
        return same and removed == self.removed


def _is(first: Any, second: Any) -> bool:
    return first is second


_LIVE: weakref.WeakKeyDictionary[Any, _Live] = weakref.WeakKeyDictionary()
"""By the table of rows in memory, of which a collection has one at a time; an entry ends with its table."""


def _live(segments: Sequence[Any], memtable: Any, delta_index: Any) -> _Live:
    removed = delta_index._map  # a copy made for this search; it has no public way to list what was removed
    known = _LIVE.get(memtable)
    if known is None or not known.holds(segments, removed):
        known = _LIVE[memtable] = _Live(segments, removed)
    return known


def _shadowed(segments: Sequence[Any], masks: Sequence[Mask], newer: dict[Any, int]) -> list[Mask]:
    """The masks without the rows that newer rows or removals in memory replace; `newer` has their numbers by id."""
    left = list(masks)
    for place, segment in enumerate(segments):
        rows = [row for id_, number in newer.items() if (row := _row(segment, id_, number)) is not None]
        if rows:
            left[place] = left[place].copy()
            left[place][rows] = False
    return left


def _row(segment: Any, id_: Any, number: int) -> int | None:
    row: int | None = segment.pk_to_row.get(id_)
    return row if row is not None and int(segment.seqs[row]) < number else None


# ------------------------------------------------------------------------------------------ searching


def _searching(original: Callable[..., Any]) -> Callable[..., Any]:
    def searched(  # the parameters are Milvus Lite's
        query_vectors: Any,
        segments: Any,
        memtable: Any,
        delta_index: Any,
        top_k: int,
        metric_type: str,
        pk_field: str,
        vector_field: str,
        partition_names: Any = None,
        compiled_filter: Any = None,
        output_fields: Any = None,
        indexed_filter_plan: Any = None,
        project_record_fn: Any = None,
        search_params: Any = None,
    ) -> list[list[dict[str, Any]]]:
        segments = [segment for segment in segments if segment.num_rows]
        own = query_vectors.ndim == 2 and top_k > 0 and not partition_names and project_record_fn is not None
        if not own or any(len(segment.pk_to_row) != segment.num_rows for segment in segments):
            return original(  # type: ignore[no-any-return]
                query_vectors, segments, memtable, delta_index, top_k, metric_type, pk_field, vector_field,
                partition_names=partition_names, compiled_filter=compiled_filter, output_fields=output_fields,
                indexed_filter_plan=indexed_filter_plan, project_record_fn=project_record_fn,
                search_params=search_params,
            )  # fmt: skip
        in_memory = partial(memtable.to_search_snapshot, vector_field=vector_field, partition_names=None)
        ids, numbers, vectors, places, table = in_memory(include_table=False)
        if ids and compiled_filter is not None:
            ids, numbers, vectors, places, table = in_memory(include_table=True)
        removed = {id_: int(entry[0]) for id_, entry in memtable.delete_index_snapshot().items()}
        newer = dict(zip(ids, map(int, numbers), strict=True))
        newer |= {id_: max(number, newer.get(id_, -1)) for id_, number in removed.items()}
        known = _live(segments, memtable, delta_index)
        masks = _shadowed(segments, known.masks, newer) if newer else known.masks
        nearest: list[list[tuple[float, int, int]]] = [[] for _ in query_vectors]
        for place, (segment, live) in enumerate(zip(segments, masks, strict=True)):
            mask = live & _wanted(segment, vector_field, compiled_filter, indexed_filter_plan)
            index, rows = segment.indexes.get(vector_field), segment.vector_data(vector_field)[0]
            _nearest(nearest, place, rows, index, metric_type, query_vectors, top_k, mask, search_params)
        if ids:
            last = zip(ids, map(int, numbers), strict=True)
            mask = np.array([_is_last(segments, delta_index, removed, id_, number) for id_, number in last])
            if compiled_filter is not None and table is not None:
                mask &= _evaluated(compiled_filter, table)
            _nearest(nearest, len(segments), vectors, None, metric_type, query_vectors, top_k, mask, search_params)

        def record(place: int, row: int) -> dict[str, Any]:
            whole = (
                segments[place].row_to_dict(row) if place < len(segments) else memtable.materialize_row(*places[row])
            )
            return {"id": whole[pk_field], "entity": project_record_fn(whole)}

        return [
            [{**record(place, row), "distance": distance} for distance, place, row in sorted(candidates)[:top_k]]
            for candidates in nearest
        ]

    return searched


def _is_last(segments: Sequence[Any], delta_index: Any, removed: dict[Any, int], id_: Any, number: int) -> bool:
    """Whether a row in memory is the newest of its id, and not removed."""
    if delta_index.is_deleted(id_, number) or removed.get(id_, -1) > number:
        return False
    rows = ((segment, segment.pk_to_row.get(id_)) for segment in segments)
    return all(row is None or int(segment.seqs[row]) <= number for segment, row in rows)


def _wanted(segment: Any, vector_field: str, compiled_filter: Any, plan: Any) -> Mask:
    """The rows that match the filter and have a vector."""
    from milvus_lite.search.indexed_filter import evaluate_segment_filter

    mask: Mask = np.ones(segment.num_rows, dtype=bool)
    if compiled_filter is not None:
        mask &= evaluate_segment_filter(segment, compiled_filter, plan).astype(bool)
    has_vector = segment.vector_data(vector_field)[1]
    return mask if has_vector is None else mask & has_vector


def _evaluated(compiled_filter: Any, table: Any) -> Mask:
    from milvus_lite.search.filter import evaluate_mask

    return np.asarray(evaluate_mask(compiled_filter, table)).astype(bool)


def _nearest(
    nearest: list[list[tuple[float, int, int]]],
    place: int,
    vectors: NDArray[np.float32],
    index: Any,
    metric: str,
    queries: NDArray[np.float32],
    top_k: int,
    mask: Mask,
    params: Any,
) -> None:
    """Add the nearest rows of one source to `nearest`: (distance, source, row) for every query."""
    from milvus_lite.index.brute_force import BruteForceIndex

    count = int(np.count_nonzero(mask))
    if not count:
        return
    if metric == "IP" and (index is None or isinstance(index, BruteForceIndex)):
        _compared(nearest, place, vectors, queries, top_k, mask, count)
        return
    index = index or BruteForceIndex.build(vectors, metric)
    rows, distances = index.search(queries, top_k, valid_mask=None if count == len(mask) else mask, params=params)
    for candidates, of_query, far in zip(nearest, rows.tolist(), distances.tolist(), strict=True):
        candidates += [(distance, place, row) for distance, row in zip(far, of_query, strict=True) if row >= 0]


def _compared(
    nearest: list[list[tuple[float, int, int]]],
    place: int,
    vectors: NDArray[np.float32],
    queries: NDArray[np.float32],
    top_k: int,
    mask: Mask,
    count: int,
) -> None:
    """As `_nearest`, by inner products with every row."""
    rows = np.flatnonzero(mask) if count < len(mask) * _FEW else None
    distances = -(queries @ (vectors if rows is None else vectors[rows]).T)  # (queries, rows)
    if rows is None and count < len(mask):
        distances[:, ~mask] = np.inf
    for candidates, far in zip(nearest, distances, strict=True):
        most = min(top_k, count)
        closest = _smallest(far, most) if most < len(far) else np.arange(len(far))
        numbers = (closest if rows is None else rows[closest]).tolist()
        candidates += [
            (distance, place, row) for distance, row in zip(far[closest].tolist(), numbers, strict=True) if mask[row]
        ]


def _smallest(far: NDArray[np.float32], most: int) -> NDArray[np.intp]:
    """The rows with the smallest distances, of equal ones the first: a larger `top_k` begins with the same rows."""
    last = np.partition(far, most - 1)[most - 1]
    below = np.flatnonzero(far < last)
    return np.concatenate([below, np.flatnonzero(far == last)[: most - len(below)]])


# ------------------------------------------------------------------------------------------ rows


class _WholeRow(dict[str, Any]):
    """A row with each metadata key beside the fields."""


def _row_to_dict(segment: Any, row_idx: int) -> dict[str, Any]:
    """The row as Milvus Lite returns it, from columns looked up once and the data file's matrix of vectors."""
    kept = _kept(segment.table)
    whole = _WholeRow((name, column[row_idx].as_py()) for name, column in kept.fields)
    metadata = whole.get("$meta")
    if isinstance(metadata, str):
        try:
            metadata = json.loads(metadata)
        except ValueError:
            metadata = None
    if isinstance(metadata, dict):
        whole.update(metadata)
    for name in kept.vectors:
        vectors, is_there = segment.vector_data(name)
        whole[name] = vectors[row_idx].tolist() if is_there is None or is_there[row_idx] else None
    return whole


_INTERNAL = {"_seq", "_partition", "$meta"}


def _projecting(original: Callable[..., Any]) -> Callable[..., Any]:
    """A projection with the same results that does not parse the metadata of a row again."""

    def project_record(record: dict[str, Any], schema: Any, plan: Any) -> Any:
        names = plan.explicit_dynamic_fields
        if type(record) is not _WholeRow or plan.include_all_dynamic or not _INTERNAL.isdisjoint(names):
            return original(record, schema, plan)
        primary = next(field.name for field in schema.fields if field.is_primary)
        fields = [name for name in plan.response_schema_fields if name not in ("$meta", primary)]
        if plan.api_kind != "search":
            fields.append(primary)
        return {name: record[name] for name in (*names, *fields) if name in record}

    return project_record


class _Kept:
    """The kept results for one table of rows.

    Attributes:
        vectors: the names of its columns of vectors.
        fields: the other columns, with names.
        columns: the values of each metadata key.
    """

    def __init__(self, table: Any) -> None:
        types = zip(table.schema.names, table.schema.types, strict=True)
        self.vectors = [name for name, kind in types if str(kind).startswith("fixed_size_list")]
        names = [name for name in table.schema.names if name not in ("_seq", *self.vectors)]
        self.fields = [(name, _plain(table.column(name))) for name in names]
        self.columns: dict[str, Any] = {}


def _plain(column: Any) -> Any:
    """The only chunk of a column, whose values are read several times as fast; a column of many chunks as it is."""
    return column.chunk(0) if column.num_chunks == 1 else column


_KEPT: dict[int, tuple[weakref.ref[Any], _Kept]] = {}
"""By the address of the table; an entry ends with its table."""


def _kept(table: Any) -> _Kept:
    known = _KEPT.get(id(table))
    if known is not None and known[0]() is table:
        return known[1]
    address, kept = id(table), _Kept(table)
    _KEPT[address] = (weakref.ref(table, lambda _: _KEPT.pop(address, None)), kept)
    return kept


# ------------------------------------------------------------------------------------------ filters


_LEAST_ROWS = 256  # rows in memory are another table for every search


def _augmenting(original: Callable[..., Any]) -> Callable[..., Any]:
    def augmented(table: Any, keys: set[str]) -> Any:
        if table.num_rows < _LEAST_ROWS or "$meta" not in table.column_names:
            return original(table, keys)
        columns = _kept(table).columns
        if missing := keys - columns.keys():
            before = table.num_columns
            parsed = original(table, missing)  # raises where a key holds values of several types
            columns |= dict(zip(sorted(missing), parsed.columns[before:], strict=True))
        result = table
        for key in sorted(keys):
            result = result.append_column(f"__meta__{key}", columns[key])
        return result

    return augmented
