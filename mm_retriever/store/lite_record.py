"""How the processes of one user find the one that has a Milvus Lite file open: a record in the file, and a socket.

Owns what the record says, who may have written it, and where the socket is.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import stat
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from mm_retriever.files import write_atomically
from mm_retriever.store.lite_wire import Address

logger = logging.getLogger(__name__)

RECORD = "served-by.json"
"""Name of the record in the folder of a Milvus Lite file."""

OPENING, SERVING, CLOSING = "opening", "serving", "closing"

FOLDER_PREFIX = "mm_retriever-"
"""Of the temporary folders that hold sockets and copies."""

_LONGEST_SOCKET_PATH = 100  # bytes; kernels take 103 or 107
_MOST_RECORD = 4096


@dataclass(frozen=True)
class Record:
    """Which process has a Milvus Lite file open, and how the others reach it.

    Attributes:
        state: OPENING, SERVING or CLOSING.
        device: with `inode`, the folder that is open: the record in a copy of the folder says nothing of the copy.
        address: where the process serves; "" while it does not.
        secret: what both sides must know, in hexadecimal digits.
    """

    state: str
    pid: int
    host: str
    device: int
    inode: int
    address: Address = ""
    secret: str = ""

    @classmethod
    def of_this_process(cls, state: str, folder: tuple[int, int], address: Address = "", secret: bytes = b"") -> Record:
        """Return the record of a folder (device and inode) that this process has open."""
        return cls(state, os.getpid(), socket.gethostname(), *folder, address, secret.hex())

    def write(self, path: Path) -> None:
        """Replace the record; only the user may read it."""
        write_atomically(path / RECORD, json.dumps(asdict(self)).encode(), mode=0o600)

    @property
    def is_reachable(self) -> bool:
        """Whether it serves at a place where only this user can listen."""
        if self.state != SERVING or self.host != socket.gethostname():
            return False
        if not isinstance(self.address, str):
            return self.address[0] == "127.0.0.1"
        place = Path(self.address)
        try:
            folder, listening = os.lstat(place.parent), os.lstat(place)
        except (OSError, ValueError):
            return False
        private = stat.S_ISDIR(folder.st_mode) and not folder.st_mode & 0o077
        return private and stat.S_ISSOCK(listening.st_mode) and {folder.st_uid, listening.st_uid} == {os.geteuid()}


def read_record(path: Path) -> Record | None:
    """Return the record of a Milvus Lite file; None if there is none that this user wrote for this very folder."""
    try:
        descriptor = os.open(path / RECORD, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    with os.fdopen(descriptor, "rb") as file:
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
        numbers = (int(fields[name]) for name in ("pid", "device", "inode"))
        pid, device, inode = numbers
        secret = bytes.fromhex(fields["secret"]).hex()
        record = Record(str(fields["state"]), pid, str(fields["host"]), device, inode, address, secret)
        return record if (device, inode) == folder_identity(path) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def remove_record(path: Path) -> None:
    """Remove the record of a file that this process has open."""
    try:
        (path / RECORD).unlink(missing_ok=True)
    except OSError as error:
        logger.debug("%s: the record stays: %s", path, error)


def folder_identity(path: Path) -> tuple[int, int]:
    """Return device and inode of a folder: the same after it was renamed, others after it was replaced."""
    status = path.stat()
    return status.st_dev, status.st_ino


# ------------------------------------------------------------------------------------------ the socket


def listen() -> tuple[socket.socket, Address]:
    """Return a listening socket: in a new folder of this user, or on a loopback port where no folder can be made."""
    for place in dict.fromkeys((os.environ.get("XDG_RUNTIME_DIR"), tempfile.gettempdir(), "/tmp")):  # noqa: S108
        if not place or not Path(place).is_absolute():
            continue
        try:
            folder = Path(tempfile.mkdtemp(prefix=FOLDER_PREFIX, dir=place))  # 0700, under an unpredictable name
        except OSError as error:
            logger.debug("no folder for a socket in %s: %s", place, error)
            continue
        address = str(folder / "socket")
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            if len(os.fsencode(address)) > _LONGEST_SOCKET_PATH:
                raise OSError(f"{address} is too long for a socket")
            listener.bind(address)
            Path(address).chmod(0o600)
            return _listening(listener), address
        except OSError as error:
            logger.debug("no socket at %s: %s", address, error)
            listener.close()
            remove_socket(address)
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.bind(("127.0.0.1", 0))
    host, port = listener.getsockname()
    return _listening(listener), (host, port)


def _listening(listener: socket.socket) -> socket.socket:
    listener.listen(128)
    listener.setblocking(False)
    return listener


def remove_socket(address: Address) -> None:
    """Remove a socket and the folder that was made for it; anything else is left alone."""
    if not isinstance(address, str) or not Path(address).parent.name.startswith(FOLDER_PREFIX):
        return
    try:
        if stat.S_ISSOCK(os.lstat(address).st_mode):
            Path(address).unlink()
    except OSError as error:
        logger.debug("%s: %s", address, error)
    try:
        Path(address).parent.rmdir()
    except OSError as error:
        logger.debug("%s: %s", address, error)
