"""The process that has a Milvus Lite file open, and serves it to the other processes of the same user.

Milvus Lite lets one process at a time into a file, and its own server has no authentication. Here its request handlers
answer on a Unix socket that only the user can reach, after both sides have proved that they know the secret in the
record (`lite_wire.py`). Owns the database, and whose turn it is. Knows nothing of the other side.
"""

from __future__ import annotations

import logging
import os
import secrets
import selectors
import shutil
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc

from mm_retriever.store.lite_repair import repair
from mm_retriever.store.lite_search import hasten
from mm_retriever.store.lite_wire import (
    CLOSING,
    FOLDER_PREFIX,
    OPENING,
    RECORD,
    SERVING,
    Record,
    Wire,
    folder_identity,
    listen,
    read_record,
    remove_record,
    remove_socket,
)
from mm_retriever.threads import FairLock

logger = logging.getLogger(__name__)

_ELECTION = "served-by.lock"  # in the folder of a file, locked by the process that is about to open it
_ADMISSION_SECONDS = 5.0
_HELD_SECONDS = 10.0  # a process that keeps the turn longer without a request counts as stopped
_JOIN_SECONDS = 2.0
_RETRY_SECONDS = 1.0
_READS = (
    *("Check", "Connect", "CreateIndex", "Describe", "Get", "Has", "HybridSearch"),
    *("List", "Load", "Query", "Release", "Search", "Show"),
)
"""First words of the requests that a read-only file answers; a missing index is built in the copy."""
_CHANGES_NOTHING = ("Describe", "Get", "Has", "HybridSearch", "Query", "Search")
"""First words of the requests that may be interrupted anywhere, so that the caller's own thread can run them."""


class LiteServer:
    """A Milvus Lite file that this process has open and serves until `close`; use `start`.

    Args:
        path: the Milvus Lite file.
        place: the folder that Milvus Lite has open: `path` or a read-only copy.
        database: Milvus Lite's, of that folder.
        owned: whether to close the database at the end.
    """

    def __init__(self, path: Path, place: Path, database: Any, *, owned: bool = True) -> None:
        from milvus_lite.adapter.grpc.servicer import MilvusServicer

        self._path, self._place, self._database, self._owned = path, place, database, owned
        self._is_copy = place != path
        self._identity = folder_identity(place)
        self._handlers = _handlers(MilvusServicer(database))
        self._lock = FairLock()
        self._closed = threading.Event()
        self._wires: dict[Wire, threading.Thread] = {}
        self._turn_holder: Wire | None = None  # has `_lock` for as long as it wants
        self.secret = secrets.token_bytes(32)
        self._listener, self.address = listen()
        self._waker, self._woken = socket.socketpair()  # closing a listener would not wake the thread that waits for it
        self._acceptor = threading.Thread(target=self._accept, name="mm_retriever-lite", daemon=True)
        self._acceptor.start()
        self._publish(SERVING)

    @classmethod
    def start(cls, path: Path) -> LiteServer | None:
        """Return a server of the file, which is created if missing; None if another process has it open.

        Raises:
            OSError: the folder cannot be created or read.
            StoreError: its contents cannot be repaired.
        """
        if not path.is_dir():
            path.mkdir(mode=0o700, exist_ok=True)
        needed = (path, path / "LOCK", path / "collections")
        if not all(os.access(place, os.W_OK) for place in needed if place.exists()):
            return cls._start_on_copy(path)
        with _election(path) as elected:
            if not elected:
                shared = _opened_by_pymilvus(path)
                return None if shared is None else cls(path, path, shared, owned=False)
            _announce(path)
            server = None
            try:
                server = cls._opened(path, path)
            finally:
                if server is None:
                    remove_record(path)
            return server

    @classmethod
    def _start_on_copy(cls, path: Path) -> LiteServer | None:
        """Serve a copy to this process alone: Milvus Lite writes into every file that it opens."""
        folder = Path(tempfile.mkdtemp(prefix=FOLDER_PREFIX))
        server = None
        try:
            if _copied(path, folder / path.name):
                server = cls._opened(path, folder / path.name)
        finally:
            if server is None:
                shutil.rmtree(folder)
        return server

    @classmethod
    def _opened(cls, path: Path, place: Path) -> LiteServer | None:
        from milvus_lite.exceptions import DataDirLockedError

        repair(place)
        try:
            database = _database(place)
        except DataDirLockedError:
            return None
        try:
            return cls(path, place, database)
        except BaseException:
            database.close()
            raise

    def close(self) -> None:
        """Stop serving and close the file: rows go from memory to disk, and another process may open it."""
        self._publish(CLOSING)
        self._closed.set()
        self._waker.send(b"\0")
        if (holder := self._turn_holder) is not None:  # it asks the next process that opens the file
            holder.hang_up()
        with self._lock:
            for wire in list(self._wires):
                wire.hang_up()
            if not self._owned:
                remove_record(self._path)
            elif self._is_in_place():
                self._database.close()
            else:  # closing would write rows to whatever is in that place now
                logger.warning("%s was moved or removed while it was open; its last rows stay in its log", self._path)
                self._database._release_lock()  # Milvus Lite has no public way to let go without writing
                _ABANDONED.append(self)
        for thread in [self._acceptor, *self._wires.values()]:
            if thread is not threading.current_thread():
                thread.join(_JOIN_SECONDS)
        self._close_sockets()
        remove_socket(self.address)
        if self._is_copy:
            shutil.rmtree(self._place.parent, ignore_errors=True)

    def forget(self) -> None:
        """In a forked child: free the parent's sockets and lock; the parent goes on serving."""
        self._closed.set()
        self._close_sockets()
        for wire in list(self._wires):
            wire.close()
        # No public way: closing the database writes to the parent's files, and LOCK_UN takes the lock from the parent.
        lock, self._database._lock_fd = self._database._lock_fd, None
        if lock is not None:
            os.close(lock)
        _ABANDONED.append(self)

    def _close_sockets(self) -> None:
        for endpoint in (self._listener, self._waker, self._woken):
            endpoint.close()

    def _publish(self, state: str) -> None:
        record = Record.of_this_process(state, self._identity, self.address, self.secret)
        try:
            if self._is_in_place():
                record.write(self._place)
        except OSError as error:  # a full disk: this process can go on, the others wait
            logger.warning("other processes cannot open %s meanwhile: %s", self._path, error.strerror or error)

    def _is_in_place(self) -> bool:
        try:
            return folder_identity(self._place) == self._identity
        except OSError:
            return False

    def read(self, header: Mapping[str, Any], body: bytes, seconds: float) -> tuple[dict[str, Any], bytes] | None:
        """Answer a request of this process in the calling thread; None if it changes something, or the file is closed.

        Raises:
            TimeoutError: its turn did not come within `seconds`.
        """
        if not str(header["method"]).rpartition("/")[2].startswith(_CHANGES_NOTHING):
            return None
        if not self._lock.acquire(max(0.0, seconds)):
            raise TimeoutError
        HANDLING.now = True
        try:
            answer = self._answer(header, body)
        finally:
            HANDLING.now = False
            self._lock.__exit__()
        return None if self._closed.is_set() else answer

    # ------------------------------------------------------------------------------------------ connections

    def _accept(self) -> None:
        with selectors.PollSelector() as ready:
            for opened in (self._listener, self._woken):
                ready.register(opened, selectors.EVENT_READ)
            while not self._closed.is_set():
                ready.select()
                if not self._closed.is_set():
                    self._accept_next()

    def _accept_next(self) -> None:
        try:
            connected, _ = self._listener.accept()
        except BlockingIOError:  # it was withdrawn
            return
        except OSError as error:
            logger.warning("cannot accept a connection for %s: %s", self._path, error.strerror or error)
            self._closed.wait(_RETRY_SECONDS)
            return
        connected.setblocking(True)
        wire = Wire(connected)
        thread = threading.Thread(target=self._serve, args=(wire,), name="mm_retriever-lite-wire", daemon=True)
        self._wires[wire] = thread
        thread.start()

    def _serve(self, wire: Wire) -> None:
        """Answer one connection until it ends, and with it any turn that it holds."""
        HANDLING.now = True
        try:
            wire.admit(self.secret, _ADMISSION_SECONDS)
            while not self._closed.is_set():
                holds_turn = self._turn_holder is wire
                header, body = wire.receive(_HELD_SECONDS if holds_turn else None)
                action = header.get("do")
                answer: dict[str, Any] = {}
                content = b""
                if action == "take turn":
                    if not holds_turn:
                        self._lock.__enter__()
                        self._turn_holder = wire
                elif action == "end turn":
                    if holds_turn:
                        self._end_turn()
                elif holds_turn:
                    answer, content = self._answer(header, body)
                else:
                    with self._lock:
                        answer, content = self._answer(header, body)
                if self._closed.is_set():
                    return
                wire.send(answer, content, seconds=_HELD_SECONDS if self._turn_holder is wire else None)
        except (OSError, ValueError, TypeError) as error:  # the other side ended, or does not speak the protocol
            logger.debug("a connection for %s ended: %s", self._path, error)
        finally:
            if self._turn_holder is wire:
                self._end_turn()
            self._wires.pop(wire, None)
            wire.close()

    def _end_turn(self) -> None:
        self._turn_holder = None
        self._lock.__exit__()

    def _answer(self, header: Mapping[str, Any], body: bytes) -> tuple[dict[str, Any], bytes]:
        """Run one request, in its turn."""
        if self._closed.is_set():
            return {}, b""
        if float(header.get("until", 0)) < time.time():  # the process that sent it has given up
            return _failure(grpc.StatusCode.DEADLINE_EXCEEDED, "its turn came too late")
        name = str(header.get("method")).rpartition("/")[2]
        if not self._is_in_place():
            text = f"{self._path} was moved, removed or replaced while it was open; close the store and open it anew"
            return {"refused": text}, b""
        if self._is_copy and not name.startswith(_READS):
            text = f"{self._path} is in a folder or file system that cannot be written: it can be searched, not changed"
            return {"refused": text}, b""
        context = _Context([(str(key), str(value)) for key, value in header.get("metadata", ())])
        handler = self._handlers.get(name)
        try:
            if handler is None:
                raise NotImplementedError(f"Milvus Lite has no request {name!r}")
            content = handler.response_serializer(handler.unary_unary(handler.request_deserializer(body), context))
        except NotImplementedError as error:
            return _failure(grpc.StatusCode.UNIMPLEMENTED, context.details or str(error))
        except Exception as error:
            return _failure(grpc.StatusCode.INVALID_ARGUMENT, f"{type(error).__name__}: {error}")
        return {"code": context.code.name, "details": context.details}, content


def _failure(code: grpc.StatusCode, details: str) -> tuple[dict[str, Any], bytes]:
    return {"code": code.name, "details": details}, b""


class _Handling(threading.local):
    now = False


HANDLING = _Handling()
"""Whether the current thread handles a request: its failure is then part of the answer, and not logged."""

_ABANDONED: list[LiteServer] = []
"""Kept alive: the destructors of their databases would write to files that belong to others now."""


class _Context:
    """The part of a gRPC context that Milvus Lite's handlers use."""

    def __init__(self, metadata: list[tuple[str, str]]) -> None:
        self._metadata = metadata
        self.code, self.details = grpc.StatusCode.OK, ""

    def invocation_metadata(self) -> list[tuple[str, str]]:
        return self._metadata

    def set_code(self, code: grpc.StatusCode) -> None:
        self.code = code

    def set_details(self, details: str) -> None:
        self.details = details


# ------------------------------------------------------------------------------------------ Milvus Lite


def _database(path: Path) -> Any:
    from milvus_lite.db import MilvusLite

    hasten()

    class ServedDatabase(MilvusLite):  # type: ignore[misc]
        def _release_lock(self) -> None:
            """Remove the record last, still under the lock: after that it could be another process's."""
            if self._lock_fd is not None:
                remove_record(path)
            super()._release_lock()

    return ServedDatabase(str(path))


def _opened_by_pymilvus(path: Path) -> Any:
    """The database of the file if a client of pymilvus opened it in this process, else None.

    pymilvus keeps it open, and serves it on a port, until the process ends: this process can only share it. `_servers`
    has no public name.
    """
    manager = sys.modules.get("milvus_lite.server_manager")
    servers = getattr(getattr(manager, "server_manager_instance", None), "_servers", {})
    opened = [database for place, (_, database, _) in list(servers.items()) if os.path.realpath(place) == str(path)]
    return opened[0] if opened and not opened[0].closed else None


def _handlers(servicer: Any) -> dict[str, Any]:
    """Milvus Lite's request handlers by name, as it would register them with a gRPC server."""
    from pymilvus.grpc_gen import milvus_pb2_grpc

    handlers: dict[str, Any] = {}

    class Registry:
        def add_generic_rpc_handlers(self, _: object) -> None:
            """The same handlers, by their path."""

        def add_registered_method_handlers(self, _: str, by_name: Mapping[str, Any]) -> None:
            handlers.update(by_name)

    milvus_pb2_grpc.add_MilvusServiceServicer_to_server(servicer, Registry())
    return handlers


# ------------------------------------------------------------------------------------------ opening


@contextmanager
def _election(path: Path) -> Iterator[bool]:
    """Let one process at a time repair and open the file; yields False if another one does, or has it open."""
    import fcntl  # missing on Windows, as Milvus Lite is

    descriptors: list[int] = []
    owner = path.stat()
    try:
        for name in (_ELECTION, "LOCK"):
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
            descriptors.append(os.open(path / name, flags, 0o600))
            if os.geteuid() == 0:  # an administrator who opens a user's file must not take it from the user
                os.fchown(descriptors[-1], owner.st_uid, owner.st_gid)
            fcntl.flock(descriptors[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        elected = False
    else:
        os.close(descriptors.pop())  # the repair, and Milvus Lite after it, take its lock themselves
        elected = True
    try:
        yield elected
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def _announce(path: Path) -> None:
    """Write a record that this process is about to open the file, so that others wait."""
    last = read_record(path)
    if last is not None:
        remove_socket(last.address)  # of a process that was killed
    try:
        for draft in path.glob(f".{RECORD}.*"):  # of one that was killed while it wrote
            draft.unlink()
        Record.of_this_process(OPENING, folder_identity(path)).write(path)
    except OSError as error:  # a full disk
        logger.debug("%s: no record can be written: %s", path, error)


def _copied(path: Path, copy: Path) -> bool:
    """Copy a file while no process writes to it; False if another process has it open."""
    import fcntl

    try:
        lock = os.open(path / "LOCK", os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        lock = None
    try:
        if lock is not None:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        for folder, _, names in os.walk(path):
            (copy / Path(folder).relative_to(path)).mkdir(mode=0o700)
            for name in names:
                if name != RECORD:
                    source = Path(folder, name)
                    shutil.copyfile(source, copy / source.relative_to(path), follow_symlinks=False)
    except BlockingIOError:
        return False
    finally:
        if lock is not None:
            os.close(lock)
    return True
