"""The images below a folder, in a fixed order; everything else in it is reported.

Opens only files whose suffix says nothing, to see whether they begin like an image.
"""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeAlias

from mm_retriever.errors import IngestError
from mm_retriever.images import is_image_path
from mm_retriever.ingest.ignored import HIDDEN, LINKED, Ignore, not_counted, why_ignored

Skip: TypeAlias = Callable[[str, str], None]
"""Called with the name of what cannot be ingested, and the reason."""


def existing_path(given: str | os.PathLike[str]) -> Path | None:
    """Return a path as the disk has it, in composed or decomposed letters; None if nothing is there."""
    text = os.path.expanduser(os.fspath(given))  # noqa: PTH111 - Path's fails for an unknown user
    for path in map(Path, dict.fromkeys([text, *(unicodedata.normalize(form, text) for form in ("NFC", "NFD"))])):
        try:
            path.stat()
        except (FileNotFoundError, NotADirectoryError):
            continue
        except (OSError, ValueError) as error:
            raise IngestError(f"cannot read {text!r}: {getattr(error, 'strerror', None) or error}") from error
        return path
    return None


def walk(folder: str, skip: Skip, ignore: Ignore = not_counted) -> Iterator[str]:
    """Yield the images below a folder, sorted by name; memory holds the names of one branch.

    Hidden files and folders are left out. Links to files are followed. Links to folders are followed once, after
    everything in the folder itself, so that no path depends on which links exist: a folder that was walked already,
    or that contains this one, is not walked again.
    """
    walked: set[tuple[int, int]] = set()
    links: list[str] = []
    yield from _walk(folder, walked, links, skip, ignore)
    parents = {identity for parent in Path(folder).parents if (identity := _identity(str(parent)))}
    while links:
        links.sort(reverse=True)
        link = links.pop()
        if _identity(link) in parents:
            ignore(LINKED, "a link to a folder that contains this one", link)
        else:
            yield from _walk(link, walked, links, skip, ignore)


def _walk(folder: str, walked: set[tuple[int, int]], links: list[str], skip: Skip, ignore: Ignore) -> Iterator[str]:
    stack = [(folder, "folder")]  # not recursion: folders are deeper than Python's stack
    while stack:
        path, kind = stack.pop()
        if kind == "folder":
            stack += _entries(path, walked, skip, ignore)
        elif kind == "link":
            links.append(path)
        elif is_image_path(path) or (why := why_ignored(path)) is None:
            yield path
        else:
            ignore(*why, path)


def _entries(folder: str, walked: set[tuple[int, int]], skip: Skip, ignore: Ignore) -> list[tuple[str, str]]:
    """The paths in a folder, last name first, each with "folder", "link" (to a folder) or "file"."""
    identity = _identity(folder)
    if identity in walked:
        ignore(LINKED, "walked already, under another name", folder)
        return []
    if identity is not None:
        walked.add(identity)
    entries = []
    try:
        with os.scandir(folder) as listing:
            for entry in listing:
                if entry.name.startswith("."):
                    ignore(HIDDEN, "its name begins with a dot", entry.path)
                else:
                    entries.append((entry.path, _kind(entry)))
    except OSError as error:
        skip(folder, f"cannot read the folder: {error.strerror or error}")
        return []
    return sorted(entries, reverse=True)


def _kind(entry: os.DirEntry[str]) -> str:
    try:
        if entry.is_dir(follow_symlinks=False):
            return "folder"
        return "link" if entry.is_symlink() and entry.is_dir() else "file"
    except OSError:  # a stale mount; whoever opens the file says so
        return "file"


def _identity(folder: str) -> tuple[int, int] | None:
    try:
        status = os.stat(folder)  # noqa: PTH116 - ten times Path's speed
    except OSError:
        return None
    return (status.st_dev, status.st_ino) if status.st_ino else None
