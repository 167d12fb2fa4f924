"""Which image goes into which shard, fixed once and for all before the first is embedded.

A plan is a folder that appears whole: one file of items for each shard, and `plan.json` with what all shards have in
common. A run that continues, later or on another machine, follows it even if the source has changed since.
Memory holds one item.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sqlite3
import uuid
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, TextIO, TypeAlias

from llama_index.core.schema import BaseNode

from mm_retriever.errors import IngestError, reason_of
from mm_retriever.files import sync
from mm_retriever.ingest.folder import IgnoredCounts, IgnoredFiles, Skip
from mm_retriever.ingest.report import SkippedImage
from mm_retriever.ingest.sidecar import SidecarSource
from mm_retriever.ingest.sidecar_match import SidecarMatch, match_sidecar
from mm_retriever.ingest.sources import Item, items, source_folder
from mm_retriever.store import same_model

PathsOrURLs: TypeAlias = str | os.PathLike[str] | Iterable[str | os.PathLike[str]]

ROWS_PER_SHARD = 10_000
"""Images in one file, by default."""

_VERSION = 1
_PLAN = "plan"
_FACTS = "plan.json"


@dataclass(frozen=True)
class ShardPlan:
    """What the shards below a folder hold, done or not."""

    out: Path
    id: str  # in every shard of it
    model_id: str
    dimension: int
    words: str | None  # full-text index: "BM25 mixed", "BM25" (analyzer "standard") or the name of a sparse model
    rows_per_shard: int
    source: str  # the folder that the images are in, or a digest of the list that named them
    sidecar: str | None  # a digest
    images: int
    shards: int
    skipped: tuple[SkippedImage, ...]  # entries of the source that are no path or URL of an image
    ignored: tuple[IgnoredFiles, ...] = ()  # what the folder holds beside images
    notes: tuple[str, ...] = ()  # about the sidecar
    unused_rows: int = 0  # of the sidecar
    model_note: str = ""  # name and float format of the model, for people; "" in earlier plans

    def shard(self, number: int) -> Path:
        """Return where the file of a shard is, once it is done."""
        return self.out / "shards" / f"{number:06d}.parquet"

    @property
    def drafts(self) -> Path:
        """The folder of files that are being written."""
        return self.out / "drafts"

    def size(self, number: int) -> int:
        """Return how many images are planned for a shard."""
        return min(self.rows_per_shard, self.images - number * self.rows_per_shard)

    def source_is_gone(self) -> bool:
        """Whether the source was a folder and is none, or an empty one, like that of a drive that is not mounted."""
        if not os.path.isabs(self.source):  # noqa: PTH117 - a digest is no path
            return False
        try:
            with os.scandir(self.source) as listing:
                return next(listing, None) is None
        except OSError:
            return True

    def unfinished(self) -> list[int]:
        """Return the numbers of the shards that are not done."""
        return [number for number in range(self.shards) if not self.shard(number).exists()]

    def items(self, number: int) -> Iterator[Item]:
        """Yield the images of a shard; the metadata of each are those of the sidecar."""
        path = _items_file(self.out / _PLAN, number)
        try:
            with path.open(encoding="ascii") as lines:
                for line in lines:
                    known = json.loads(line)
                    yield Item(name=known.get("path") or known["url"], **known)
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise IngestError(_unreadable(path, self.out, error)) from error


def read_plan(out: str | Path) -> ShardPlan:
    """Return the plan that lies in a folder."""
    folder = _resolved(out)
    path = folder / _PLAN / _FACTS
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise IngestError(f"there are no shards in {str(folder)!r}; embed_to_shards makes them") from None
    except (OSError, ValueError) as error:
        raise IngestError(_unreadable(path, folder, error)) from error
    if not isinstance(facts, dict) or facts.pop("version", None) != _VERSION:
        raise IngestError(f"{str(path)!r} was written by another version of mm_retriever; give another folder")
    try:
        facts["images"] = facts.pop("pictures")
        facts["skipped"] = tuple(SkippedImage(*names) for names in facts["skipped"])
        kinds = facts.get("ignored", ())
        facts["ignored"] = tuple(IgnoredFiles(**{**kind, "paths": tuple(kind["paths"])}) for kind in kinds)
        facts["notes"] = tuple(facts.get("notes", ()))
        return ShardPlan(out=folder, **facts)
    except (LookupError, TypeError) as error:
        raise IngestError(_unreadable(path, folder, error)) from error


def _unreadable(path: Path, folder: Path, error: Exception) -> str:
    return (
        f"cannot read the plan {str(path)!r}, which is damaged or was changed by another program: "
        f"{reason_of(error)}. Restore it, or remove {str(folder)!r} to start anew"
    )


def is_planned(out: str | Path) -> bool:
    """Whether a plan lies in a folder."""
    return (_resolved(out) / _PLAN).exists()


def make_plan(
    source: PathsOrURLs | None,
    out: str | Path,
    *,
    model_id: str,
    dimension: int,
    words: str | None,
    rows_per_shard: int | None,
    sidecar: SidecarSource | None,
    model_note: str = "",
) -> ShardPlan:
    """Return the existing plan if it is for these options, whatever its source if none is given, or else a new one.

    Without `rows_per_shard` it is as the existing plan has it, or `ROWS_PER_SHARD`.
    """
    if rows_per_shard is not None and rows_per_shard < 1:
        raise IngestError(f"rows_per_shard {rows_per_shard!r}: give 1 or more")
    options: dict[str, Any] = {"model_id": model_id, "dimension": dimension, "words": words}
    folder = _resolved(out)
    if source is None:
        return _checked(read_plan(folder), options)
    entries = _Entries(source)
    options["sidecar"] = _digest_of(sidecar)
    if not is_planned(out):
        facts = {**options, "rows_per_shard": rows_per_shard or ROWS_PER_SHARD, "model_note": model_note}
        _write_plan(folder, entries, match_sidecar(sidecar, source, entries.folder), facts)
    if rows_per_shard is not None:
        options["rows_per_shard"] = rows_per_shard
    plan = read_plan(folder)
    return _checked(plan, {**options, "source": entries.name()})


def _resolved(out: str | Path) -> Path:
    return Path(os.path.expanduser(out)).resolve()  # noqa: PTH111


def _checked(plan: ShardPlan, options: Mapping[str, Any]) -> ShardPlan:
    for name, value in options.items():
        planned = getattr(plan, name)
        same_models = name in ("model_id", "words") and planned and value and same_model(planned, value)
        if planned != value and not same_models:
            raise IngestError(
                f"the shards in {str(plan.out)!r} are planned for {name} {planned!r}, and {value!r} is asked for. "
                "Give the same to go on. Give another folder, or remove this one, to start anew"
            )
    return plan


class _Entries:
    """The items of a source, and a name for the source that says whether another one is the same."""

    def __init__(self, source: PathsOrURLs) -> None:
        self.folder = source_folder(source)
        self.ignored = IgnoredCounts()
        self._source = source
        self._digest = hashlib.sha256()
        self._left = self._places([source] if isinstance(source, str | os.PathLike) else source)

    def items(self, skip: Skip) -> Generator[Item, None, None]:
        """Yield each item once. A folder names nothing twice; what a list has named so far is kept on the disk."""
        if self.folder is not None:
            yield from items(self._source, skip, self.ignored)
            return
        with closing(sqlite3.connect("")) as database:  # a temporary file
            database.execute("CREATE TABLE seen (id TEXT PRIMARY KEY) WITHOUT ROWID")
            for item in items(self._left, skip):
                if database.execute("INSERT OR IGNORE INTO seen VALUES (?)", (item.id,)).rowcount:
                    yield item

    def name(self) -> str:
        """A folder's path, or a digest of a list, whose rest is gone through for that."""
        if self.folder is not None:
            return self.folder
        for _ in self._left:
            pass
        return f"list {self._digest.hexdigest()}"

    def _places(self, entries: Iterable[object]) -> Iterator[str]:
        for entry in entries:
            if isinstance(entry, BaseNode):
                raise IngestError("shards are made of paths and URLs; LlamaIndex nodes go through ingest_images")
            if not isinstance(entry, str | os.PathLike):
                raise IngestError(f"shards are made of paths and URLs, not {type(entry).__name__}")
            place = os.fspath(entry)
            self._digest.update(json.dumps(place).encode())
            yield place


def _write_plan(folder: Path, entries: _Entries, sidecar: SidecarMatch, options: Mapping[str, Any]) -> None:
    """Write the plan beside its place and move it there; of two processes that do so at once, the first wins."""
    entries.ignored = IgnoredCounts(sidecar.files)
    for name in ("shards", "drafts"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    draft = folder / "drafts" / f"{_PLAN}.{uuid.uuid4().hex}"
    draft.mkdir()
    skipped: list[tuple[str, str]] = []
    try:
        with closing(entries.items(lambda name, reason: skipped.append((name, reason)))) as planned:
            images, shards = _write_items(draft, planned, sidecar, options["rows_per_shard"])
        if not images:
            reasons = "".join(f"; {name}: {reason}" for name, reason in skipped[:3])
            raise IngestError(f"there are no images to plan for in {entries.folder or 'the list'!r}{reasons}")
        facts = {"version": _VERSION, "id": uuid.uuid4().hex, **options, "source": entries.name()}
        facts |= {"pictures": images, "shards": shards, "skipped": skipped}  # "pictures" is version 1's word
        facts["ignored"] = [asdict(files) for files in entries.ignored.report()]
        facts |= {"notes": sidecar.notes, "unused_rows": len(sidecar.unused)}
        with _synced(draft / _FACTS) as file:
            json.dump(facts, file, indent=1)
        sync(draft)
        draft.rename(folder / _PLAN)
        sync(folder)
    except OSError:
        if not (folder / _PLAN).exists():  # or else another process was first, and may have removed our draft
            raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    for other in (folder / "drafts").glob(f"{_PLAN}.*"):
        shutil.rmtree(other, ignore_errors=True)


def _write_items(draft: Path, planned: Iterator[Item], sidecar: SidecarMatch, size: int) -> tuple[int, int]:
    """Write the items of each shard, and return how many items and shards there are."""
    images = shards = 0
    while (first := next(planned, None)) is not None:
        with _synced(_items_file(draft, shards)) as file:
            for item in chain([first], islice(planned, size - 1)):
                known: dict[str, Any] = {
                    name: getattr(item, name) for name in ("id", "path", "url", "label", "fetch_url")
                }
                if (row := sidecar.row(item.sidecar_names, item.path)) is not None:
                    known |= {"metadata": row.columns, "text": row.text}
                file.write(json.dumps({name: value for name, value in known.items() if value}) + "\n")
                images += 1
        shards += 1
    return images, shards


def _items_file(plan: Path, number: int) -> Path:
    return plan / f"{number:06d}.jsonl"


@contextmanager
def _synced(path: Path) -> Iterator[TextIO]:
    """A new text file that is synced to the disk when it is closed."""
    with path.open("x", encoding="ascii") as file:
        yield file
    sync(path)


def _digest_of(sidecar: SidecarSource | None) -> str | None:
    if sidecar is None or sidecar is False:
        return None
    if not isinstance(sidecar, str | os.PathLike):
        return hashlib.sha256(json.dumps(sidecar, default=str, sort_keys=True).encode()).hexdigest()
    try:
        return hashlib.sha256(Path(os.path.expanduser(sidecar)).read_bytes()).hexdigest()  # noqa: PTH111
    except OSError as error:
        raise IngestError(f"cannot read the sidecar file {str(sidecar)!r}: {error}") from error
