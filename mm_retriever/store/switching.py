"""How a new collection takes the name of an old one, and what happens if the process that does it is killed.

`reindex` writes rows under another model into a collection beside the old one, then renames twice: the old collection
to a name of its own, the new one to the old name. A request meanwhile finds one of the two whole, or no collection of
that name. In the latter case it waits for the second renaming or, if the renaming process is gone, gives the old
collection its name back.

Milvus has no request that replaces one collection by another. An alias cannot have the name of a collection, so it
would need the same two steps, and other programs would see another name.
"""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pymilvus.exceptions import MilvusException

from mm_retriever.errors import StoreError, StoreMismatchError
from mm_retriever.store.connection import Connection
from mm_retriever.store.lite_durability import sync_renamed_collection
from mm_retriever.store.schema import stored_model, vector_length

logger = logging.getLogger(__name__)

LOOK_SECONDS = 0.5
"""How long an open store trusts its last look at a collection's model."""

_AWAY_SECONDS = 2 * LOOK_SECONDS
"""How long the name is missing at least: after that every open store looks again, so none searches by another model."""

_PATIENCE_SECONDS = 20.0  # after which a switch on a server counts as interrupted
_POLL_SECONDS = 0.1
_MISSING = 100
_BEFORE, _BESIDE = "__before_reindex", "__reindex_"


def name_before(name: str) -> str:
    """Return the name of the old collection during a switch."""
    return name + _BEFORE


def name_beside(name: str, model_id: str) -> str:
    """Return the name of the new collection before the switch, which differs between models."""
    return f"{name}{_BESIDE}{hashlib.sha256(model_id.encode()).hexdigest()[:8]}"


def left_by_reindex(name: str) -> str | None:
    """Return the name of the collection that `reindex` made this one for; None for any other collection."""
    if name.endswith(_BEFORE):
        return name.removesuffix(_BEFORE)
    whole, _, digest = name.rpartition(_BESIDE)
    return whole if whole and len(digest) == 8 and set(digest) <= set("0123456789abcdef") else None


class ModelWatch:
    """Whether an open collection still has the model that it was opened with."""

    def __init__(self, connection: Connection, name: str) -> None:
        self._connection, self._name = connection, name
        self._model: str | None = None
        self._dimension = 0
        self._checked = 0.0

    def remember(self, model: str | None, dimension: int) -> None:
        """Remember what the collection has now."""
        self._model, self._dimension, self._checked = model, dimension, time.monotonic()

    def check(self, seconds: float) -> None:
        """Look again, unless the last look is less than `seconds` ago.

        Raises:
            StoreMismatchError: the collection was switched to another model.
        """
        now = time.monotonic()
        if now - self._checked < seconds:
            return
        connection, name = self._connection, self._name
        try:
            description = connection.ask(connection.client.describe_collection, name)
        except MilvusException as error:
            if not self.is_back(error):
                raise
            description = connection.ask(connection.client.describe_collection, name)
        model, dimension = stored_model(description)[0], vector_length(description)
        # a server that is restarting may not report the model yet; that does not mean another model
        if dimension != self._dimension or (model != self._model and model is not None):
            raise StoreMismatchError(
                f"collection {name!r} at {connection.where} was switched to the model {model!r} ({dimension} numbers) "
                f"while it was open for {self._model!r}; open it again with that model"
            )
        self._checked = now

    def is_back(self, error: MilvusException) -> bool:
        """Whether the collection was missing only because of a switch, and exists now."""
        return error.code == _MISSING and come_back(self._connection, self._name)


def is_away(connection: Connection, name: str) -> bool:
    """Whether a missing collection exists under its name during a switch."""
    return bool(connection.ask(connection.client.has_collection, name_before(name)))


def come_back(connection: Connection, name: str) -> bool:
    """Wait until a collection that is being switched has its name again; False if it is missing for another reason.

    Call it without the turn, which the switching process needs.
    """
    client, lite = connection.client, connection.lite_path is not None
    patience = 0.0 if lite else min(_PATIENCE_SECONDS, connection.timeout / 2)
    start = time.monotonic()
    with connection.deadline() as until:
        while not connection.ask(client.has_collection, name):
            if not is_away(connection, name):
                return bool(connection.ask(client.has_collection, name))
            with reindex_lock(connection, name) as held:
                if held and time.monotonic() - start >= patience:
                    give_back(connection, name)
                    return True
            if until.left <= 0:
                where = connection.where
                raise StoreError(f"collection {name!r} at {where} is being switched to another model: try again")
            time.sleep(_POLL_SECONDS)
    return True


def give_back(connection: Connection, name: str) -> None:
    """Rename a collection back after an interrupted switch; the caller holds the lock."""
    if not connection.ask(connection.client.has_collection, name) and is_away(connection, name):
        _rename(connection, name_before(name), name)
        logger.warning("a reindex of %r was broken off: the collection is as it was before", name)


def switch(connection: Connection, name: str, beside: str, unchanged: Callable[[str], bool]) -> bool:
    """Give the name of the old collection to the new one, and remove the old one.

    Args:
        connection: to the store.
        name: of the old collection.
        beside: the current name of the new collection.
        unchanged: called with the old collection's temporary name, once nobody can write to it.

    Returns:
        False if the old collection was written to meanwhile; then it keeps its name.
    """
    before = name_before(name)
    with connection.request(f"switching {name!r} to another model"):
        _rename(connection, name, before)
        try:
            time.sleep(_AWAY_SECONDS)
            same = unchanged(before)
            if same:
                _rename(connection, beside, name)
        except BaseException:
            with suppress(MilvusException, StoreError):
                _rename(connection, before, name)
            raise
        if not same:
            _rename(connection, before, name)
            return False
        drop(connection, before, name)
    return True


def drop(connection: Connection, name: str, successor: str) -> None:
    """Remove a collection; its aliases go to its successor, as Milvus would remove them or refuse."""
    client = connection.client
    if connection.lite_path is None:
        aliases = connection.ask(client.describe_collection, name)["aliases"]
    else:
        aliases = connection.ask(client.list_aliases, name)["aliases"]
    for alias in aliases:
        connection.ask(client.alter_alias, successor, alias)
    connection.ask(client.drop_collection, name)


def drop_named(connection: Connection, name: str) -> None:
    """Remove the collection that a caller named.

    Raises:
        StoreError: the name is an alias.
    """
    refuse_alias(connection, name)
    connection.ask(connection.client.drop_collection, name)


def refuse_alias(connection: Connection, name: str) -> None:
    """Refuse an alias of a collection: Milvus Lite would rename or remove the collection itself.

    Raises:
        StoreError: names the collection.
    """
    if name not in connection.ask(connection.client.list_collections):
        whole = connection.ask(connection.client.describe_collection, name)["collection_name"]
        raise StoreError(f"{name!r} is an alias of the collection {whole!r} at {connection.where}: give that name")


def _rename(connection: Connection, old: str, new: str) -> None:
    with connection.turn():
        connection.ask(_renamed(connection.client), old, new)
        if connection.lite_path is not None:
            sync_renamed_collection(Path(connection.lite_path), new)


def _renamed(client: Any) -> Callable[..., None]:
    """A renaming that succeeds if it was done already: its first answer may have been lost."""

    def rename(old: str, new: str, **options: Any) -> None:
        try:
            client.rename_collection(old, new, **options)
        except MilvusException:
            if client.has_collection(old, **options) or not client.has_collection(new, **options):
                raise

    return rename


@contextmanager
def reindex_lock(connection: Connection, name: str) -> Iterator[bool]:
    """Lock a collection for switching against other processes of this machine; False if another one holds the lock.

    Two machines may reindex one collection on a server: each writes into its own collection for a model, both write the
    same rows for one model, and the slower one finds at its switch that the rows have changed.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield True
        return
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        descriptor = os.open(_lock_path(connection, name), flags, 0o600)
    except OSError:  # not writable, so no process can switch anything there
        yield False
        return
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = True
        except BlockingIOError:
            held = False
        yield held
    finally:
        os.close(descriptor)


def _lock_path(connection: Connection, name: str) -> Path:
    digest = hashlib.sha256(f"{connection.where}\0{name}".encode()).hexdigest()[:16]
    if connection.lite_path is not None:
        return Path(connection.lite_path) / f"reindex-{hashlib.sha256(name.encode()).hexdigest()[:16]}.lock"
    return Path(tempfile.gettempdir()) / f"mm_retriever-{os.getuid()}-reindex-{digest}.lock"
