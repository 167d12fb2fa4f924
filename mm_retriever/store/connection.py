"""Where Milvus is, and what its failures mean.

Owns the rules for URIs, and the one translation of what pymilvus and gRPC raise into our errors. Knows nothing of
collections and rows.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import grpc
from pymilvus import MilvusClient
from pymilvus.exceptions import MilvusException

from mm_retriever.errors import StoreError, StoreUnavailableError, one_line
from mm_retriever.store.channel import Deadline, deadline, open_channel
from mm_retriever.store.lite_channel import LITE_FILES, LiteCallError, LiteChannel, LiteFile
from mm_retriever.store.lite_files import lite_path
from mm_retriever.store.lite_server import HANDLING

_SERVER_URI = re.compile(r"(?:https?|tcp)://.+|unix:.+", re.IGNORECASE)
_CREDENTIALS = re.compile(r"(//)[^/@]*@")
_ANY_SOCKET = "unix:"  # pymilvus wants an address; requests go through the channel that it is given
_AWAY = (2, grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)


class _TimeOverError(Exception):
    """A request did not end by its deadline."""


class Connection:
    """One connection to Milvus, dedicated to one store.

    Attributes:
        client: what requests go through, inside `request`.
        lite_path: absolute path of the Milvus Lite file, None for a server.
        where: the place, for people: a path, or a URI without credentials.
        timeout: seconds for one request.
    """

    def __init__(self, uri: str | Path, *, token: str | None, timeout: float) -> None:
        if not timeout > 0:
            raise StoreError(f"timeout {timeout!r}: give seconds above 0")
        place = str(uri)
        self.timeout = timeout
        self.lite_path = None if _SERVER_URI.fullmatch(place) else lite_path(place)
        self.where = self.lite_path or _CREDENTIALS.sub(r"\1", place)
        self._open = True
        self._lite_file: LiteFile | None = None
        with self.request("connecting"), self.deadline():
            self.client = self._lite_client(self.lite_path) if self.lite_path else self._server_client(place, token)

    def _lite_client(self, path: str) -> MilvusClient:
        self._lite_file = LITE_FILES.enter(path)
        try:
            channel = LiteChannel(self._lite_file, self.timeout)
            return MilvusClient(_ANY_SOCKET, timeout=self.timeout, dedicated=True, channel=channel)
        except BaseException:
            LITE_FILES.leave(path)
            raise

    def _server_client(self, uri: str, token: str | None) -> MilvusClient:
        channel = open_channel(uri, self.timeout)
        try:
            return MilvusClient(uri, token=token or "", timeout=self.timeout, dedicated=True, channel=channel)
        except BaseException:
            if channel is not None:
                channel.close()
            raise

    def close(self) -> None:
        """Let go of the connection; a Milvus Lite file is free for other processes when its last store is closed."""
        if self._open:
            self._open = False
            self.client.close()
            if self.lite_path:
                LITE_FILES.leave(self.lite_path)

    def turn(self) -> AbstractContextManager[None]:
        """Let no other request come between those inside, where that is possible: in a Milvus Lite file.

        There, each request takes a turn of its own anyway, whichever process it comes from: Milvus Lite takes one
        writer at a time, and a read that overlaps one may miss rows (it empties its memory to disk in steps).
        """
        return nullcontext() if self._lite_file is None else self._lite_file.turn()

    def deadline(self) -> AbstractContextManager[Deadline]:
        """Let all requests inside end within one timeout."""
        return deadline(self.timeout)

    def ask(self, call: Callable[..., Any], **options: Any) -> Any:
        """Return the answer to one request; a server that is away is asked again until the timeout is over.

        Every request of ours may be sent twice: rows are written and removed by their id.
        """
        with self.deadline() as until:
            try:
                return call(timeout=max(until.left, 0.1), **options)
            except (MilvusException, grpc.RpcError) as error:
                if until.left > 0:
                    raise
                raise _TimeOverError(until.reason or _short(error)) from error

    @contextmanager
    def request(self, doing: str) -> Iterator[None]:
        """Run requests to Milvus: whatever goes wrong becomes one error of ours, and nothing is printed.

        Raises:
            StoreLockedError: a process that does not share it has the Milvus Lite file open.
            StoreUnavailableError: no answer within the timeout.
            StoreError: any other failure.
        """
        if not self._open:
            raise StoreError(f"the store at {self.where} is closed; open it again")
        records: list[logging.LogRecord] = []
        token = _CAPTURED.set(records)
        try:
            yield
        except (MilvusException, grpc.RpcError, grpc.FutureTimeoutError, _TimeOverError) as error:
            raise self._explained(error, doing) from error
        finally:
            _CAPTURED.reset(token)

    def _explained(self, error: Exception, doing: str) -> StoreError:
        call = error if isinstance(error, LiteCallError) else error.__cause__  # pymilvus hides it while it connects
        if isinstance(call, LiteCallError):
            if call.store_error is not None:
                return call.store_error
            error = call
        if _is_away(error):
            return StoreUnavailableError(
                f"no answer from Milvus at {self.where} within {self.timeout:g} s while {doing}: {_short(error)}"
            )
        return StoreError(f"Milvus at {self.where} failed while {doing}: {_short(error)}")


def check_exists(uri: str | Path) -> None:
    """Refuse a Milvus Lite file that is not there, which connecting would make; a server says so itself.

    Raises:
        StoreError: there is none; lists the files beside it.
    """
    place = str(uri)
    if _SERVER_URI.fullmatch(place) or not place.endswith(".db"):
        return
    try:
        path = Path(place).expanduser()
        if path.exists():
            return
    except (OSError, RuntimeError) as error:  # a folder that may not be entered, no such user
        raise StoreError(f"cannot open {place!r}: {getattr(error, 'strerror', None) or error}") from error
    beside: list[str] = []
    with suppress(OSError):
        beside = sorted(one.name for one in path.parent.glob("*.db"))[:20]
    others = f"there are {', '.join(map(repr, beside))} in its folder; or " if beside else ""
    raise StoreError(f"there is no store {place!r}; {others}make it with: mm-retriever index FOLDER --db {place}")


def _is_away(error: BaseException) -> bool:
    if isinstance(error, _TimeOverError | grpc.FutureTimeoutError):
        return True
    return (error.code() if isinstance(error, grpc.RpcError) else getattr(error, "code", None)) in _AWAY


def _short(error: BaseException) -> str:
    if isinstance(error, MilvusException):
        text = error.message
    else:
        text = f"{error.code().name}: {error.details()}" if isinstance(error, grpc.RpcError) else str(error)
    line = one_line(text or type(error).__name__, 100_000)  # an expression comes first, what is wrong with it last
    return line if len(line) <= 400 else f"{line[:150]} ... {line[-250:]}"


_CAPTURED: ContextVar[list[logging.LogRecord] | None] = ContextVar("captured", default=None)


class _Capture(logging.Filter):
    """Keeps what is logged about our own requests for our own error message, which says it once."""

    def filter(self, record: logging.LogRecord) -> bool:
        records = _CAPTURED.get()
        if records is not None:
            records.append(record)
        return records is None


class _WhileHandling(logging.Filter):
    """Drops what Milvus Lite prints about a request that fails in this process: the answer says it too."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not HANDLING.now


for _name in ("pymilvus.decorators", "pymilvus.client.connection_manager", "pymilvus.client.grpc_handler"):
    logging.getLogger(_name).addFilter(_Capture())
logging.getLogger("milvus_lite.adapter.grpc.servicer").addFilter(_WhileHandling())
