"""What `mm-retriever index` is given: folders and single images, each looked at before a model is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

from mm_retriever.errors import QueryError, one_line

_BEGINNING = 512  # bytes of a file, which tell its format
Part: TypeAlias = Path | list[str]
"""A folder, or the single images."""


def named_parts(sources: Sequence[Path], *, prune: bool) -> list[Part]:
    """Return the folders, and the single images together, so that no image is indexed twice.

    An image has the label of the folder that it is found in: in two of them it would change with every run.

    Args:
        sources: as they were given.
        prune: whether a folder may be gone, so that its rows go too.

    Raises:
        QueryError: one that does not exist, that holds or is no image, or that lies in another.
    """
    from mm_retriever.ingest.sources import missing_folder

    folders: list[Path] = []
    files: list[Path] = []
    for source in sources:
        if missing_folder(source) is not None:
            if not prune:
                raise QueryError(f"there is no file or folder {str(source)!r}")
            folders.append(source)
        elif source.is_file():
            files.append(source)
        else:
            folders.append(source)
    if files and prune:
        raise QueryError(f"--prune goes with folders, not with single images such as {str(files[0])!r}")
    _refuse_twice(folders, files)
    for folder in () if prune else folders:
        _refuse_imageless(folder)
    _refuse_no_images(files)
    return [*folders, *([[str(file) for file in files]] if files else [])]


def _refuse_twice(folders: Sequence[Path], files: Sequence[Path]) -> None:
    real = {folder.resolve(): folder for folder in folders}
    seen: set[Path] = set()
    for source in (*folders, *files):
        place = source.resolve()
        inside = next((real[parent] for parent in place.parents if parent in real), None)
        if inside is not None:
            raise QueryError(f"{str(source)!r} is in {str(inside)!r}, which is named too: name it once")
        if place in seen:
            raise QueryError(f"{str(source)!r} is named twice")
        seen.add(place)


def _refuse_imageless(folder: Path) -> None:
    """Say what a folder holds in which there is no image; the walk ends at the first one."""
    from mm_retriever.ingest.folder import walk
    from mm_retriever.ingest.ignored import IgnoredCounts

    ignored = IgnoredCounts()
    unread: list[str] = []
    if next(walk(str(folder.resolve()), lambda name, reason: unread.append(reason), ignored), None) is not None:
        return
    kinds = [f"{kind.count} {one_line(kind.kind, 40)} ({one_line(kind.reason, 100)})" for kind in ignored.report()[:3]]
    held = "; ".join([*unread[:1], *kinds]) or "it is empty"
    raise QueryError(f"there is no image in {str(folder)!r}: {held}")


def _refuse_no_images(files: Sequence[Path]) -> None:
    """Refuse files of which not one begins as an image does; beside images, the report names what is left out."""
    from mm_retriever.images.header import FORMATS, sniff_format

    for file in files:
        with file.open("rb") as opened:
            if sniff_format(opened.read(_BEGINNING)) is not None:
                return
    if files:
        more = f" and {len(files) - 1} more" if len(files) > 1 else ""
        raise QueryError(f"{str(files[0])!r}{more}: no image; there are {', '.join(FORMATS)}")
