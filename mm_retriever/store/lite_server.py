"""The process that has a Milvus Lite file open, and serves it to the other processes of the same user.

Milvus Lite lets one process at a time into a file, and by itself serves it without authentication on a TCP port. Here
its request handlers answer on a Unix socket in a folder that only the user may enter; where there can be no such
socket, on a loopback port. Either way both sides prove that they know a secret, which is in a record inside the store
that only the user may read. Owns that record, the socket, and whose turn it is. Knows nothing of those who ask.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import selectors
import shutil
import socket
import stat
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import grpc

from mm_retriever.files import write_atomically
from mm_retriever.store.lite_files import Turn
from mm_retriever.store.lite_repair import repair
from mm_retriever.store.lite_wire import Address, Wire

logger = logging.getLogger(__name__)

RECORD = "served-by.json"
"""Name of the record in the folder of a Milvus Lite file."""

ELECTION = "served-by.lock"
"""Name of the file there that is locked by whoever is about to open it."""

OPENING, SERVING, CLOSING = "opening", "serving", "closing"

_FOLDER_PREFIX = "mm_retriever-"
_LONGEST_SOCKET_PATH = 100  # bytes; kernels take 103 or 107
_MOST_RECORD = 4096
_ADMISSION_SECONDS = 5.0
_HELD_SECONDS = 10.0  # a process that keeps the turn for so long without asking anything is taken for stopped
_JOIN_SECONDS = 2.0
_RETRY_SECONDS = 1.0
_READS = (
    *("Check", "Connect", "CreateIndex", "Describe", "Get", "Has", "HybridSearch"),
    *("List", "Load", "Query", "Release", "Search", "Show"),
)
"""What requests begin with that a file takes which cannot be written; a missing index is built in the copy."""


# ------------------------------------------------------------------------------------------ the record


@dataclass(frozen=True)
class Record:
    """Who has a Milvus Lite file open, and how the other processes of the same user reach it.

    Attributes:
        state: OPENING, SERVING or CLOSING.
        pid: of the process.
        host: its machine.
        device: with `inode`, the folder that it has open: the record in a copy of the folder says nothing.
        inode: see `device`.
        address: where it serves; "" while it does not.
        secret: what both sides must know, in hexadecimal digits.
    """

    state: str
    pid: int
    host: str
    device: int
    inode: int
    address: str | tuple[str, int] = ""
    secret: str = ""

    def write(self, path: Path) -> None:
        """Put the record in place of the last one; only the user may read it."""
        write_atomically(path / RECORD, json.dumps(asdict(self)).encode(), mode=0o600)


def read_record(path: Path) -> Record | None:
    """Return the record of a Milvus Lite file; None if there is none that this user wrote for this very folder."""
    try:
        descriptor = os.open(path / RECORD, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    with open(descriptor, "rb") as file:  # noqa: PTH123
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o022:
            return None
        data = file.read(_MOST_RECORD + 1)
    try:
        fields = json.loads(data)
        address = fields["address"]
        if not isinstance(address, str):
            host, port = address
            address = (str(host), int(port))
        record = Record(
            str(fields["state"]),
            int(fields["pid"]),
            str(fields["host"]),
            int(fields["device"]),
            int(fields["inode"]),
            address,
            str(fields["secret"]),
        )
        bytes.fromhex(record.secret)
        return record if (record.device, record.inode) == _identity(path) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def reachable(record: Record) -> bool:
    """Return whether it makes sense to connect: it serves, and from a place where only this user can listen."""
    if record.state != SERVING or record.host != socket.gethostname():
        return False
    if not isinstance(record.address, str):
        return record.address[0] == "127.0.0.1"
    place = Path(record.address)
    try:
        folder, listening = os.lstat(place.parent), os.lstat(place)
    except (OSError, ValueError):
        return False
    private = stat.S_ISDIR(folder.st_mode) and not folder.st_mode & 0o077
    return private and stat.S_ISSOCK(listening.st_mode) and {folder.st_uid, listening.st_uid} == {os.geteuid()}


def _identity(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino


# ------------------------------------------------------------------------------------------ the server


class LiteServer:
    """A Milvus Lite file that this process has open and serves until `close`; use `start`.

    Args:
        path: of the file.
        place: the folder that Milvus Lite has open; another one than `path` is a copy, which takes no rows.
        database: Milvus Lite's, of that folder.
        owned: whether to close the database at the end.
    """

    def __init__(self, path: Path, place: Path, database: Any, *, owned: bool = True) -> None:
        from milvus_lite.adapter.grpc.servicer import MilvusServicer

        self._path, self._place, self._database, self._owned = path, place, database, owned
        self._identity = _identity(place)
        self._handlers = _handlers(MilvusServicer(database))
        self._turn = Turn()
        self._closed = threading.Event()
        self._wires: dict[Wire, threading.Thread] = {}
        self._turn_holder: Wire | None = None
        self._secret = secrets.token_bytes(32)
        self._listener, self.address = _listen()
        self._waker, self._woken = socket.socketpair()  # written to by `close`: a closed listener wakes no one
        self._acceptor = threading.Thread(target=self._accept, name="mm_retriever-lite", daemon=True)
        self._acceptor.start()
        self._publish(SERVING)

    @classmethod
    def start(cls, path: Path) -> LiteServer | None:
        """Return a server of the file, which is made if it is missing; None if another process has it open.

        Raises:
            OSError: the folder cannot be made or read.
            MMRetrieverError: what it holds cannot be repaired.
        """
        if not path.is_dir():
            path.mkdir(mode=0o700, exist_ok=True)
        if not _may_be_written(path):
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
                    _remove_record(path)
            return server

    @classmethod
    def _start_on_copy(cls, path: Path) -> LiteServer | None:
        """Serve a copy to this process alone: Milvus Lite writes into every file that it opens."""
        folder = Path(tempfile.mkdtemp(prefix=_FOLDER_PREFIX))
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
            database = _ServedFile(place)
        except DataDirLockedError:
            return None
        try:
            return cls(path, place, database)
        except BaseException:
            database.close()
            raise

    @property
    def secret(self) -> bytes:
        """What a process must know to be answered."""
        return self._secret

    def close(self) -> None:
        """Stop serving and let go of the file: rows go from memory to disk, and another process may open it."""
        self._publish(CLOSING)
        self._closed.set()
        self._waker.send(b"\0")
        holder = self._turn_holder
        if holder is not None:  # it asks whoever opens the file next
            holder.hang_up()
        with self._turn:
            for wire in list(self._wires):
                wire.hang_up()
            if not self._owned:
                _remove_record(self._path)
            elif self._is_in_place():
                self._database.close()
            else:  # closing would write rows to whatever lies in that place now
                logger.warning("%s was moved or removed while it was open; its last rows stay in its log", self._path)
                self._database._release_lock()
                _ABANDONED.append(self)
        for thread in [self._acceptor, *self._wires.values()]:
            if thread is not threading.current_thread():
                thread.join(_JOIN_SECONDS)
        for opened in (self._listener, self._waker, self._woken):
            opened.close()
        _remove_socket(self.address)
        if self._is_copy:
            shutil.rmtree(self._place.parent, ignore_errors=True)

    def forget(self) -> None:
        """In a forked child: free what belongs to the parent, which goes on serving."""
        self._closed.set()
        for opened in (self._listener, self._waker, self._woken):
            opened.close()
        for wire in list(self._wires):
            wire.close()
        lock, self._database._lock_fd = self._database._lock_fd, None
        if lock is not None:
            os.close(lock)  # LOCK_UN would take the lock from the parent
        _ABANDONED.append(self)  # its destructors would write to the parent's files

    def _publish(self, state: str) -> None:
        record = Record(state, os.getpid(), socket.gethostname(), *self._identity, self.address, self._secret.hex())
        try:
            if self._is_in_place():
                record.write(self._place)
        except OSError as error:  # a full disk: this process can go on, the others wait
            logger.warning("other processes cannot open %s meanwhile: %s", self._path, error.strerror or error)

    @property
    def _is_copy(self) -> bool:
        return self._place != self._path

    def _is_in_place(self) -> bool:
        try:
            return _identity(self._place) == self._identity
        except OSError:
            return False

    def _accept(self) -> None:
        with selectors.PollSelector() as ready:
            for opened in (self._listener, self._woken):
                ready.register(opened, selectors.EVENT_READ)
            while not self._closed.is_set():
                ready.select()
                if not self._closed.is_set():
                    self._accept_one()

    def _accept_one(self) -> None:
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
        """Answer one connection until it ends; the turn that it may hold ends with it."""
        HANDLING.now = True
        try:
            wire.admit(self._secret, _ADMISSION_SECONDS)
            while not self._closed.is_set():
                holds_turn = self._turn_holder is wire
                header, body = wire.receive(_HELD_SECONDS if holds_turn else None)
                action, content = header.get("do"), b""
                answer: dict[str, Any] = {}
                if action == "take turn":
                    if not holds_turn:
                        self._turn.__enter__()
                        self._turn_holder = wire
                elif action == "end turn":
                    if holds_turn:
                        self._end_turn()
                elif holds_turn:
                    answer, content = self._answer(header, body)
                else:
                    with self._turn:
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
        self._turn.__exit__()

    def _answer(self, header: Mapping[str, Any], body: bytes) -> tuple[dict[str, Any], bytes]:
        """Run one request, in its turn."""
        if self._closed.is_set():
            return {}, b""
        if float(header.get("until", 0)) < time.time():  # whoever asked has given up
            return {"code": grpc.StatusCode.DEADLINE_EXCEEDED.name, "details": "its turn came too late"}, b""
        name = str(header.get("method")).rpartition("/")[2]
        if not self._is_in_place():
            why = f"{self._path} was moved, removed or replaced while it was open; close the store and open it anew"
            return {"refused": why}, b""
        if self._is_copy and not name.startswith(_READS):
            why = f"{self._path} is in a folder or file system that cannot be written: it can be searched, not changed"
            return {"refused": why}, b""
        context = _Context([(str(key), str(value)) for key, value in header.get("metadata", ())])
        handler = self._handlers.get(name)
        try:
            if handler is None:
                raise NotImplementedError(f"Milvus Lite has no request {name!r}")
            answer = handler.response_serializer(handler.unary_unary(handler.request_deserializer(body), context))
        except NotImplementedError as error:
            return {"code": grpc.StatusCode.UNIMPLEMENTED.name, "details": context.details or str(error)}, b""
        except Exception as error:
            return {"code": grpc.StatusCode.INVALID_ARGUMENT.name, "details": f"{type(error).__name__}: {error}"}, b""
        return {"code": context.code.name, "details": context.details}, answer


class _Handling(threading.local):
    now = False


HANDLING = _Handling()
"""Whether the current thread handles a request here: what fails then is said in the answer, and logged by nobody."""

_ABANDONED: list[LiteServer] = []


class _Context:
    """What Milvus Lite's handlers use of a gRPC context."""

    def __init__(self, metadata: list[tuple[str, str]]) -> None:
        self._metadata = metadata
        self.code, self.details = grpc.StatusCode.OK, ""

    def invocation_metadata(self) -> list[tuple[str, str]]:
        return self._metadata

    def set_code(self, code: grpc.StatusCode) -> None:
        self.code = code

    def set_details(self, details: str) -> None:
        self.details = details


def _ServedFile(path: Path) -> Any:  # noqa: N802 - a class that can only be made when Milvus Lite is loaded
    from milvus_lite.db import MilvusLite

    class ServedFile(MilvusLite):  # type: ignore[misc]
        def _release_lock(self) -> None:
            """Remove the record as the last thing under the lock: after that it could be another process's."""
            if self._lock_fd is not None:
                _remove_record(path)
            super()._release_lock()

    return ServedFile(str(path))


def _remove_record(path: Path) -> None:
    try:
        (path / RECORD).unlink(missing_ok=True)
    except OSError as error:
        logger.debug("%s: the record stays: %s", path, error)


def _opened_by_pymilvus(path: Path) -> Any:
    """The database of a file that a client of pymilvus opened in this process, None if there is none.

    It stays open until the process ends, and with it a port: this process can only share it.
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


@contextmanager
def _election(path: Path) -> Iterator[bool]:
    """Let one process at a time repair and open the file; gives False where that is another one, or it is open."""
    import fcntl  # is not there on Windows, where Milvus Lite is not either

    descriptors: list[int] = []
    owner = path.stat()
    try:
        for name in (ELECTION, "LOCK"):
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
            descriptors.append(os.open(path / name, flags, 0o600))
            if os.geteuid() == 0:  # an administrator who looks into a user's file does not take it from the user
                os.fchown(descriptors[-1], owner.st_uid, owner.st_gid)
            fcntl.flock(descriptors[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        elected = False
    else:
        os.close(descriptors.pop())  # Milvus Lite, and the repair before it, take its lock themselves
        elected = True
    try:
        yield elected
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def _announce(path: Path) -> None:
    """Say in the record that this process is about to open the file, so that others know that waiting helps."""
    last = read_record(path)
    if last is not None:
        _remove_socket(last.address)  # of a process that was killed
    try:
        for draft in path.glob(f".{RECORD}.*"):  # of one that was killed while it wrote
            draft.unlink()
        Record(OPENING, os.getpid(), socket.gethostname(), *_identity(path)).write(path)
    except OSError as error:  # a full disk
        logger.debug("%s: no record can be written: %s", path, error)


def _may_be_written(path: Path) -> bool:
    needed = (path, path / "LOCK", path / "collections")
    return all(os.access(place, os.W_OK) for place in needed if place.exists())


def _copied(path: Path, copy: Path) -> bool:
    """Copy a file that nobody writes to meanwhile; False if another process has it open."""
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


# ------------------------------------------------------------------------------------------ the socket


def _listen() -> tuple[socket.socket, Address]:
    """A listening socket: in a new folder of this user's, or where none can be made, on a loopback port."""
    for place in dict.fromkeys((os.environ.get("XDG_RUNTIME_DIR"), tempfile.gettempdir(), "/tmp")):  # noqa: S108
        if not place or not os.path.isabs(place):  # noqa: PTH117
            continue
        try:
            folder = Path(tempfile.mkdtemp(prefix=_FOLDER_PREFIX, dir=place))  # 0700, and no name that one could take
        except OSError as error:
            logger.debug("no folder for a socket in %s: %s", place, error)
            continue
        address = str(folder / "socket")
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            if len(os.fsencode(address)) > _LONGEST_SOCKET_PATH:
                raise OSError(f"{address} is too long for a socket")
            listener.bind(address)
            os.chmod(address, 0o600)  # noqa: PTH101
            return _listening(listener), address
        except OSError as error:
            logger.debug("no socket at %s: %s", address, error)
            listener.close()
            _remove_socket(address)
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.bind(("127.0.0.1", 0))
    host, port = listener.getsockname()
    return _listening(listener), (host, port)


def _listening(listener: socket.socket) -> socket.socket:
    listener.listen(128)
    listener.setblocking(False)
    return listener


def _remove_socket(address: Address) -> None:
    """Remove a socket and the folder that was made for it; anything else is left alone."""
    if not isinstance(address, str) or not Path(address).parent.name.startswith(_FOLDER_PREFIX):
        return
    folder = Path(address).parent
    try:
        if stat.S_ISSOCK(os.lstat(address).st_mode):
            os.unlink(address)  # noqa: PTH108
    except OSError as error:
        logger.debug("%s: %s", address, error)
    try:
        folder.rmdir()
    except OSError as error:
        logger.debug("%s: %s", folder, error)
