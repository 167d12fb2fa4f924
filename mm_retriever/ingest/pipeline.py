"""`ingest_images`: whatever is new or changed goes through the model and into the store.

Owns the order of things, so that a run may die at any point and the next one goes on: a row is written whole under an
id that does not change, nothing is removed before what replaces it is there, and what was written is not done again.

    items -> stored already? -> read and decode (threads) -> embed (this thread, in batches) -> store
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from llama_index.core.schema import BaseNode, ImageNode
from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_random_exponential
from tqdm import tqdm

from mm_retriever.errors import IngestError, NodeError, StoreError, StoreMismatchError, StoreUnavailableError
from mm_retriever.images import DEFAULT_POLICY, ImagePolicy
from mm_retriever.ingest.gone import fate
from mm_retriever.ingest.ignored import IgnoredCounts
from mm_retriever.ingest.known import KnownVectors
from mm_retriever.ingest.nodes import (
    BOOKKEEPING,
    Kind,
    Task,
    given_layers,
    has_columns,
    lost_columns,
    picture_node,
    reason_of,
    stamp_of,
    text_digest,
    text_node,
)
from mm_retriever.ingest.reading import ReadPicture, read_ahead, read_picture
from mm_retriever.ingest.removal import prune_images
from mm_retriever.ingest.report import IngestReport, SkippedImage
from mm_retriever.ingest.sidecar import SidecarMatch, SidecarSource, match_sidecar
from mm_retriever.ingest.sources import Item, Source, items, path_id, source_folder, url_id, vanished_folder, walk
from mm_retriever.ingest.stable_url import stable_url
from mm_retriever.ingest.vectors import ComposedEmbedding, Vector, Vectors
from mm_retriever.own_keys import own_value
from mm_retriever.store import ImageStore, same_model

_WINDOW = 256
"""Items looked up in the store with one request."""

_ATTEMPTS = 4

T = TypeVar("T")


def ingest_images(
    source: Source,
    store: ImageStore,
    embed_model: ComposedEmbedding,
    *,
    batch_size: int = 32,
    prune: bool = False,
    force: bool = False,
    verify: bool = False,
    sidecar: SidecarSource | None = None,
    drop_columns: bool = False,
    exif: bool = True,
    report_path: str | Path | None = None,
    show_progress: bool = True,
    image_policy: ImagePolicy = DEFAULT_POLICY,
    fs: Any | None = None,
) -> IngestReport:
    """Put pictures into the store and return what was done; a second run embeds only what changed.

    Each picture becomes an `ImageNode` whose metadata are `file_path`, `file_name`, `label` (the folders it lies in),
    `width`, `height`, `bytes`, `digest` (SHA-256 of the file), `mtime_ns`, the columns of the sidecar, and `taken`,
    `camera`, `latitude` and `longitude` from the EXIF block. Where a node or a sidecar has one of our names, its value
    stays and ours is stored as `mm_width` and so on. An image that cannot be read is skipped and listed. Memory does
    not grow with the number of images.

    Absence is not deletion: images about which a run says nothing keep the columns and the caption that they have, and
    so does a file whose pixels changed. What a sidecar says about an image replaces what a sidecar said before.

    What the report counts as indexed, replaced or updated is stored: in a Milvus Lite file it is on the disk and
    survives a power cut, and so is what an error says was stored. A server keeps rows by its own rules.

    Args:
        source: a folder (recursive; links to folders followed once, hidden files left out; what is not an image is
            counted by type in the report), a file, or any iterable of paths, URLs (`image_policy` must allow them;
            taken to be unchanging) and LlamaIndex documents or nodes: images by their pixels, others by their text. Of
            a document that carries an image as bytes and names no place, vector, digest and metadata are stored and not
            the bytes: what shows or reranks results needs a file, so save it and set `image_path`.
        store: from `open_store`, for the same model.
        embed_model: a `VisualizedBGEEmbedding`.
        batch_size: pictures that go through the model together.
        prune: also remove the rows of images below the folder whose files are gone, or are images no longer; what
            cannot be looked at keeps its row. The folder itself may be gone.
        force: with `prune`: also where more than a fifth of the folder's rows would go, or a drive seems to be missing.
        verify: read every file, and fetch every URL, whatever size and times say.
        sidecar: a JSON, JSON Lines, CSV or TSV file, or a mapping, with more metadata by path below the folder or by
            file name; a column `text` or `caption` becomes the text of the node. Where columns changed, a row is
            written again, not embedded again. None: the `metadata.jsonl` and `metadata.csv` files in the folder, if
            there are any; False: none.
        drop_columns: remove the columns and captions that this call does not give.
        exif: read the EXIF block of images that are new or changed.
        report_path: write the report there as JSON too.
        show_progress: a progress bar with rate and time left.
        image_policy: what may be read, and how large.
        fs: a file system of fsspec (S3, GCS, memory, ...) in which `source` and paths are looked for. Documents that
            `SimpleDirectoryReader(..., fs=...)` has read are found without it in the file systems that are open,
            unless `image_policy` names folders.

    Raises:
        IngestError: a source or sidecar that cannot be used at all, or a folder without pictures to prune by.
        StoreError: the store failed, for good or for longer than the retries; what was stored stays.
    """
    if batch_size < 1:
        raise IngestError(f"batch_size {batch_size!r}: give 1 or more")
    if store.dim != embed_model.dimension or not same_model(store.model_id, embed_model.model_id):
        raise StoreMismatchError(
            f"the store was opened for {store.model_id!r} ({store.dim} numbers), "
            f"the model given is {embed_model.model_id!r} ({embed_model.dimension} numbers)"
        )
    if force and not prune:
        raise IngestError("force=True goes with prune=True: it says that many rows may go")
    if prune and fs is None and (vanished := vanished_folder(source)) is not None:
        return _pruned_only(vanished, store, force=force, report_path=report_path)
    folder = source_folder(source) if fs is None else None
    if prune and folder is None:
        raise IngestError("prune=True needs a folder as the source: only there does a missing file mean a removed one")
    match = match_sidecar(sidecar, source if fs is None else iter(()), folder)
    with tqdm(
        total=_total(source, folder) if show_progress else None,
        desc="Indexing",
        unit="picture",
        disable=not show_progress,
    ) as bar:
        dropped: tuple[Kind, ...] = ("earlier", "node", "sidecar") if drop_columns else ()
        dropped += ("exif",) if drop_columns and not exif else ()
        run = _Run(
            store,
            embed_model,
            match,
            batch_size,
            image_policy,
            bar,
            exif=exif,
            dropped=dropped,
            file_system=fs,
            verify=verify,
        )
        with closing(run):
            report = run.report_of(source, folder if prune else None, force=force)
    if report_path is not None:
        report.write(report_path)
    return report


def _pruned_only(folder: str, store: ImageStore, *, force: bool, report_path: str | Path | None) -> IngestReport:
    """Remove the rows of a folder that is gone."""
    start = time.perf_counter()
    pruned = prune_images(folder, store, force=force)
    if not pruned.rows:
        raise IngestError(f"there is no folder {folder!r}, and nothing is stored of it")
    report = IngestReport(
        indexed=0,
        replaced=0,
        updated=0,
        unchanged=0,
        removed=pruned.removed,
        skipped=(),
        seconds=time.perf_counter() - start,
        kept=pruned.kept,
    )
    if report_path is not None:
        report.write(report_path)
    return report


def _total(source: Source, folder: str | None) -> int | None:
    if folder is not None:
        return sum(1 for _ in walk(folder, lambda name, reason: None))
    if isinstance(source, str | os.PathLike):
        return 1
    return len(source) if isinstance(source, Sized) else None


class _Run:
    """One call of `ingest_images`."""

    def __init__(
        self,
        store: ImageStore,
        embed_model: ComposedEmbedding,
        sidecar: SidecarMatch,
        batch_size: int,
        policy: ImagePolicy,
        bar: tqdm[Any],
        *,
        exif: bool,
        dropped: tuple[Kind, ...],
        file_system: Any | None,
        verify: bool = False,
    ) -> None:
        self._store = store
        self._embed_model = embed_model
        self._vectors = Vectors(embed_model)
        self._sidecar = sidecar
        self._batch_size = batch_size
        self._policy = policy
        self._bar = bar
        self._exif = exif
        self._dropped = dropped
        self._lost: Counter[str] = Counter()  # columns that images had and no longer have
        self._left_out: Counter[str] = Counter()  # keys that were given and cannot be stored
        self._silent = 0  # images with columns that the sidecar does not name
        self._file_system = file_system
        self._counts: Counter[str] = Counter()
        self._skipped: list[SkippedImage] = []
        self._ignored = IgnoredCounts()
        self._under_way: set[str] = set()  # ids that are being read or embedded
        self._spoiled: set[str] = set()  # ids of what is there and no image any longer
        self._verify = verify
        self._known = KnownVectors(store, self._retried)
        self._moves: set[str] = set()  # ids of rows whose place another row takes
        self._files = 0

    def close(self) -> None:
        """Let go of what the run keeps on disk."""
        self._known.close()

    def report_of(self, source: Source, prune_folder: str | None, *, force: bool) -> IngestReport:
        """Do everything and return the report."""
        start = time.perf_counter()
        try:
            self._ingest(self._tasks(source))
            if prune_folder is not None:
                self._prune(prune_folder, force=force)
        except StoreError as error:
            stored = self._counts["indexed"] + self._counts["replaced"]
            raise type(error)(f"{error}. {stored} pictures were stored; the same call goes on from there") from error
        return self._report(start)

    def _report(self, start: float) -> IngestReport:
        names = ("indexed", "replaced", "moved", "reused", "updated", "unchanged", "removed", "kept")
        return IngestReport(
            **{name: self._counts[name] for name in names},
            skipped=tuple(self._skipped),
            seconds=time.perf_counter() - start,
            ignored=self._ignored.report(),
            unused_rows=len(self._sidecar.unused),
            notes=(*self._sidecar.notes, *self._notes()),
        )

    def _notes(self) -> Iterator[str]:
        for key, count in self._lost.items():
            yield f"{count} images no longer have the column {key!r}: what this run says about them has none"
        for key, count in self._left_out.items():
            yield f"metadata {key!r} is left out of {count} nodes: too long, or a name that ingestion uses itself"
        if self._silent:
            yield f"{self._silent} images that the sidecar does not name keep the columns that they have"

    # ------------------------------------------------------------------------------------------ what is to be done

    def _tasks(self, source: Source) -> Iterator[Task]:
        """Yield what is new or may have changed; what is stored as it is needs no task."""
        searched = self._policy.roots is None
        everything = items(source, self._skip, self._ignored, self._file_system, search_open=searched)
        while window := list(islice(everything, _WINDOW)):
            by_id = {item.id: item for item in window if item.id not in self._under_way}
            self._bar.update(len(window) - len(by_id))  # named twice
            stored = self._retried(self._store.columns, list(by_id), BOOKKEEPING)
            tasks = [task for item in by_id.values() if (task := self._task(item, stored.get(item.id))) is not None]
            known = [task.item.id for task in tasks if task.stored is not None]
            nodes = {node.node_id: node for node in self._retried(self._store.get_nodes, known)} if known else {}
            for changed in tasks:
                task = changed.keeping(nodes.get(changed.item.id))
                self._lost.update(lost_columns(task))
                self._under_way.add(task.item.id)
                yield task

    def _task(self, item: Item, stored: Mapping[str, Any] | None) -> Task | None:
        stamp: dict[str, Any] = {}  # a URL is taken to be unchanging
        if item.path is not None:
            self._files += 1
            try:
                stamp = stamp_of(item.path)
            except (OSError, ValueError) as error:
                self._skip(item.name, reason_of(error))
                return None
        elif item.stamp:
            stamp = item.stamp
        elif item.url is None:
            stamp = {"digest": text_digest(item.text)}
        row = self._sidecar.row(item.sidecar_names, item.path)
        given, left_out = given_layers(item, row)
        self._left_out.update(left_out)
        self._silent += row is None and not self._dropped and self._sidecar.has_rows and has_columns(stored)
        task = Task(item, given, stamp, stored, drop=self._dropped)
        if task.same and task.same_metadata and not (self._verify and item.is_picture):
            self._done("unchanged")
            return None
        return task

    # ------------------------------------------------------------------------------------------ reading, embedding

    def _ingest(self, tasks: Iterator[Task]) -> None:
        pictures: list[tuple[Task, ReadPicture]] = []
        rewritten: list[tuple[Task, ReadPicture]] = []
        reading = read_ahead(self._without_texts(tasks), self._read, ahead=2 * self._batch_size)
        with closing(reading) as results:
            for task, picture in results:
                if picture.error:
                    if picture.spoiled and picture.length == task.stamp.get("bytes"):
                        self._spoiled.add(task.item.id)
                    self._skip(task.item.name, picture.error, task)
                elif picture.prepared is None and task.same_stamp and task.same_metadata:
                    self._under_way.discard(task.item.id)
                    self._done("unchanged")
                else:
                    batch = rewritten if picture.prepared is None else pictures
                    batch.append((task, picture))
                if len(pictures) == self._batch_size:
                    self._embed_pictures(pictures)
                    pictures.clear()
                if len(rewritten) == self._batch_size:
                    self._rewrite(rewritten)
                    rewritten.clear()
        self._embed_pictures(pictures)
        self._rewrite(rewritten)

    def _without_texts(self, tasks: Iterator[Task]) -> Iterator[Task]:
        """Yield the pictures; texts need no reading and are embedded on the way."""
        texts: list[Task] = []
        for task in tasks:
            if task.item.is_picture:
                yield task
                continue
            texts.append(task)
            if len(texts) == self._batch_size:
                self._embed_texts(texts)
                texts.clear()
        self._embed_texts(texts)

    def _read(self, task: Task) -> ReadPicture:
        return read_picture(
            task.item.source, task.known_digest, self._embed_model.prepare_image, self._policy, self._exif
        )

    def _embed_pictures(self, pictures: Sequence[tuple[Task, ReadPicture]]) -> None:
        """Store images; contents that the store or this batch has already are not embedded again."""
        known = self._known.rows({picture.digest for _, picture in pictures})
        fresh = {picture.digest: picture.prepared for _, picture in pictures if picture.digest not in known}
        vectors = dict(zip(fresh, self._vectors.of_pictures(list(fresh.values())), strict=True))
        nodes = []
        for task, picture in pictures:
            rows = known.get(picture.digest, ())
            vector = self._row_vector(rows[0]) if rows else vectors[picture.digest]
            if isinstance(vector, str):
                self._skip(task.item.name, vector, task)
                continue
            moved = self._moved(task, rows)
            if moved is None:
                self._counts["reused"] += fresh.pop(picture.digest, None) is None
            node = picture_node(moved or task, picture.digest, picture.size, vector, picture.exif)
            nodes.append((moved or task, node))
        self._write(nodes)

    def _row_vector(self, row: Mapping[str, Any]) -> Vector:
        return np.asarray(row[self._store.embedding_field], dtype=np.float32)

    def _moved(self, task: Task, rows: Sequence[Mapping[str, Any]]) -> Task | None:
        """The task with what the row of a vanished file of the same contents has; None where nothing moved."""
        item = task.item
        if task.stored is not None or item.id != (path_id(item.path) if item.path is not None else url_id(item.place)):
            return None
        free = {str(row["id"]): row for row in rows if row["id"] not in self._moves and row["id"] != item.id}
        for node in self._retried(self._store.get_nodes, list(free)) if free else ():
            if self._is_former(item, free[node.node_id], node):
                self._moves.add(node.node_id)
                return task.moved(node)
        return None

    def _is_former(self, item: Item, row: Mapping[str, Any], node: BaseNode) -> bool:
        """Whether a row is of the same thing under a name that it no longer has: a file that is gone, an old URL."""
        if item.path is None:
            url = getattr(node, "image_url", None)
            return url is not None and stable_url(str(url)) == item.url
        path = str(own_value(row, "file_path") or "")
        return bool(path) and row["id"] == path_id(path) and fate(path, row) == "gone"

    def _embed_texts(self, tasks: Sequence[Task]) -> None:
        found = self._vectors.of_texts([task.item.text for task in tasks])
        nodes = []
        for task, vector in zip(tasks, found, strict=True):
            if isinstance(vector, str):
                self._skip(task.item.name, vector, task)
            else:
                nodes.append((task, text_node(task, vector)))
        self._write(nodes)

    def _rewrite(self, pictures: Sequence[tuple[Task, ReadPicture]]) -> None:
        """Store again what has the same pixels and other metadata, under the vector that it has."""
        ids = [task.item.id for task, _ in pictures]
        rows = self._retried(self._store.columns, ids, (self._store.embedding_field,))
        nodes = []
        for task, picture in pictures:
            row = rows.get(task.item.id)
            if row is None:
                self._skip(task.item.name, "its row was removed while it was being read; run again", task)
                continue
            vector = np.asarray(row[self._store.embedding_field], dtype=np.float32)
            nodes.append((task, picture_node(task, picture.digest, task.size, vector, picture.exif or None)))
        self._write(nodes, embedded=False)

    # ------------------------------------------------------------------------------------------ storing

    def _write(self, nodes: Sequence[tuple[Task, BaseNode]], *, embedded: bool = True) -> None:
        if not nodes:
            return
        try:
            self._retried(self._store.write, [node for _, node in nodes])
        except NodeError as error:  # nothing was written
            if len(nodes) == 1:
                self._skip(nodes[0][0].item.name, str(error), nodes[0][0])
                return
            for one in nodes:
                self._write([one], embedded=embedded)
            return
        moved = [task.moved_from for task, _ in nodes if task.moved_from]
        if moved:
            self._retried(self._store.delete_nodes, moved)
        for task, node in nodes:
            self._under_way.discard(task.item.id)
            if isinstance(node, ImageNode):
                self._known.add(str(own_value(node.metadata, "digest")), node.node_id)
            if task.moved_from:
                self._done("moved")
            elif embedded:
                self._done("indexed" if task.stored is None else "replaced")
            else:
                self._done("unchanged" if task.same_metadata else "updated")

    def _prune(self, folder: str, *, force: bool) -> None:
        if not self._files and not force:
            raise IngestError(
                f"prune=True: there is no picture below {folder!r}, so nothing was removed. If that is right and not a "
                "drive that is missing, ask for it again with --force (force=True in Python)"
            )
        try:
            pruned = prune_images(folder, self._store, force=force, spoiled=self._spoiled)
        except IngestError as error:
            raise IngestError(f"{self._report(time.perf_counter())}; but {error}") from None
        self._counts["removed"] += pruned.removed
        self._counts["kept"] += pruned.kept

    # ------------------------------------------------------------------------------------------ accounts

    def _retried(self, call: Callable[..., T], *arguments: Any) -> T:
        """The answer of the store; a server that is away for a moment is asked again."""
        retrying = Retrying(
            retry=retry_if_exception_type(StoreUnavailableError),
            stop=stop_after_attempt(_ATTEMPTS),
            wait=wait_random_exponential(multiplier=1.0, max=10.0),
            reraise=True,
        )
        return retrying(call, *arguments)

    def _done(self, count: str) -> None:
        self._counts[count] += 1
        self._bar.update()

    def _skip(self, name: str, reason: str, task: Task | None = None) -> None:
        self._skipped.append(SkippedImage(name, reason))
        self._bar.update()
        if task is not None:
            self._under_way.discard(task.item.id)
