"""Removes rows from the store: those of files that are gone, and those that a caller names.

Owns how many rows may go at once without `force`, and when a file counts as gone: if the file system has no such file,
or something else in its place. A file that cannot be accessed (no permission, a stale mount, a bad disk, too few
descriptors) does not count, and neither does one below an empty folder on another device than the file was on, which a
missing mount leaves. In case of doubt a file is not gone.
"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from llama_index.core.vector_stores.types import FilterCondition, FilterOperator, MetadataFilter, MetadataFilters

from mm_retriever.errors import IngestError
from mm_retriever.images.source import spellings
from mm_retriever.ingest.folder import given_path
from mm_retriever.ingest.report import IngestReport
from mm_retriever.ingest.sources import path_id, scheme_of, url_id
from mm_retriever.own_keys import FILE_STAMP, own_columns, own_value
from mm_retriever.store import ImageStore
from mm_retriever.store.filters import id_list

LARGEST_SHARE = 5
"""Removing more than one row in so many at once needs `force`, because a missing drive looks the same."""

FREE_ROWS = 4
"""So few rows may always go: in a small album they are more than a fifth."""

_KEPT_LISTED = 100


@dataclass(frozen=True)
class PruneReport:
    """What one call of `prune_images` did."""

    rows: int  # images that were stored of the folder
    removed: int
    kept: int  # because their files cannot be looked at or read now, so that nobody knows what they are
    kept_paths: tuple[str, ...] = ()  # the first hundred

    def __str__(self) -> str:
        kept = f", {self.kept} kept because their files cannot be looked at or read now" if self.kept else ""
        return f"{self.removed} of {self.rows} rows removed{kept}"


def prune_images(
    folder: str | os.PathLike[str],
    store: ImageStore,
    *,
    force: bool = False,
    spoiled: Collection[str] = (),
    unread: Collection[str] = (),
) -> PruneReport:
    """Remove the rows of images below a folder whose files are gone; the folder itself may be gone too.

    Only rows that ingestion made from files may go, and only if the file is provably gone. A file that cannot be
    accessed, or whose drive seems not to be mounted, keeps its row.

    Args:
        folder: its links are followed.
        store: from `open_store` or `open_stored`.
        force: also if more than a fifth of the folder's rows go at once, or a drive seems to be missing.
        spoiled: ids of rows whose files exist and are images no longer.
        unread: ids of rows whose files exist and could not be read; they count as kept.

    Raises:
        IngestError: more than a fifth of the rows would go without `force`; nothing was removed.
    """
    if not os.fspath(folder).strip():  # the working directory, to Python
        raise IngestError(f"the folder is {folder!r}: name it; the one that you are in is '.'")
    places = [os.path.realpath(spelled) for spelled in spellings(given_path(folder))]
    place = places[0]
    if len(places) > 1 and not store.count(_below(place)):
        place = next((other for other in places[1:] if store.count(_below(other))), place)
    gone: list[str] = []
    kept: list[str] = []
    rows = 0
    for row in _rows(store, _below(place), *own_columns("file_path", FILE_STAMP)):
        path = str(own_value(row, "file_path"))
        if row["id"] != path_id(path):
            continue
        rows += 1
        state = "gone" if row["id"] in spoiled else fate(path, row)
        if state == "there" and row["id"] in unread:
            state = "unknown"
        if state == "gone" or (force and state == "unknown" and not os.path.lexists(path) and _is_missing(path)):
            gone.append(row["id"])
        elif state == "unknown":
            kept.append(path)
    if len(gone) > FREE_ROWS and LARGEST_SHARE * len(gone) > rows and not force:
        raise IngestError(
            f"{len(gone)} of the {rows} images stored of {place!r} are gone, more than a fifth: nothing was removed. "
            "If that is right and no drive or network folder is missing, ask for it again with --force "
            "(force=True in Python)"
        )
    store.delete_nodes(gone)
    return PruneReport(rows, len(gone), len(kept), tuple(kept[:_KEPT_LISTED]))


def prune_missing(folder: str, store: ImageStore, *, force: bool) -> IngestReport:
    """Remove the rows of a folder that is gone.

    Raises:
        IngestError: nothing is stored of it, or more than a fifth would go without `force`.
    """
    start = time.perf_counter()
    pruned = prune_images(folder, store, force=force)
    if not pruned.rows:
        raise IngestError(f"there is no folder {folder!r}, and nothing is stored of it")
    seconds = time.perf_counter() - start
    return IngestReport(0, 0, 0, 0, pruned.removed, skipped=(), seconds=seconds, kept=pruned.kept)


def remove_images(
    store: ImageStore,
    paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]] = (),
    *,
    ids: Iterable[str] = (),
    filters: MetadataFilters | None = None,
) -> int:
    """Remove rows by files, folders and URLs, by ids, and by metadata, and return their number.

    The files are left alone; the next ingestion of their folder stores them again.

    Args:
        store: from `open_store` or `open_stored`.
        paths: files, folders (with everything below them) or URLs, whether they exist or not; or one of them.
        ids: of rows.
        filters: matched by all rows to remove; without a condition they name none.

    Raises:
        IngestError: nothing is named, or something that the store does not hold; nothing was removed.
    """
    paths = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
    ids = id_list(ids)
    filters = filters if filters is not None and filters.filters else None
    if not paths and not ids and filters is None:
        raise IngestError("nothing is named to be removed: give paths, ids or filters; clear() removes everything")
    wanted: set[str] = set()
    for path in [os.fspath(place) for place in paths]:
        if not path.strip():
            raise IngestError(f"the path {path!r} names nothing, so nothing was removed")
        below = {row["id"] for row in _rows_of(path, store)}
        if not below:
            raise IngestError(f"the store holds nothing of {path!r}, so nothing was removed")
        wanted |= below
    known = store.columns(ids, ())
    if missing := [id_ for id_ in ids if id_ not in known]:
        raise IngestError(f"the store has no row of the id {missing[0]!r}, so nothing was removed")
    wanted.update(ids)
    if filters is not None:
        wanted.update(row["id"] for row in _rows(store, filters))
    store.delete_nodes(sorted(wanted))
    return len(wanted)


def _rows_of(path: str, store: ImageStore) -> Iterator[Mapping[str, Any]]:
    if scheme_of(path):  # of the web, or of a bucket
        yield from store.columns([url_id(path)], ()).values()
        return
    path = os.path.abspath(given_path(path))  # noqa: PTH100
    for spelled in spellings(path):  # a Mac writes names in decomposed letters, people type composed ones
        folder, name = os.path.split(spelled)
        rows: list[Mapping[str, Any]] = []
        # a link is stored under its own name
        for place in {os.path.join(os.path.realpath(folder), name), os.path.realpath(spelled)}:  # noqa: PTH118
            rows += _rows(
                store, _below(place, *(MetadataFilter(key=key, value=place) for key in own_columns("file_path")))
            )
        if rows:
            yield from rows
            return


def _rows(store: ImageStore, filters: MetadataFilters, *columns: str) -> Iterator[Mapping[str, Any]]:
    for page in store.scan(columns, filters):
        yield from page


def _below(folder: str, *others: MetadataFilter) -> MetadataFilters:
    """The filter for paths below the folder, or for rows that meet another condition."""
    start = folder.rstrip("/") + "/"
    end = start[:-1] + chr(ord("/") + 1)
    ranges = [
        MetadataFilters(
            filters=[
                MetadataFilter(key=key, operator=FilterOperator.GTE, value=start),
                MetadataFilter(key=key, operator=FilterOperator.LT, value=end),
            ]
        )
        for key in own_columns("file_path")
    ]
    return MetadataFilters(filters=[*ranges, *others], condition=FilterCondition.OR)


# ------------------------------------------------------------------------------------------ is a file gone?


def fate(path: str, stored: Mapping[str, Any]) -> Literal["there", "gone", "unknown"]:
    """Return the state of a file, given the row that was made from it."""
    try:
        return "there" if stat.S_ISREG(os.stat(path).st_mode) else "gone"  # noqa: PTH116 - ten times Path's speed
    except (FileNotFoundError, NotADirectoryError):
        return "unknown" if _may_be_unmounted(path, str(own_value(stored, FILE_STAMP) or "")) else "gone"
    except (OSError, ValueError):
        return "unknown"


def _is_missing(path: str) -> bool:
    """Whether the file system reports that there is no such file; other failures do not count."""
    try:
        os.stat(path)  # noqa: PTH116
    except (FileNotFoundError, NotADirectoryError):
        return True
    except (OSError, ValueError):
        return False
    return False


def _may_be_unmounted(path: str, stamp: str) -> bool:
    """Whether the path has a broken link, or its nearest existing folder is empty and on another device."""
    device = stamp.rpartition("-")[2]
    try:
        for place in (Path(path), *Path(path).parents):
            try:
                status = place.stat()
            except (FileNotFoundError, NotADirectoryError):
                if place.is_symlink():
                    return True
                continue
            if not device or str(status.st_dev) == device or not stat.S_ISDIR(status.st_mode):
                return False
            with os.scandir(place) as listing:
                return next(listing, None) is None
    except OSError:
        return True
    return False
