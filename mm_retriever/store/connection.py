"""Where Milvus is, and what its failures mean.

Owns the rules for URIs, and the one translation of what pymilvus and gRPC raise into our errors. Of collections
it knows whether they are loaded, and how many rows they have.
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
from pymilvus.client.types import LoadState
from pymilvus.exceptions import MilvusException

from mm_retriever.errors import StoreError, StoreUnavailableError, one_line
from mm_retriever.store.channel import Deadline, deadline, open_channel
from mm_retriever.store.lite_channel import LITE_FILES, LiteCallError, LiteChannel, LiteFile
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
        client: pymilvus' client; requests go through it inside `request`.
        lite_path: absolute path of the Milvus Lite file, None for a server.
        where: the place, for people: a path, or a URI without credentials.
        timeout: seconds for one request.
    """

    def __init__(self, uri: str | Path, *, token: str | None, timeout: float) -> None:
        if not timeout > 0:
            raise StoreError(f"timeout {timeout!r}: give seconds above 0")
        place = str(uri)
        self.timeout = timeout
        self.lite_path = None if _SERVER_URI.fullmatch(place) else _lite_path(place)
        self.where = self.lite_path or _CREDENTIALS.sub(r"\1", place)
        self._open = True
        self._lite_file: LiteFile | None = None
        options: dict[str, Any] = {"timeout": timeout, "dedicated": True}
        with self.request("connecting"), self.deadline():
            if self.lite_path:
                self._lite_file = LITE_FILES.enter(self.lite_path)
                channel: Any = LiteChannel(self._lite_file, timeout)
                options |= {"uri": _ANY_SOCKET}
            else:
                channel = open_channel(place, timeout)
                options |= {"uri": place, "token": token or ""}
            try:
                self.client = MilvusClient(channel=channel, **options)
            except BaseException:
                if channel is not None:
                    channel.close()
                if self.lite_path:
                    LITE_FILES.leave(self.lite_path)
                raise

    def close(self) -> None:
        """Let go of the connection; a Milvus Lite file is free for other processes when its last store is closed."""
        if self._open:
            self._open = False
            self.client.close()
            if self.lite_path:
                LITE_FILES.leave(self.lite_path)

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def turn(self) -> AbstractContextManager[None]:
        """Hold off all other requests while those inside run; only a Milvus Lite file can do that.

        A Milvus Lite file runs one request at a time, whichever process it comes from: it takes one writer at a time,
        and a read that overlaps a write may miss rows, because memory is emptied to disk in steps.
        """
        return nullcontext() if self._lite_file is None else self._lite_file.turn()

    def deadline(self) -> AbstractContextManager[Deadline]:
        """Give all requests inside one timeout together."""
        return deadline(self.timeout)

    def ask(self, call: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """Return the answer to one request; it is sent again until the timeout while the server is unreachable.

        Sending a request twice is safe: rows are written and removed by their id.
        """
        with self.deadline() as until:
            try:
                return call(*arguments, timeout=max(until.left, 0.1), **options)
            except (MilvusException, grpc.RpcError) as error:
                if until.left > 0:
                    raise
                raise _TimeOverError(until.reason or _short(error)) from error

    def is_loaded(self, name: str) -> bool:
        """Whether rows of a collection can be read as it is; a Milvus Lite file loads it when it is asked."""
        return self.lite_path is not None or self.ask(self.client.get_load_state, name)["state"] == LoadState.Loaded

    def count(self, name: str) -> int:
        """Return the number of rows of a collection, of one that a server has not loaded about: nothing is loaded."""
        if self.lite_path is not None or not self.is_loaded(name):
            return int(self.ask(self.client.get_collection_stats, name)["row_count"])
        # a server's statistics lack rows just stored, and have those that were removed or replaced
        count = {"output_fields": ["count(*)"], "consistency_level": "Strong"}
        return int(self.ask(self.client.query, name, filter="", **count)[0]["count(*)"])

    def check_version(self, first: tuple[int, int], feature: str) -> None:
        """Refuse a feature that needs a later version than the server's."""
        answer = str(self.ask(self.client.get_server_version))
        version = re.match(r"v?(\d+)\.(\d+)", answer)
        if version and (int(version[1]), int(version[2])) < first:
            needed = ".".join(map(str, first))
            raise StoreError(f"{self.where} is Milvus {answer.lstrip('v')}; {feature} needs {needed} or later")

    @contextmanager
    def request(self, doing: str) -> Iterator[None]:
        """Run requests to Milvus: every failure becomes a `StoreError`, and pymilvus prints nothing.

        Raises:
            StoreLockedError: a process that does not share the Milvus Lite file has it open.
            StoreUnavailableError: no answer within the timeout.
            StoreError: any other failure.
        """
        if not self._open:
            raise StoreError(f"the store at {self.where} is closed; open it again")
        token = _OURS.set(True)
        try:
            yield
        except (MilvusException, grpc.RpcError, grpc.FutureTimeoutError, _TimeOverError) as error:
            raise self._explained(error, doing) from error
        finally:
            _OURS.reset(token)

    def _explained(self, error: Exception, doing: str) -> StoreError:
        call = error if isinstance(error, LiteCallError) else error.__cause__  # pymilvus hides it while it connects
        if isinstance(call, LiteCallError):
            if call.store_error is not None:
                return call.store_error
            error = call
        code = error.code() if isinstance(error, grpc.RpcError) else getattr(error, "code", None)
        if isinstance(error, _TimeOverError | grpc.FutureTimeoutError) or code in _AWAY:
            return StoreUnavailableError(
                f"no answer from Milvus at {self.where} within {self.timeout:g} s while {doing}: {_short(error)}"
            )
        return StoreError(f"Milvus at {self.where} failed while {doing}: {_short(error)}")


def is_server(uri: str | Path) -> bool:
    """Whether a URI is that of a server, rather than of a Milvus Lite file."""
    return _SERVER_URI.fullmatch(str(uri)) is not None


def check_exists(uri: str | Path) -> None:
    """Refuse a missing Milvus Lite file, which connecting would create; servers are not checked.

    Raises:
        StoreError: the file is missing; lists the files beside it.
    """
    place = str(uri)
    if _SERVER_URI.fullmatch(place) or not place.endswith(".db") or "://" in place:
        return
    try:
        path = Path(place).expanduser()
        if path.exists():
            return
    except (OSError, RuntimeError) as error:
        raise _cannot_open(place, error) from error
    beside: list[str] = []
    with suppress(OSError):
        beside = sorted(other.name for other in path.parent.glob("*.db"))[:20]
    others = f"there are {', '.join(map(repr, beside))} in its folder; or " if beside else ""
    raise StoreError(f"there is no store {place!r}; {others}make it with: mm-retriever index FOLDER --db {place}")


def _lite_path(place: str) -> str:
    """The absolute path of a Milvus Lite file, which is a folder; the folder above it is made."""
    if "\0" in place:
        raise StoreError("a path holds no NUL byte")
    if not place.endswith(".db"):
        raise StoreError(
            f"{place!r} is neither a server (http://, https://, tcp://, unix:) nor a Milvus Lite file: Milvus knows "
            f"its files by a name that ends in '.db', in small letters; try {place.rstrip('/') + '.db'!r}"
        )
    if "://" in place:  # a path to Python, below the working directory
        raise StoreError(
            f"{place!r} is neither a server (http://, https://, tcp://, unix:) nor the path of a Milvus Lite file: "
            "give that without a scheme"
        )
    try:
        path = Path(place).expanduser().resolve()
        is_file = path.is_file()
    except (OSError, RuntimeError) as error:
        raise _cannot_open(place, error) from error
    if is_file:
        raise StoreError(f"{path} is a file, as Milvus Lite 2 wrote it; Milvus Lite 3 keeps a folder: index anew")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(f"cannot make the folder of {path}: {error.strerror or error}") from error
    return str(path)


def _cannot_open(place: str, error: Exception) -> StoreError:
    """The error for a folder without permission, links in a circle, or an unknown user after `~`."""
    return StoreError(f"cannot open {place!r}: {getattr(error, 'strerror', None) or error}")


def _short(error: BaseException) -> str:
    if isinstance(error, MilvusException):
        text = error.message
    else:
        text = f"{error.code().name}: {error.details()}" if isinstance(error, grpc.RpcError) else str(error)
    line = one_line(text or type(error).__name__, 100_000)  # an expression comes first, what is wrong with it last
    return line if len(line) <= 400 else f"{line[:150]} ... {line[-250:]}"


_OURS: ContextVar[bool] = ContextVar("ours", default=False)


def _is_not_ours(_: logging.LogRecord) -> bool:
    """Drop what is logged about our own requests: our error says it once."""
    return not _OURS.get()


def _is_not_handled_here(_: logging.LogRecord) -> bool:
    """Drop what Milvus Lite logs about a request that fails in this process: the answer says it too."""
    return not HANDLING.now


for _name in ("pymilvus.decorators", "pymilvus.client.connection_manager", "pymilvus.client.grpc_handler"):
    logging.getLogger(_name).addFilter(_is_not_ours)
logging.getLogger("milvus_lite.adapter.grpc.servicer").addFilter(_is_not_handled_here)
