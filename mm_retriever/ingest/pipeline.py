"""`ingest_images`: embeds and stores what is new or changed.

Owns the order of steps, so that a run may die at any point and the next one goes on: a row is written whole under an id
that does not change, nothing is removed before its replacement is stored, and stored items are not embedded again.

    items -> stored already? -> read and decode (threads) -> embed (this thread, in batches) -> store
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from llama_index.core.schema import BaseNode, ImageNode
from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_random_exponential
from tqdm import tqdm

from mm_retriever.embedding import ComposedEmbedding
from mm_retriever.errors import ImageLoadError, IngestError, StoreError, StoreMismatchError, StoreUnavailableError
from mm_retriever.images import DEFAULT_POLICY, ImagePolicy
from mm_retriever.ingest.folder import IgnoredCounts
from mm_retriever.ingest.nodes import (
    BOOKKEEPING,
    Kind,
    Task,
    current_stamp,
    given_layers,
    has_columns,
    image_node,
    lost_columns,
    text_node,
    with_items,
    write_each,
)
from mm_retriever.ingest.reading import ImageReader, ReadImage, read_ahead
from mm_retriever.ingest.remote import remote
from mm_retriever.ingest.removal import fate, prune_images, prune_missing
from mm_retriever.ingest.report import IngestReport, Meter, Progress, SkippedImage
from mm_retriever.ingest.sidecar import SidecarSource
from mm_retriever.ingest.sidecar_match import SidecarMatch, match_sidecar
from mm_retriever.ingest.sources import (
    Item,
    Source,
    by_ids,
    count_items,
    items,
    missing_folder,
    path_id,
    source_folder,
    stable_url,
    url_id,
)
from mm_retriever.ingest.vectors import KnownVectors, Vector, Vectors
from mm_retriever.own_keys import own_value
from mm_retriever.store import ImageStore, model_facts, same_model
from mm_retriever.tracing import spanned

_FLUSHED_ROWS = 200  # fewer in memory cost a search less than a data file of their own
_WINDOW = 256  # items looked up in the store with one request

_retried = Retrying(  # calls the store; a server that is away for a moment is asked again
    retry=retry_if_exception_type(StoreUnavailableError),
    stop=stop_after_attempt(4),
    wait=wait_random_exponential(multiplier=1.0, max=10.0),
    reraise=True,
)


@spanned
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
    item: str | None = None,
    exif: bool = True,
    exact_pixels: bool | None = None,
    report_path: str | Path | None = None,
    show_progress: bool = True,
    progress: Progress | None = None,
    image_policy: ImagePolicy = DEFAULT_POLICY,
    fs: Any | None = None,
) -> IngestReport:
    """Put images into the store and return what was done; a second run embeds only what changed.

    Each image becomes an `ImageNode` whose metadata are `file_path`, `file_name`, `label` (the folders it lies in),
    `width`, `height`, `bytes`, `digest` (SHA-256 of the file), `mtime_ns`, the columns of the sidecar, and `taken`,
    `camera`, `latitude` and `longitude` from the EXIF block. If a node or a sidecar has one of these names, its value
    stays and ours is stored as `mm_width` and so on. An image that cannot be read is skipped and listed. Memory does
    not grow with the number of images.

    Absence is not deletion: an image for which a run gives no columns or caption keeps those that it has, even if its
    pixels changed. The columns of a sidecar replace those of an earlier sidecar.

    Images that the report counts as indexed, replaced or updated are stored, and so are those that an error counts as
    stored: in a Milvus Lite file they are on the disk and survive a power cut; a server keeps rows by its own rules.

    Args:
        source: a folder (recursive; links to folders are followed once, hidden files left out, files that are not
            images counted by type in the report), a file, or any iterable of paths, URLs (`image_policy` must allow
            them; their contents are taken to be constant) and LlamaIndex documents or nodes, which are embedded by
            their pixels or else their text. The bytes of a document without a path or URL are not stored, only their
            vector, digest and metadata; showing or reranking such results needs a file: save it and set `image_path`.
        store: from `open_store`, for the same model.
        embed_model: a `ComposedEmbedding` such as `VisualizedBGEEmbedding`.
        batch_size: images that go through the model together.
        prune: also remove the rows of images below the folder whose files are gone, or are no longer images; files
            that cannot be accessed or read keep their rows. The folder itself may be gone.
        force: with `prune`: also if more than a fifth of the folder's rows would go, or a drive seems to be missing.
        verify: read every file, and fetch every URL, whatever size and times say.
        sidecar: a JSON, JSON Lines, CSV or TSV file, or a mapping, with more metadata by path below the folder or by
            file name; a column `text` or `caption` becomes the text of the node. Rows with changed columns are
            written again, not embedded again. None: the `metadata.jsonl` and `metadata.csv` files in the folder, if
            there are any; False: none.
        drop_columns: remove columns and captions that this call does not give.
        item: a column of the sidecar or of the nodes whose value the images of one item share, such as "sku"; it is
            stored as the column `item` too, for `ComposedRetriever(group_by="item")`. A column `item` needs no naming.
        exif: read the EXIF block of images that are new or changed.
        exact_pixels: False: a large JPEG is decoded at a half, a quarter or an eighth of its size, never below twice
            the model's input size, which is several times as fast and changes vectors a little. True: always at full
            size. None: False if the model computes in 8 bits, else True.
        report_path: write the report there as JSON too.
        show_progress: a progress bar with rate and time left.
        progress: called before each image that is to be embedded, with the number done and the total. It may wait; if
            it returns False, the run ends early, prunes nothing, and the report says so.
        image_policy: what may be read, and how large.
        fs: a file system of fsspec (S3, GCS, memory, ...) in which `source` and paths are looked for. Documents that
            `SimpleDirectoryReader(..., fs=...)` has read are found without it in the file systems that are open,
            unless `image_policy` names folders.

    Raises:
        IngestError: the source or sidecar cannot be used at all, or the folder to prune by has no images.
        StoreError: the store failed for longer than the retries; stored images stay stored.
    """
    if batch_size < 1:
        raise IngestError(f"batch_size {batch_size!r}: give 1 or more")
    dimension, model_id, _ = model_facts(embed_model).values()
    if store.dim != dimension or not same_model(store.model_id, model_id):
        raise StoreMismatchError(
            f"the store was opened for {store.model_id!r} ({store.dim} numbers), not for {model_id!r} ({dimension})"
        )
    if item == "":
        raise IngestError('item="": give the name of a column')
    if force and not prune:
        raise IngestError("force=True goes with prune=True: it says that many rows may go")
    fs = remote(fs)
    if prune and fs is None and (missing := missing_folder(source)) is not None:
        report = prune_missing(missing, store, force=force)
    else:
        folder = source_folder(source) if fs is None else None
        if prune and folder is None:
            raise IngestError(
                "prune=True needs a folder as the source: only there does a missing file mean a removed one"
            )
        match = match_sidecar(sidecar, source if fs is None else iter(()), folder)
        dropped: tuple[Kind, ...] = ("earlier", "node", "sidecar") if drop_columns else ()
        dropped += ("exif",) if drop_columns and not exif else ()
        total = count_items(source, folder) if show_progress or progress is not None else None
        with tqdm(total=total, desc="Indexing", unit="image", disable=not show_progress) as bar:
            run = _Run(
                store,
                embed_model,
                match,
                batch_size,
                ImageReader(embed_model, image_policy, exif, exact_pixels),
                Meter(bar, progress, total),
                dropped=dropped,
                fs=fs,
                verify=verify,
                item=item,
            )
            report = run.report_of(source, folder if prune else None, force=force)
    if report_path is not None:
        report.write(report_path)
    return report


Read = tuple[Task, ReadImage]


@dataclass
class _Run:
    """One call of `ingest_images`."""

    store: ImageStore
    embed_model: ComposedEmbedding
    sidecar: SidecarMatch
    batch_size: int
    reader: ImageReader
    bar: Meter
    dropped: tuple[Kind, ...]
    fs: Any | None
    verify: bool
    item: str | None
    counts: Counter[str] = field(default_factory=Counter)
    skipped: list[SkippedImage] = field(default_factory=list)
    ignored: IgnoredCounts = field(init=False)
    remarks: Counter[str] = field(default_factory=Counter)  # what happened to so many images
    under_way: dict[str, Item] = field(default_factory=dict)  # by id: what is being read or embedded
    spoiled: set[str] = field(default_factory=set)  # ids of files that exist and are images no longer
    unread: set[str] = field(default_factory=set)  # ids of files that exist and could not be read
    replaced_rows: set[str] = field(default_factory=set)  # ids of rows whose place another row takes
    files: int = 0

    def __post_init__(self) -> None:
        self.ignored = IgnoredCounts(self.sidecar.files)
        self.vectors = Vectors(self.embed_model)
        self.known = KnownVectors(self.store, _retried)

    def report_of(self, source: Source, prune_folder: str | None, *, force: bool) -> IngestReport:
        """Run all steps and return the report."""
        start = time.perf_counter()
        try:
            self._ingest(self._tasks(source))
            if prune_folder is not None and not self.bar.is_stopped:
                self._prune(prune_folder, start, force=force)
            if sum(self.counts[name] for name in ("indexed", "replaced", "moved", "updated")) >= _FLUSHED_ROWS:
                _retried(self.store.flush)
        except StoreError as error:
            stored = self.counts["indexed"] + self.counts["replaced"]
            raise type(error)(f"{error}. {stored} images were stored; the same call goes on from there") from error
        finally:
            self.known.close()
        return self._report(start)

    def _report(self, start: float) -> IngestReport:
        remarks = sorted(f"{count} {remark}" for remark, count in self.remarks.items())
        names = ("indexed", "replaced", "moved", "reused", "updated", "unchanged", "removed", "kept")
        return IngestReport(
            **{name: self.counts[name] for name in names},
            skipped=tuple(self.skipped),
            seconds=time.perf_counter() - start,
            ignored=self.ignored.report(),
            unused_rows=len(self.sidecar.unused),
            notes=(*self.bar.notes, *self.sidecar.notes, *self.reader.notes, *remarks),
        )

    # ------------------------------------------------------------------------------------------ tasks

    def _tasks(self, source: Source) -> Iterator[Task]:
        """Yield the items that are new or may have changed."""
        everything = items(source, self._skip, self.ignored, self.fs, search_open=self.reader.policy.roots is None)
        while self.bar.goes_on() and (window := list(islice(everything, _WINDOW))):
            by_id = by_ids(window, self.under_way, self.remarks)
            self.bar.update(len(window) - len(by_id))  # named twice
            stored = _retried(self.store.columns, list(by_id), BOOKKEEPING)
            tasks = [task for item in by_id.values() if (task := self._task(item, stored.get(item.id))) is not None]
            known = [task.item.id for task in tasks if task.stored is not None]
            nodes = {node.node_id: node for node in _retried(self.store.get_nodes, known)} if known else {}
            for changed in tasks:
                task = changed.keeping(nodes.get(changed.item.id))
                for key in lost_columns(task):
                    lost = f"images no longer have the column {key!r}: what this run says about them has none"
                    self.remarks[lost] += 1
                self.under_way[task.item.id] = task.item
                yield task

    def _task(self, item: Item, stored: Mapping[str, Any] | None) -> Task | None:
        self.files += item.path is not None
        try:
            stamp = current_stamp(item)
        except ImageLoadError as error:
            self._skip(item.name, str(error))
            return None
        row = self.sidecar.row(item.sidecar_names, item.path)
        given, left_out = given_layers(item, row)
        for key in left_out:
            self.remarks[f"nodes lose the metadata {key!r}: too long, or a name that ingestion uses itself"] += 1
        if self.item is not None and (given or stored is None):
            given, remark = with_items(given, self.item)
            self.remarks.update([remark] if remark else [])
        elif self.item is not None:
            self.remarks[
                f"images keep the item that they have, if any: this run gives them no column {self.item!r}"
            ] += 1
        if row is None and not self.dropped and self.sidecar.has_rows and has_columns(stored):
            self.remarks["images that the sidecar does not name keep the columns that they have"] += 1
        task = Task(item, given, stamp, stored, drop=self.dropped)
        if task.same and task.same_metadata and not (self.verify and item.is_image):
            self._done("unchanged")
            return None
        return task

    # ------------------------------------------------------------------------------------------ reading, embedding

    def _ingest(self, tasks: Iterator[Task]) -> None:
        changed: list[Read] = []
        rewritten: list[Read] = []  # the same pixels under other metadata
        tasks, read = self._without_texts(tasks), self.reader.read
        ahead = read_ahead(tasks, lambda task: read(task.item.source, task.known_digest), ahead=2 * self.batch_size)
        with closing(ahead) as results:
            for task, image in results:
                if not self.bar.goes_on():
                    break
                if image.error:
                    if image.spoiled and image.length == task.stamp.get("bytes"):
                        self.spoiled.add(task.item.id)
                    if image.unread:
                        self.unread.add(task.item.id)
                    self._refuse(task, image.error)
                elif image.prepared is not None:
                    changed.append((task, image))
                elif task.same_stamp and task.same_metadata:
                    self.under_way.pop(task.item.id, None)
                    self._done("unchanged")
                else:
                    rewritten.append((task, image))
                if len(changed) == self.batch_size:
                    self._embed_images(changed)
                    changed.clear()
                if len(rewritten) == self.batch_size:
                    self._rewrite(rewritten)
                    rewritten.clear()
        self._embed_images(changed)
        self._rewrite(rewritten)

    def _without_texts(self, tasks: Iterator[Task]) -> Iterator[Task]:
        """Yield the images; texts, which need no reading, are embedded here."""
        texts: list[Task] = []
        for task in tasks:
            if task.item.is_image:
                yield task
                continue
            texts.append(task)
            if len(texts) == self.batch_size:
                self._embed_texts(texts)
                texts.clear()
        self._embed_texts(texts)

    def _embed_images(self, images: Sequence[Read]) -> None:
        """Store images; contents that are in the store or in this batch already are not embedded again."""
        known = self.known.rows({image.digest for _, image in images})
        fresh = {image.digest: image.prepared for _, image in images if image.digest not in known}
        vectors = dict(zip(fresh, self.vectors.of_images(list(fresh.values())), strict=True))
        nodes = []
        for task, image in images:
            rows = known.get(image.digest, ())
            vector = self._vector(rows[0]) if rows else vectors[image.digest]
            if isinstance(vector, str):
                self._refuse(task, vector)
                continue
            moved = self._moved(task, rows)
            if moved is None:
                self.counts["reused"] += fresh.pop(image.digest, None) is None
            nodes.append((moved or task, image_node(moved or task, image.digest, image.size, vector, image.exif)))
        self._write(nodes)

    def _vector(self, row: Mapping[str, Any]) -> Vector:
        return np.asarray(row[self.store.embedding_field], dtype=np.float32)

    def _moved(self, task: Task, rows: Sequence[Mapping[str, Any]]) -> Task | None:
        """The task with the metadata of the row of a vanished file of the same contents; None if nothing moved."""
        item = task.item
        if task.stored is not None or item.id != (path_id(item.path) if item.path is not None else url_id(item.place)):
            return None
        free = {str(row["id"]): row for row in rows if row["id"] not in self.replaced_rows and row["id"] != item.id}
        for node in _retried(self.store.get_nodes, list(free)) if free else ():
            if self._is_former(item, free[node.node_id], node):
                self.replaced_rows.add(node.node_id)
                return task.moved(node)
        return None

    def _is_former(self, item: Item, row: Mapping[str, Any], node: BaseNode) -> bool:
        """Whether a row is of the same image under a former name: the path of a vanished file, or an old URL."""
        if item.path is None:
            url = getattr(node, "image_url", None)
            return url is not None and stable_url(str(url)) == item.url
        path = str(own_value(row, "file_path") or "")
        return bool(path) and row["id"] == path_id(path) and fate(path, row) == "gone"

    def _embed_texts(self, tasks: Sequence[Task]) -> None:
        nodes = []
        for task, vector in zip(tasks, self.vectors.of_texts([task.item.text for task in tasks]), strict=True):
            if isinstance(vector, str):
                self._refuse(task, vector)
            else:
                nodes.append((task, text_node(task, vector)))
        self._write(nodes)

    def _rewrite(self, images: Sequence[Read]) -> None:
        """Store rows with new metadata and the same pixels again, under their stored vectors."""
        rows = _retried(self.store.columns, [task.item.id for task, _ in images], (self.store.embedding_field,))
        nodes = []
        for task, image in images:
            if (row := rows.get(task.item.id)) is None:
                self._refuse(task, "its row was removed while it was being read; run again")
                continue
            nodes.append((task, image_node(task, image.digest, task.size, self._vector(row), image.exif or None)))
        self._write(nodes, embedded=False)

    # ------------------------------------------------------------------------------------------ storing

    def _write(self, nodes: Sequence[tuple[Task, BaseNode]], *, embedded: bool = True) -> None:
        def write(nodes: Sequence[tuple[Task, BaseNode]]) -> None:
            _retried(self.store.write, [node for _, node in nodes])
            if moved := [task.moved_from for task, _ in nodes if task.moved_from]:
                _retried(self.store.delete_nodes, moved)
            for task, node in nodes:
                self.under_way.pop(task.item.id, None)
                if isinstance(node, ImageNode):
                    self.known.add(str(own_value(node.metadata, "digest")), node.node_id)
                if task.moved_from:
                    self._done("moved")
                elif embedded:
                    self._done("indexed" if task.stored is None else "replaced")
                else:
                    self._done("unchanged" if task.same_metadata else "updated")

        if nodes:
            write_each(nodes, write, self._refuse)

    def _prune(self, folder: str, start: float, *, force: bool) -> None:
        if not self.files and not force:
            raise IngestError(
                f"prune=True: there is no image below {folder!r}, so nothing was removed. If that is right and not a "
                "drive that is missing, ask for it again with --force (force=True in Python)"
            )
        try:
            pruned = prune_images(folder, self.store, force=force, spoiled=self.spoiled, unread=self.unread)
        except IngestError as error:
            raise IngestError(f"{self._report(start)}; but {error}") from None
        self.counts["removed"] += pruned.removed
        self.counts["kept"] += pruned.kept

    # ------------------------------------------------------------------------------------------ counts

    def _done(self, count: str) -> None:
        self.counts[count] += 1
        self.bar.update()

    def _skip(self, name: str, reason: str) -> None:
        self.skipped.append(SkippedImage(name, reason))
        self.bar.update()

    def _refuse(self, task: Task, reason: str) -> None:
        self._skip(task.item.name, reason)
        self.under_way.pop(task.item.id, None)
