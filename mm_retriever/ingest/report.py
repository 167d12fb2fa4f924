"""The reports of ingestion and reindexing, progress, and stopping."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

from tqdm import tqdm

from mm_retriever.errors import IngestError
from mm_retriever.files import write_atomically
from mm_retriever.ingest.folder import PATHS_LISTED, IgnoredFiles
from mm_retriever.notebook import shown_facts


@dataclass(frozen=True)
class SkippedImage:
    """An image or document that was not stored, by path, URL or node id, and the reason."""

    path: str
    reason: str


@dataclass(frozen=True)
class IngestReport:
    """The result of `ingest_images`."""

    indexed: int  # new in the store
    replaced: int  # changed since they were stored, embedded again
    updated: int  # the same images with other metadata; stored again, not embedded again
    unchanged: int
    removed: int  # rows whose file is gone or spoiled (`prune=True` only)
    skipped: tuple[SkippedImage, ...]
    seconds: float  # of the whole call
    ignored: tuple[IgnoredFiles, ...] = ()  # what the folder holds beside images
    unused_rows: int = 0  # rows of the sidecar that match no image
    notes: tuple[str, ...] = ()  # everything else that should be known, a line each
    moved: int = 0  # rows whose file is gone and was found under another name or URL; they keep vector and metadata
    reused: int = 0  # new or changed ones of whose contents the store had a vector
    kept: int = 0  # rows that pruning left alone because their files cannot be looked at or read now

    @property
    def embedded(self) -> int:
        """The number that went through the model: 0 in a second run."""
        return self.indexed + self.replaced - self.reused

    @property
    def images_per_second(self) -> float:
        """Embedded images and texts per second of the whole call."""
        return self.embedded / self.seconds if self.seconds > 0 else 0.0

    pictures_per_second = images_per_second
    """The earlier name."""

    @classmethod
    def of_parts(cls, parts: Sequence[IngestReport]) -> IngestReport:
        """Return the report of several calls as one."""
        if len(parts) == 1:
            return parts[0]
        numbers = ("indexed", "replaced", "updated", "unchanged", "removed", "unused_rows", "moved", "reused", "kept")
        ignored: dict[tuple[str, str], IgnoredFiles] = {}
        for files in (files for part in parts for files in part.ignored):
            known = ignored.get((files.kind, files.reason), IgnoredFiles(files.kind, 0, files.reason))
            paths = (*known.paths, *files.paths)[:PATHS_LISTED]
            ignored[files.kind, files.reason] = replace(known, count=known.count + files.count, paths=paths)
        return cls(
            **{name: sum(getattr(part, name) for part in parts) for name in numbers},
            skipped=tuple(image for part in parts for image in part.skipped),
            seconds=sum(part.seconds for part in parts),
            ignored=tuple(sorted(ignored.values(), key=lambda files: -files.count)),
            notes=tuple(dict.fromkeys(note for part in parts for note in part.notes)),
        )

    def __str__(self) -> str:
        counts = ("indexed", "replaced", "moved", "updated", "unchanged", "removed")
        parts = [f"{getattr(self, name)} {name}" for name in counts if name == "indexed" or getattr(self, name)]
        others = {
            "of them copies of known files": self.reused,
            "kept that cannot be looked at or read": self.kept,
            "skipped": len(self.skipped),
            "ignored": sum(files.count for files in self.ignored),
            "sidecar rows unused": self.unused_rows,
        }
        parts += [f"{count} {name}" for name, count in others.items() if count]
        return f"{', '.join(parts)} in {self.seconds:.1f} s ({self.images_per_second:.1f} images/s)"

    def _repr_html_(self) -> str:
        left_out = (f"{image.path}: {image.reason}" for image in self.skipped)
        not_taken = (f"{files.count} {files.kind}: {files.reason}" for files in self.ignored)
        return shown_facts(str(self), {}, [*self.notes, *left_out, *not_taken])

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON takes it."""
        return {**asdict(self), "embedded": self.embedded, "images_per_second": self.images_per_second}

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write the report as JSON; a reader sees the old file or the whole new one.

        Raises:
            IngestError: it cannot be written; the message holds the report.
        """
        target = Path(os.path.expanduser(path))  # noqa: PTH111
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(target, (json.dumps(self.to_dict(), indent=2) + "\n").encode())
        except OSError as error:
            reason = error.strerror or error
            raise IngestError(f"{self}; but the report cannot be written to {str(target)!r}: {reason}") from error


@dataclass(frozen=True)
class ReindexReport:
    """The result of `reindex`."""

    collection: str
    model: str  # that it has now, for people
    before: str  # that it had
    rows: int  # that it has now
    seconds: float
    embedded: int = 0
    reused: int = 0  # embedded by an earlier run that did not come to its end
    changed: int = 0  # whose image is not the one that was indexed: the vector is that of the image as it is now
    dropped: tuple[SkippedImage, ...] = ()  # rows that are gone, because their image cannot be read
    already: bool = False  # the collection had this model: nothing was done

    def __str__(self) -> str:
        if self.already:
            return f"{self.collection!r} has vectors of {self.model} already: nothing to do"
        others = {
            "from an earlier run": self.reused,
            "of them changed since they were indexed (index them again for the rest of their metadata)": self.changed,
            "dropped": len(self.dropped),
        }
        parts = [f"{self.embedded} rows embedded", *(f"{count} {name}" for name, count in others.items() if count)]
        rate = self.embedded / self.seconds if self.seconds > 0 else 0.0
        now = f"{self.collection!r} has {self.rows} rows of {self.model} now, in place of {self.before}"
        return f"{', '.join(parts)} in {self.seconds:.1f} s ({rate:.1f} rows/s); {now}"

    def _repr_html_(self) -> str:
        return shown_facts(str(self), {}, [f"{image.path}: {image.reason}" for image in self.dropped])

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON takes it."""
        return asdict(self)


Progress: TypeAlias = Callable[[int, int | None], bool]
"""Called with the number done and the total; it may wait. False ends the run."""

STOPPED = "stopped before its end: the same call goes on from there"


class Meter:
    """Counts finished items, for a progress bar and for a caller who may stop the run.

    Args:
        bar: the progress bar.
        ask: the caller's function, None without one.
        total: the number of items, None if unknown.
    """

    def __init__(self, bar: tqdm[Any], ask: Progress | None, total: int | None) -> None:
        self._bar, self._ask, self._total = bar, ask, total
        self._done = 0
        self.is_stopped = False

    @property
    def notes(self) -> tuple[str, ...]:
        """The notes for the report."""
        return (STOPPED,) if self.is_stopped else ()

    def update(self, count: int = 1) -> None:
        """Count `count` more items."""
        self._done += count
        self._bar.update(count)

    def goes_on(self) -> bool:
        """Whether the run goes on; a stopped run never does."""
        if not self.is_stopped and self._ask is not None:
            self.is_stopped = not self._ask(self._done, self._total)
        return not self.is_stopped
