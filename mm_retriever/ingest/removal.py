"""Rows out of the store: those of files that are gone, or those that someone names.

Owns how many rows may go at once without being asked for twice. Knows no models.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llama_index.core.vector_stores.types import FilterCondition, FilterOperator, MetadataFilter, MetadataFilters

from mm_retriever.errors import IngestError
from mm_retriever.ingest.gone import fate
from mm_retriever.ingest.sources import is_url, path_id, url_id
from mm_retriever.own_keys import FILE_STAMP, own_columns, own_value
from mm_retriever.store import ImageStore

LARGEST_SHARE = 5
"""More than one row in so many going at once has to be asked for; a drive that is missing looks the same."""

FREE_ROWS = 4
"""So few may always go: in a small album they are more than a fifth."""

_KEPT_LISTED = 100


@dataclass(frozen=True)
class PruneReport:
    """What one call of `prune_images` did.

    Args:
        rows: images that were stored of the folder.
        removed: rows of files that are gone.
        kept: rows of files that cannot be looked at now, so that nobody knows whether they are gone.
        kept_paths: the first hundred of those.
    """

    rows: int
    removed: int
    kept: int
    kept_paths: tuple[str, ...] = ()

    def __str__(self) -> str:
        kept = f", {self.kept} kept because their files cannot be looked at now" if self.kept else ""
        return f"{self.removed} of {self.rows} rows removed{kept}"


def prune_images(
    folder: str | os.PathLike[str], store: ImageStore, *, force: bool = False, spoiled: Collection[str] = ()
) -> PruneReport:
    """Remove the rows of images below a folder whose files are gone; the folder itself may be gone too.

    Only rows that ingestion made of files are looked at. A row goes only where its file is provably gone: one that
    cannot be looked at, or whose drive seems not to be mounted, keeps its row.

    Args:
        folder: which folder; its links are followed.
        store: from `open_store` or `open_stored`.
        force: also where more than a fifth of the folder's rows go at once, and where a drive seems to be missing.
        spoiled: ids of rows whose files are there and are images no longer.

    Raises:
        IngestError: more than a fifth of the rows would go, and `force` is not given; nothing was removed.
    """
    place = os.path.realpath(folder)
    gone: list[str] = []
    kept: list[str] = []
    rows = 0
    for row in rows_below(place, store):
        path = str(own_value(row, "file_path"))
        if row["id"] != path_id(path):
            continue
        rows += 1
        found = "gone" if row["id"] in spoiled else fate(path, row)
        if found == "gone" or (force and found == "unknown" and not os.path.lexists(path) and _knows(path)):
            gone.append(row["id"])
        elif found == "unknown":
            kept.append(path)
    if len(gone) > FREE_ROWS and LARGEST_SHARE * len(gone) > rows and not force:
        raise IngestError(
            f"{len(gone)} of the {rows} images stored of {place!r} are gone, more than a fifth: nothing was removed. "
            "If that is right and no drive or network folder is missing, ask for it again with --force "
            "(force=True in Python)"
        )
    store.delete_nodes(gone)
    return PruneReport(rows, len(gone), len(kept), tuple(kept[:_KEPT_LISTED]))


def _knows(path: str) -> bool:
    """Whether the file system answers for a path at all, and does not only fail."""
    try:
        os.stat(path)  # noqa: PTH116
    except (FileNotFoundError, NotADirectoryError):
        return True
    except (OSError, ValueError):
        return False
    return True


def rows_below(folder: str, store: ImageStore) -> Iterator[Mapping[str, Any]]:
    """Yield id, path and stamp of the rows of files below a folder."""
    for page in store.scan(own_columns("file_path", FILE_STAMP), _below(folder)):
        yield from page


def _below(folder: str, *others: MetadataFilter) -> MetadataFilters:
    """Paths that begin with the folder, or what meets another condition."""
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


def remove_images(
    store: ImageStore,
    paths: Sequence[str | os.PathLike[str]] = (),
    *,
    ids: Sequence[str] = (),
    filters: MetadataFilters | None = None,
) -> int:
    """Remove rows by files, folders and URLs, by ids, and by metadata, and return how many there were.

    The files are left alone; the next ingestion of their folder stores them again.

    Args:
        store: from `open_store` or `open_stored`.
        paths: files, folders (with all below them) or URLs; they need not be there any more.
        ids: of rows.
        filters: what all rows to remove match, wherever they are.

    Raises:
        IngestError: nothing is named, or something is named that the store holds nothing of; nothing was removed.
    """
    if not paths and not ids and filters is None:
        raise IngestError("nothing is named to be removed: give paths, ids or filters; clear() removes everything")
    wanted: dict[str, None] = {}
    for path in paths:
        found = [row["id"] for row in _rows_of(os.fspath(path), store)]
        if not found:
            raise IngestError(f"the store holds nothing of {os.fspath(path)!r}, so nothing was removed")
        wanted |= dict.fromkeys(found)
    known = store.columns(ids, ())
    if missing := [one for one in ids if one not in known]:
        raise IngestError(f"the store has no row of the id {missing[0]!r}, so nothing was removed")
    wanted |= dict.fromkeys(ids)
    if filters is not None:
        wanted |= {row["id"]: None for page in store.scan((), filters) for row in page}
    store.delete_nodes(list(wanted))
    return len(wanted)


def _rows_of(path: str, store: ImageStore) -> Iterator[Mapping[str, Any]]:
    if is_url(path):
        yield from store.columns([url_id(path)], ()).values()
        return
    folder, name = os.path.split(os.path.abspath(path))  # noqa: PTH100 - a link is stored under its own name
    places = dict.fromkeys([os.path.join(os.path.realpath(folder), name), os.path.realpath(path)])  # noqa: PTH118
    for place in places:
        same = [MetadataFilter(key=key, value=place) for key in own_columns("file_path")]
        for page in store.scan((), _below(place, *same)):
            yield from page
