"""Whether a store still holds what was stored: every row against its checksum, every file against its record."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mm_retriever.errors import StoreDamagedError
from mm_retriever.store.checksums import damaged_rows, has_checksum, row_is_damaged
from mm_retriever.store.collection import Collection
from mm_retriever.store.connection import Connection, check_exists
from mm_retriever.store.filters import ID_FIELD, VECTOR_FIELD
from mm_retriever.store.lite_durability import damaged_files

_PAGE_ROWS = 1_000


@dataclass(frozen=True)
class Verification:
    """What was found in one collection.

    Attributes:
        rows: how many were read.
        without_checksum: those of them that were stored by a version before checksums, and cannot be checked.
        damaged: the ids of those that are not what was stored.
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
        parts += [f"id {one!r} is damaged" for one in self.damaged]
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
    folder = None if place is None else Path(place)
    return Verification(rows, unknown, tuple(damaged), damaged_files(folder) if folder else {})


def verify_store(uri: str | Path, *, token: str | None = None, timeout: float = 30.0) -> dict[str, Verification | str]:
    """Return, for each collection of a store, what was found, or why it cannot be checked.

    Raises:
        StoreDamagedError: a Milvus Lite file that cannot be opened for its damage.
        StoreError: there is no such file, it is locked, or the server does not answer.
    """
    check_exists(uri)
    connection = Connection(uri, token=token, timeout=timeout)
    try:
        with connection.request("listing the collections"):
            client = connection.client
            facts = {
                name: client.describe_collection(name, timeout=timeout)
                for name in sorted(client.list_collections(timeout=timeout))
            }
        return {name: _verified(connection, name, described["fields"]) for name, described in facts.items()}
    finally:
        connection.close()


def _verified(connection: Connection, name: str, fields: Sequence[dict[str, Any]]) -> Verification | str:
    dimensions = {one["name"]: int(one.get("params", {}).get("dim", 0)) for one in fields}
    if not {ID_FIELD, VECTOR_FIELD} <= dimensions.keys():
        return "made by another program"
    collection = Collection(
        connection, name, dimension=dimensions[VECTOR_FIELD], model_id="", index="auto", metric="IP"
    )
    with connection.request("loading the collection"):
        collection.load()
    return verify_collection(collection)
