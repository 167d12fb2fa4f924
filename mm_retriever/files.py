"""Files replaced in one step, files that only this user can write, and what is on the disk before a call returns."""

from __future__ import annotations

import os
import secrets
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def cache_folder(name: str) -> Path:
    """Return the place of a folder of ours in the user's cache; it need not be there."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mm_retriever" / name


def write_atomically(path: Path, content: bytes, *, mode: int = 0o666, synced: bool = False) -> Path:
    """Return the path of a file whose readers see the old content or all of the new, never a part.

    Args:
        path: the file; its folder exists.
        content: all of it.
        mode: permissions of the new file, less the user's umask.
        synced: return when it is on the disk, rather than some time before a power cut.

    Raises:
        OSError: it cannot be written; what was there stays.
    """
    with drafted(path) as draft, os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
        file.write(content)
        if synced:
            file.flush()
            flush(file.fileno())
    if synced:
        with suppress(OSError):  # some file systems sync no folders
            sync(path.parent)
    return path


@contextmanager
def drafted(path: Path) -> Iterator[Path]:
    """Give the place of a new file, which takes the place of `path` after the block, or goes if the block fails."""
    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        yield draft
        draft.replace(path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


def read_own(path: Path, most: int, *, others_may: int = 0) -> bytes | None:
    """Return the beginning of a file that this user wrote; None where there is none, or it may be another's work.

    Args:
        path: the file; a link to one is none.
        most: bytes that are read.
        others_may: permission bits of group and others that are no reason to distrust it, like 0o044 for reading.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o077 & ~others_may:
            return None
        return file.read(most)


def is_own_socket(place: Path) -> bool:
    """Whether a Unix socket is at a place where only this user can listen."""
    try:
        folder, listening = os.lstat(place.parent), os.lstat(place)
    except (OSError, ValueError):
        return False
    private = stat.S_ISDIR(folder.st_mode) and not folder.st_mode & 0o077
    return private and stat.S_ISSOCK(listening.st_mode) and {folder.st_uid, listening.st_uid} == {os.geteuid()}


def sync(place: Path) -> None:
    """Return when a file, or what a folder lists, is on the disk."""
    descriptor = os.open(place, os.O_RDONLY)
    try:
        flush(descriptor)
    finally:
        os.close(descriptor)


def flush(descriptor: int) -> None:
    """Return when an open file is on the disk."""
    if sys.platform == "darwin":
        import fcntl

        with suppress(OSError):
            fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)  # fsync alone leaves the bytes in the drive
            return
    os.fsync(descriptor)
