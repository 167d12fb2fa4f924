"""How the stores of this process reach a Milvus Lite file: they serve it, or connect to the process that does.

Owns which process becomes the server, and what happens when the server ends: the first process that notices takes over,
and every process repeats its own request (rows are written and removed by their id, so none is stored twice). pymilvus
gets this in place of a gRPC channel: no port, no proxy, no keepalive, and a forked child simply connects anew.
"""

from __future__ import annotations

import atexit
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc

from mm_retriever.errors import StoreError, StoreLockedError
from mm_retriever.store.channel import Deadline, deadline
from mm_retriever.store.lite_server import LiteServer
from mm_retriever.store.lite_wire import CLOSING, OPENING, Record, Wire, read_record

_GRACE_SECONDS = 3.0
"""How long an unreachable process may hold the lock of a file before that is an error."""

_MOST_IDLE_WIRES = 16
_DEFAULT_SECONDS = 30.0


class LiteCallError(grpc.RpcError):  # type: ignore[misc]
    """A request to a Milvus Lite file without an answer; pymilvus passes it on as it is.

    Attributes:
        store_error: the error to raise in its place; None where the code is enough.
    """

    def __init__(self, code: grpc.StatusCode, details: str, store_error: StoreError | None = None) -> None:
        super().__init__(details)
        self._code, self._details, self.store_error = code, details, store_error

    @classmethod
    def of(cls, error: StoreError, code: grpc.StatusCode = grpc.StatusCode.PERMISSION_DENIED) -> LiteCallError:
        """Return the call error that carries an error of ours through pymilvus."""
        return cls(code, str(error), error)

    def code(self) -> grpc.StatusCode:
        """Return what kind of failure it is."""
        return self._code

    def details(self) -> str:
        """Return the reason."""
        return self._details

    def result(self, timeout: float | None = None) -> Any:
        """Raise the error, as a failed call of gRPC does."""
        raise self


class _HeldTurn(threading.local):
    """Whether the current thread keeps its turn over several requests, and the connection that has the turn."""

    wanted = False
    wire: Wire | None = None


class LiteFile:
    """A Milvus Lite file, shared by all stores of this process that have it open.

    Attributes:
        electing: held while this process tries to open it.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._server: LiteServer | None = None
        self._record: Record | None = None
        self._reset()

    def _reset(self) -> None:
        self._idle: list[Wire] = []
        self.electing = threading.Lock()
        self._turn = _HeldTurn()

    # ------------------------------------------------------------------------------------------ requests

    def ask(self, header: dict[str, Any], body: bytes) -> tuple[dict[str, Any], bytes]:
        """Return the answer to one request, whichever process serves the file in the end.

        Raises:
            LiteCallError: no answer by the deadline, or the file cannot be opened.
        """
        with deadline(_DEFAULT_SECONDS) as until:
            while True:
                header["until"] = time.time() + until.left
                if (answer := self._read_here(header, body, until)) is not None:
                    return answer
                wire = self._wire(until)
                answer = self._exchange(wire, header, body, until)
                if answer is None:
                    continue
                if wire is not self._turn.wire:
                    self._give_back(wire)
                return answer

    def _read_here(self, header: dict[str, Any], body: bytes, until: Deadline) -> tuple[dict[str, Any], bytes] | None:
        """The answer, computed in this thread, where this process serves the file; else None."""
        server = self._server
        if server is None or self._turn.wanted:
            return None
        try:
            return server.read(header, body, until.left)
        except TimeoutError as error:
            raise self._silence(until) from error

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Hold off all other requests to the file, from any process, while those inside run."""
        if self._turn.wanted:
            yield
            return
        self._turn.wanted = True
        try:
            yield
        finally:
            self._turn.wanted = False
            wire, self._turn.wire = self._turn.wire, None
            if wire is not None:
                with deadline(_DEFAULT_SECONDS) as until:
                    if self._exchange(wire, {"do": "end turn"}, b"", until, last=True) is not None:
                        self._give_back(wire)

    def _wire(self, until: Deadline) -> Wire:
        """A connection for the current thread alone, with the turn if the thread keeps it."""
        while True:
            if self._turn.wire is not None:
                return self._turn.wire
            wire = self._idle.pop() if self._idle else self._connect(until)
            if not self._turn.wanted:
                return wire
            if self._exchange(wire, {"do": "take turn"}, b"", until) is not None:
                self._turn.wire = wire

    def _exchange(
        self, wire: Wire, header: dict[str, Any], body: bytes, until: Deadline, *, last: bool = False
    ) -> tuple[dict[str, Any], bytes] | None:
        """The answer on this connection; None if the connection was lost and there is time to try another.

        The `last` exchange of a turn may get lost, since a turn ends with its connection.
        """
        try:
            wire.send(header, body, seconds=until.left)
            return wire.receive(until.left)
        except OSError as error:
            self._drop(wire)
            if last:
                return None
            if isinstance(error, TimeoutError):
                raise self._silence(until) from error
            until.reason = f"the process that had it open has ended ({error})"
            if until.left <= 0:
                raise LiteCallError(grpc.StatusCode.DEADLINE_EXCEEDED, until.reason) from error
            return None
        except BaseException:
            self._drop(wire)
            raise

    def _silence(self, until: Deadline) -> LiteCallError:
        pid = "" if self._record is None else f" {self._record.pid}"
        until.reason = f"process{pid}, which has it open, does not answer: busy, or stopped"
        return LiteCallError(grpc.StatusCode.DEADLINE_EXCEEDED, until.reason)

    def _drop(self, wire: Wire) -> None:
        if self._turn.wire is wire:
            self._turn.wire = None
        wire.hang_up()
        wire.close()

    def _give_back(self, wire: Wire) -> None:
        if len(self._idle) < _MOST_IDLE_WIRES:
            self._idle.append(wire)
        else:
            self._drop(wire)

    # ------------------------------------------------------------------------------------------ which process serves it

    def _connect(self, until: Deadline) -> Wire:
        """A new connection to the process that serves the file, which may become this one."""
        locked_since = time.monotonic()
        while True:
            server = self._server
            record = None if server else read_record(self._path)
            try:
                if server is not None:
                    return Wire.dial(server.address, server.secret, until.left)
                if record is not None and record.is_reachable:
                    wire = Wire.dial(record.address, bytes.fromhex(record.secret), until.left)
                    self._record = record
                    return wire
            except TimeoutError as error:
                self._record = record
                raise self._silence(until) from error
            except OSError as error:
                until.reason = str(error)
            if self._serve():
                continue
            if record is not None and record.state in (OPENING, CLOSING):  # waiting helps
                if until.left <= 0:
                    until.reason = f"process {record.pid} is {record.state} it"
                    raise LiteCallError(grpc.StatusCode.DEADLINE_EXCEEDED, until.reason)
            elif time.monotonic() - locked_since > min(_GRACE_SECONDS, until.left):
                raise LiteCallError.of(self._locked(record))
            time.sleep(0.02)

    def _serve(self) -> bool:
        """Serve the file from this process, unless another has it open."""
        with self.electing:
            if self._server is not None:
                return True
            try:
                self._server = LiteServer.start(self._path)
            except StoreError as error:
                raise LiteCallError.of(error) from error
            except OSError as error:
                reason = StoreError(f"cannot open {self._path}: {error.strerror or error}")
                raise LiteCallError.of(reason) from error
            return self._server is not None

    def _locked(self, record: Record | None) -> StoreLockedError:
        if record is None:
            holder = f"another user, or by a program that does not share it (lsof {self._path}/LOCK lists it)"
        else:
            holder = f"process {record.pid} on {record.host}, which cannot be reached from here (another container?)"
        return StoreLockedError(
            f"{self._path} is open in another process, and cannot be shared with it: it is held by {holder}. "
            "Close it there, or let both use a Milvus server"
        )

    # ------------------------------------------------------------------------------------------ the end

    def close(self) -> None:
        """Stop serving, so that another process can take over."""
        while self._idle:
            self._drop(self._idle.pop())
        with self.electing:
            server, self._server = self._server, None
        if server is not None:
            server.close()

    def forget(self) -> None:
        """In a forked child: drop the parent's connections; the parent goes on serving."""
        for wire in [*self._idle, *([self._turn.wire] if self._turn.wire else [])]:
            wire.close()
        server, self._server = self._server, None
        self._reset()
        if server is not None:
            server.forget()


class LiteFiles:
    """The Milvus Lite files that stores of this process have open."""

    def __init__(self) -> None:
        self._files: dict[str, LiteFile] = {}
        self._users: Counter[str] = Counter()
        self._lock = threading.Lock()

    def enter(self, path: str) -> LiteFile:
        """Return the file, and count one more store that uses it."""
        with self._lock:
            self._users[path] += 1
            return self._files.setdefault(path, LiteFile(Path(path)))

    def leave(self, path: str) -> None:
        """Count one store less; the file is closed after the last."""
        with self._lock:
            self._users[path] -= 1
            if self._users[path]:
                return
            del self._users[path]
            file = self._files.pop(path)
        file.close()

    def close(self) -> None:
        """Close all files, at the end of the process."""
        for file in list(self._files.values()):
            file.close()

    def before_fork(self) -> None:
        """Wait until no file is being opened: a child would inherit its locks."""
        self._lock.acquire()
        for file in self._files.values():
            file.electing.acquire()

    def after_fork(self) -> None:
        """Go on in the parent."""
        for file in self._files.values():
            file.electing.release()
        self._lock.release()

    def forget(self) -> None:
        """In a forked child: keep the stores, and leave the files to the parent."""
        self._lock = threading.Lock()
        for file in self._files.values():
            file.forget()


LITE_FILES = LiteFiles()
atexit.register(LITE_FILES.close)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=LITE_FILES.before_fork, after_in_parent=LITE_FILES.after_fork, after_in_child=LITE_FILES.forget
    )


# ------------------------------------------------------------------------------------------ pymilvus' side


class LiteChannel:
    """The part of a gRPC channel that pymilvus uses; sends requests to a `LiteFile`."""

    def __init__(self, file: LiteFile, timeout: float) -> None:
        self._file, self._timeout = file, timeout

    def unary_unary(
        self,
        method: str,
        request_serializer: Callable[[Any], bytes],
        response_deserializer: Callable[[bytes], Any],
        _registered_method: bool = False,
    ) -> _Call:
        """Return a callable that sends one kind of request."""

        def call(request: Any, timeout: float | None = None, metadata: Any = None) -> Any:
            header = {"method": method, "metadata": [[str(key), str(value)] for key, value in metadata or ()]}
            with deadline(timeout or self._timeout):
                answer, body = self._file.ask(header, request_serializer(request))
            if "refused" in answer:
                raise LiteCallError.of(StoreError(str(answer["refused"])), grpc.StatusCode.INVALID_ARGUMENT)
            code = grpc.StatusCode[answer.get("code", "UNKNOWN")]
            if code is not grpc.StatusCode.OK:
                raise LiteCallError(code, str(answer.get("details", "")))
            return response_deserializer(body)

        return _Call(call)

    def unary_stream(self, *_: Any, **__: Any) -> None:
        """Milvus Lite has no requests of this kind."""

    stream_unary = stream_stream = unary_stream

    def close(self) -> None:
        """The connections belong to the file."""


class _Call:
    """One kind of request, as gRPC's stubs call it."""

    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call

    def __call__(self, request: Any, timeout: float | None = None, metadata: Any = None, **_: Any) -> Any:
        return self._call(request, timeout, metadata)

    def with_call(self, request: Any, **options: Any) -> tuple[Any, _Answer]:
        answer = _Answer(self(request, **options))
        return answer.result(), answer

    def future(self, request: Any, **options: Any) -> Any:
        try:
            return _Answer(self(request, **options))
        except LiteCallError as error:
            return error


class _Answer:
    """A call that is done."""

    def __init__(self, result: Any) -> None:
        self._result = result

    def result(self, timeout: float | None = None) -> Any:
        return self._result
