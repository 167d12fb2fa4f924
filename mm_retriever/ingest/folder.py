"""The images below a folder, in a fixed order; all other files are counted by type, each with advice.

Opens only files of unknown suffix, to see whether they begin like an image.
"""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias
from urllib.parse import unquote

from mm_retriever.errors import IngestError
from mm_retriever.images import is_image_path
from mm_retriever.images.header import sniff_format
from mm_retriever.images.source import spellings

PATHS_LISTED = 1_000
"""Of each type; all are counted."""

HIDDEN = "hidden"
LINKED = "linked folder"
SPECIAL = "device, pipe or socket"
_NO_SUFFIX = "no suffix"
_LONGEST_SUFFIX = 12

_TYPES = {
    "a camera's raw file: export it as JPEG, TIFF or HEIC": (
        "3fr arw cr2 cr3 crw dcr dng erf fff gpr iiq k25 kdc mef mos mrw nef nrw orf pef raf raw rw2 rwl sr2 srf srw "
        "x3f"
    ),
    "an image format that is not read: convert it to PNG or JPEG": (
        "ai cdr cgm clip cur dcm dds djv djvu dpx emf eps exr hdr icns ico indd j2k jls jp2 jpf jpx jxl jxr kra pcx "
        "pdn pfm psb psd qoi sgi svg svgz tga wmf xcf xbm xpm"
    ),
    "a document: extract its images, or read it with a LlamaIndex reader": (
        "azw3 doc docx epub key mobi numbers odp ods odt pages pdf ppt pptx ps rtf xls xlsx"
    ),
    "a video: extract frames from it": (
        "3g2 3gp asf avi flv insv lrv m2ts m4v mkv mov mp4 mpe mpeg mpg mts ogv thm ts vob webm wmv"
    ),
    "sound": "aac aif aiff amr flac m4a mid mp3 oga ogg opus wav wma",
    "text or data; columns for images are given as a sidecar": (
        "aae cfg csv htm html ini json jsonl lnk log lrcat md parquet plist pp3 sqlite toml tsv txt url xml xmp "
        "yaml yml"
    ),
    "an archive: unpack it": "7z bz2 cab cbr cbz dmg gz iso rar tar tgz xz zip zst",
    "a program": "apk bat class com css dll exe ipynb jar js msi pkg py pyc sh so",
    "a download or copy that is not finished": "crdownload download part partial tmp",
    "a list of thumbnails, or another file of the system": "db ds_store",
}
_REASONS = {f".{suffix}": reason for reason, suffixes in _TYPES.items() for suffix in suffixes.split()}
_OTHER = "not an image"

Ignore: TypeAlias = Callable[[str, str, str], None]
"""Called with type, reason and path of each file left out."""


@dataclass(frozen=True)
class IgnoredFiles:
    """The files of one type in a folder that were left out."""

    kind: str  # the suffix in small letters, or what they are instead
    count: int
    reason: str  # and what to do
    paths: tuple[str, ...] = ()  # the first thousand


class IgnoredCounts:
    """Counts the files that a walk leaves out.

    Args:
        used: paths of files with another use, such as sidecars, which are not counted.
    """

    def __init__(self, used: Collection[str] = ()) -> None:
        self._used = used
        self._paths: dict[tuple[str, str], list[str]] = {}
        self._counts: Counter[tuple[str, str]] = Counter()

    def __call__(self, kind: str, reason: str, path: str) -> None:
        """Count one file."""
        if path in self._used:
            return
        self._counts[kind, reason] += 1
        paths = self._paths.setdefault((kind, reason), [])
        if len(paths) < PATHS_LISTED:
            paths.append(path)

    def report(self) -> tuple[IgnoredFiles, ...]:
        """Return the counts, the most frequent type first."""
        ordered = sorted(self._counts, key=lambda key: (-self._counts[key], key))
        return tuple(IgnoredFiles(key[0], self._counts[key], key[1], tuple(self._paths[key])) for key in ordered)


def not_counted(kind: str, reason: str, path: str) -> None:
    """Ignore a file without counting it."""


def why_ignored(path: str) -> tuple[str, str] | None:
    """Return type and reason of a file without an image suffix; None if it begins like an image.

    Files of well-known types are not opened.
    """
    suffix = os.path.splitext(path)[1].lower()  # noqa: PTH122 - ten times Path's speed
    kind = suffix if suffix and len(suffix) <= _LONGEST_SUFFIX else _NO_SUFFIX
    if suffix in _REASONS:
        return kind, _REASONS[suffix]
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # noqa: PTH116 - opening a device can already do something
            return SPECIAL, "not a file"
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        try:
            start = os.read(descriptor, 64)
        finally:
            os.close(descriptor)
    except OSError as error:
        return kind, f"cannot be read: {error.strerror or error}".lower()
    return None if sniff_format(start) else (kind, _OTHER)


Skip: TypeAlias = Callable[[str, str], None]
"""Called with the name of an item that cannot be ingested, and the reason."""


def local_path(place: str) -> str:
    """Return the path that a `file:` URL of this machine names; any other text stays as it is."""
    if place[:7].lower() != "file://":
        return place
    host, _, path = place[7:].partition("/")
    if host.lower() not in ("", "localhost") or not path:
        return place
    path = unquote(path, errors="surrogateescape")
    return path if os.name == "nt" and path[1:2] == ":" else f"/{path}"


def given_path(given: str | os.PathLike[str]) -> str:
    """Return a path as Python's functions take it, from one that may be a `file:` URL or begin with `~`."""
    return os.path.expanduser(local_path(os.fspath(given)))  # noqa: PTH111 - Path's fails for an unknown user


def existing_path(given: str | os.PathLike[str]) -> Path | None:
    """Return a path as the disk spells it, in composed or decomposed letters; None if nothing is there."""
    text = given_path(given)
    for path in map(Path, spellings(text)):
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

    Hidden files and folders are left out. Links to files are followed. Links to folders are followed once, after the
    contents of the folder itself, so that no path depends on which links exist. A folder that was walked already, or
    that contains this one, is not walked again.
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
    except OSError:  # a stale mount; opening the file will report it
        return "file"


def _identity(folder: str) -> tuple[int, int] | None:
    try:
        status = os.stat(folder)  # noqa: PTH116 - ten times Path's speed
    except OSError:
        return None
    return (status.st_dev, status.st_ino) if status.st_ino else None
