"""How a collection takes the name of another one, and what is left where the process that does it is killed.

`reindex` writes rows under another model into a collection beside the old one, and then renames twice: the old
collection away, the new one to the name. Each request finds one of the two whole, or no collection of that name:
then it waits for the second renaming or, if nobody is at work any more, gives the old collection its name back.

Milvus has no request that replaces a collection by another. An alias cannot have the name of a collection, so it would
need the same two steps, and every other program would see another name.
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
"""How long an open store takes it that a collection has the model that it had."""

_AWAY_SECONDS = 2 * LOOK_SECONDS
"""How long the name is missing at least: afterwards every open store looks anew, and none searches by another model."""

_PATIENCE_SECONDS = 20.0  # after which a switch on a server is taken for broken off
_POLL_SECONDS = 0.1
_MISSING = 100
_BEFORE, _BESIDE = "__before_reindex", "__reindex_"


def name_before(name: str) -> str:
    """Return the name of a collection that is being replaced."""
    return name + _BEFORE


def name_beside(name: str, model_id: str) -> str:
    """Return the name of the collection of a new model's rows: two runs for two models never write into one."""
    return f"{name}{_BESIDE}{hashlib.sha256(model_id.encode()).hexdigest()[:8]}"


def left_by_reindex(name: str) -> str | None:
    """Return the name of the collection whose `reindex` made this one, None for any other."""
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
        self._seen = 0.0

    def saw(self, model: str | None, dimension: int) -> None:
        """Take note of what the collection has now."""
        self._model, self._dimension, self._seen = model, dimension, time.monotonic()

    def check(self, seconds: float) -> None:
        """Look anew, unless that was done less than so many seconds ago.

        Raises:
            StoreMismatchError: the collection was switched to another model.
        """
        now = time.monotonic()
        if now - self._seen < seconds:
            return
        connection, name = self._connection, self._name
        try:
            description = connection.ask(connection.client.describe_collection, name)
        except MilvusException as error:
            if not self.is_back(error):
                raise
            description = connection.ask(connection.client.describe_collection, name)
        model, dimension = stored_model(description)[0], vector_length(description)
        # a server that is starting again may not say the model yet; that is no other model
        if dimension != self._dimension or (model != self._model and model is not None):
            raise StoreMismatchError(
                f"collection {name!r} at {connection.where} was switched to the model {model!r} ({dimension} numbers) "
                f"while it was open for {self._model!r}; open it again with that model"
            )
        self._seen = now

    def is_back(self, error: MilvusException) -> bool:
        """Whether a collection that was not found is there now: it was being switched."""
        return error.code == _MISSING and come_back(self._connection, self._name)


def is_away(connection: Connection, name: str) -> bool:
    """Whether the rows of a missing collection are there under the name that they have during a switch."""
    return bool(connection.ask(connection.client.has_collection, name_before(name)))


def come_back(connection: Connection, name: str) -> bool:
    """Wait until a missing collection is there again; False if it is no switch that it is missing for.

    Call it without the turn: the process that is at work needs that.
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
    """Let the collection that a broken switch left without its name have it again; with the lock only."""
    if not connection.ask(connection.client.has_collection, name) and is_away(connection, name):
        _rename(connection, name_before(name), name)
        logger.warning("a reindex of %r was broken off: the collection is as it was before", name)


def switch(connection: Connection, name: str, beside: str, unchanged: Callable[[str], bool]) -> bool:
    """Give the name of a collection to the one beside it, and remove the first.

    Args:
        connection: to the store.
        name: the name.
        beside: the name that the other collection has so far.
        unchanged: called with the old collection's name when nobody can write to it any more.

    Returns:
        False if it was written to meanwhile; all is as it was then.
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
        drop(connection, before)
    return True


def drop(connection: Connection, name: str) -> None:
    """Remove a collection."""
    connection.ask(connection.client.drop_collection, name)


def _rename(connection: Connection, old: str, new: str) -> None:
    with connection.turn():
        connection.ask(_renamed(connection.client), old, new)
        if connection.lite_path is not None:
            sync_renamed_collection(Path(connection.lite_path), new)


def _renamed(client: Any) -> Callable[..., None]:
    """Asked again after a lost answer, a renaming that was done before is no failure."""

    def rename(old: str, new: str, **options: Any) -> None:
        try:
            client.rename_collection(old, new, **options)
        except MilvusException:
            if client.has_collection(old, **options) or not client.has_collection(new, **options):
                raise

    return rename


@contextmanager
def reindex_lock(connection: Connection, name: str) -> Iterator[bool]:
    """Whether this process alone, of those of this machine, works on the switch of a collection inside.

    Two machines that reindex one collection on a server do no harm: each has its own collection for a model, the rows
    of one model are the same from both, and the slower one finds at its switch that the rows have changed.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield True
        return
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        descriptor = os.open(_lock_path(connection, name), flags, 0o600)
    except OSError:  # a place that cannot be written: nobody switches anything there
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
