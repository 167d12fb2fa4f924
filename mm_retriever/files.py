"""Files replaced in one step, and files and folders that are on the disk before a call returns."""

from __future__ import annotations

import os
import secrets
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


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
