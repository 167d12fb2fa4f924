"""Images in file systems of fsspec (S3, GCS, memory): their stamps, and the file system that a document came from.

fsspec has no public way to strip the protocol from a path, which ids need, and none to list open file systems; hence
`_strip_protocol` and `_cache`.
"""

from __future__ import annotations

import datetime
import time
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from llama_index.core.schema import BaseNode

from mm_retriever.errors import NodeError
from mm_retriever.images import is_image_path
from mm_retriever.ingest.folder import Ignore


class RemoteFile:
    """A file that the first read opens and its end closes; for one thread."""

    def __init__(self, file_system: Any, path: str) -> None:
        self._file_system, self._path = file_system, str(file_system._strip_protocol(path))
        self._file: Any = None
        self.name = str(file_system.unstrip_protocol(self._path))

    def read(self, size: int = -1) -> bytes:
        """Return the next bytes; none at the end."""
        if self._file is None:
            self._file = self._file_system.open(self._path, "rb")
        data = bytes(self._file.read(size))
        if not data or size < 0:
            self._file.close()
            self._file = None
        return data

    def stamp(self) -> dict[str, int]:
        """Return size and time of the file: equal stamps, equal contents. A file without a time is always new."""
        facts = self._file_system.info(self._path)
        names = ("mtime", "LastModified", "updated", "last_modified", "created", "ETag")
        changed = next((facts[name] for name in names if facts.get(name) is not None), None)
        return {"bytes": int(facts.get("size") or 0), "mtime_ns": _nanoseconds(changed)}


def remote(file_system: Any | None) -> Any | None:
    """Return the file system, None for this machine's own, which `fsspec.core.url_to_fs` returns for plain paths."""
    if file_system is None:
        return None
    from fsspec.implementations.local import LocalFileSystem

    return None if isinstance(file_system, LocalFileSystem) else file_system


def files_below(file_system: Any, path: str, ignore: Ignore) -> Iterator[str]:
    """Yield the files with image suffixes below a folder, sorted; the path itself if it is not a folder."""
    if not file_system.isdir(path):
        yield path
        return
    for file in sorted(file_system.find(path)):
        if is_image_path(file):
            yield file
        else:
            ignore(PurePosixPath(file).suffix.lower() or "no suffix", "not an image by its suffix", file)


def file_of_node(node: BaseNode, path: str) -> RemoteFile | None:
    """Return the file of a node in the file system from which a reader read it; None for a local file.

    A reader does not note the file system. So the file is looked up, by path and, if noted, size, in all file systems
    that are open in this process.

    Raises:
        NodeError: several file systems have it.
    """
    size = node.metadata.get("file_size")
    try:
        if size in (None, Path(path).stat().st_size):
            return None
    except (OSError, ValueError):
        pass
    holders = [file_system for file_system in _open_file_systems() if _has(file_system, path, size)]
    if len(holders) > 1:
        names = ", ".join(sorted(str(file_system.unstrip_protocol(path)) for file_system in holders))
        raise NodeError(f"its file {path!r} is in several file systems ({names}): give the right one as fs=")
    return RemoteFile(holders[0], path) if holders else None


def _open_file_systems() -> Iterator[Any]:
    from fsspec import AbstractFileSystem
    from fsspec.implementations.local import LocalFileSystem

    kinds = [AbstractFileSystem]
    while kinds:
        kind = kinds.pop()
        kinds += kind.__subclasses__()
        if not issubclass(kind, LocalFileSystem):
            yield from list(kind._cache.values())


def _has(file_system: Any, path: str, size: Any) -> bool:
    try:
        facts = file_system.info(path)
    except Exception:  # file systems raise anything for paths that they cannot have
        return False
    return facts.get("type") == "file" and size in (None, facts.get("size"))


def _nanoseconds(changed: Any) -> int:
    if isinstance(changed, datetime.datetime):
        return int(changed.timestamp() * 1e9)
    if isinstance(changed, int | float):
        return int(changed * 1e9)
    return time.time_ns() if changed is None else zlib.crc32(str(changed).encode())
