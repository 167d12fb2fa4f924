"""`ingest_images`: whatever is new or changed goes through the model and into the store.

Owns the order of things, so that a run may die at any point and the next one goes on: a row is written whole under an
id that does not change, nothing is removed before what replaces it is there, and what was written is not done again.

    items -> stored already? -> read and decode (threads) -> embed (this thread, in batches) -> store
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
from llama_index.core.schema import BaseNode, ImageNode, TextNode
from llama_index.core.vector_stores.types import FilterOperator, MetadataFilter, MetadataFilters
from PIL import Image
from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_random_exponential
from tqdm import tqdm

from mm_retriever.errors import IngestError, NodeError, StoreError, StoreMismatchError, StoreUnavailableError
from mm_retriever.image import DEFAULT_POLICY, ImagePolicy
from mm_retriever.ingest.reading import ReadPicture, read_ahead, read_picture
from mm_retriever.ingest.report import IngestReport, SkippedImage
from mm_retriever.ingest.sidecar import Sidecar, read_sidecar
from mm_retriever.ingest.sources import Item, Source, items, path_id, source_folder, walk
from mm_retriever.store import ImageStore

_WINDOW = 256
"""Items looked up in the store with one request."""

_ATTEMPTS = 4
_HOPELESS = 3
"""Failures of the model without one success, after which it is the model that is broken and not the pictures."""

_BOOKKEEPING = ["bytes", "mtime_ns", "digest", "metadata_digest"]
"""What ingestion needs to know of a row; no language model should have to read it."""

T = TypeVar("T")
Vector = npt.NDArray[np.float32]


class PictureEmbedding(Protocol):
    """What ingestion asks of a model; `VisualizedBGEEmbedding` has it."""

    @property
    def dimension(self) -> int:
        """Numbers in one vector."""
        ...

    @property
    def model_id(self) -> str:
        """The name that the store checked on opening."""
        ...

    def prepare_image(self, image: Image.Image) -> Any:
        """Return all that the model needs of a picture, in little memory; called in several threads."""
        ...

    def embed_images(self, images: Sequence[Any]) -> npt.NDArray[np.float32]:
        """Return one vector for each prepared picture, (B, D)."""
        ...

    def get_text_embedding_batch(self, texts: list[str]) -> list[list[float]]:
        """Return one vector for each text."""
        ...


def ingest_images(
    source: Source,
    store: ImageStore,
    embed_model: PictureEmbedding,
    *,
    batch_size: int = 32,
    prune: bool = False,
    sidecar: str | Path | Mapping[str, Mapping[str, Any]] | None = None,
    report_path: str | Path | None = None,
    show_progress: bool = True,
    image_policy: ImagePolicy = DEFAULT_POLICY,
) -> IngestReport:
    """Put pictures into the store and return what was done; a second run embeds only what changed.

    Each picture becomes an `ImageNode` whose metadata are `file_path`, `file_name`, `label` (the folders it lies in),
    `width`, `height`, `bytes`, `digest` (SHA-256 of the file), `mtime_ns`, and the columns of the sidecar. A picture
    that cannot be read is skipped and listed. Memory does not grow with the number of pictures.

    Args:
        source: a folder (recursive; by suffix, hidden files left out, links to folders not followed), a file, or any
            iterable of paths, URLs (`image_policy` must allow them; taken to be unchanging) and LlamaIndex documents or
            nodes: pictures by their pixels, others by their text.
        store: from `open_store`, for the same model.
        embed_model: a `VisualizedBGEEmbedding`.
        batch_size: pictures that go through the model together.
        prune: also remove the rows of pictures below the folder that are gone or can no longer be read.
        sidecar: a JSON or CSV file, or a mapping, with more metadata by path below the folder or by file name. The
            rows follow it: where columns changed or went, a row is written again, not embedded again.
        report_path: write the report there as JSON too.
        show_progress: a progress bar with rate and time left.
        image_policy: what may be read, and how large.

    Raises:
        IngestError: a source or sidecar that cannot be used at all, or a folder without pictures to prune by.
        StoreError: the store failed, for good or for longer than the retries; what was stored stays.
    """
    if batch_size < 1:
        raise IngestError(f"batch_size {batch_size!r}: give 1 or more")
    if (store.dim, store.model_id) != (embed_model.dimension, embed_model.model_id):
        raise StoreMismatchError(
            f"the store was opened for {store.model_id!r} ({store.dim} numbers), "
            f"the model given is {embed_model.model_id!r} ({embed_model.dimension} numbers)"
        )
    folder = source_folder(source)
    if prune and folder is None:
        raise IngestError("prune=True needs a folder as the source: only there does a missing file mean a removed one")
    columns = read_sidecar(sidecar) if sidecar is not None else Sidecar({})
    with tqdm(
        total=_total(source, folder) if show_progress else None,
        desc="Indexing",
        unit="picture",
        disable=not show_progress,
    ) as bar:
        run = _Run(store, embed_model, columns, batch_size, image_policy, bar)
        report = run.report_of(source, folder if prune else None)
    if report_path is not None:
        report.write(report_path)
    return report


def _total(source: Source, folder: str | None) -> int | None:
    if folder is not None:
        return sum(1 for _ in walk(folder, lambda name, reason: None))
    if isinstance(source, str | os.PathLike):
        return 1
    return len(source) if isinstance(source, Sized) else None


@dataclass(frozen=True)
class _Task:
    """An item that is new, or may have changed.

    Attributes:
        extra: metadata from the caller's node and the sidecar.
        stamp: what says that the thing itself is the same: size and time of a file, the digest of a text.
        stored: the row's own account of the same; None if there is no row.
    """

    item: Item
    extra: dict[str, Any]
    stamp: dict[str, Any]
    stored: Mapping[str, Any] | None

    @property
    def same(self) -> bool:
        return self.stored is not None and all(self.stored.get(key) == value for key, value in self.stamp.items())

    @property
    def same_metadata(self) -> bool:
        return self.stored is not None and self.stored.get("metadata_digest", "") == self.metadata_digest

    @property
    def known_digest(self) -> str:
        return str(self.stored.get("digest", "")) if self.stored is not None else ""

    @property
    def metadata_digest(self) -> str:
        """Digest of all that is stored beside the pixels; "" where there is nothing."""
        caption = self.item.text if self.item.is_picture else ""
        return _sha256(json.dumps([caption, self.extra], default=str, sort_keys=True)) if caption or self.extra else ""


class _Run:
    """One call of `ingest_images`."""

    def __init__(
        self,
        store: ImageStore,
        embed_model: PictureEmbedding,
        sidecar: Sidecar,
        batch_size: int,
        policy: ImagePolicy,
        bar: tqdm[Any],
    ) -> None:
        self._store = store
        self._embed_model = embed_model
        self._sidecar = sidecar
        self._batch_size = batch_size
        self._policy = policy
        self._bar = bar
        self._counts: Counter[str] = Counter()
        self._skipped: list[SkippedImage] = []
        self._under_way: set[str] = set()  # ids that are being read or embedded
        self._unreadable: set[str] = set()  # ids of pictures that could not be read in this run
        self._files = 0
        self._model_failures = 0

    def report_of(self, source: Source, prune_folder: str | None) -> IngestReport:
        """Do everything and return the report."""
        start = time.perf_counter()
        try:
            self._ingest(self._tasks(source))
            if prune_folder is not None:
                self._prune(prune_folder)
        except StoreError as error:
            stored = self._counts["indexed"] + self._counts["replaced"]
            raise type(error)(f"{error}. {stored} pictures were stored; the same call goes on from there") from error
        counts = {name: self._counts[name] for name in ("indexed", "replaced", "updated", "unchanged", "removed")}
        return IngestReport(**counts, skipped=tuple(self._skipped), seconds=time.perf_counter() - start)

    # ------------------------------------------------------------------------------------------ what is to be done

    def _tasks(self, source: Source) -> Iterator[_Task]:
        """Yield what is new or may have changed; what is stored as it is needs no task."""
        everything = items(source, self._skip)
        while window := list(islice(everything, _WINDOW)):
            by_id = {item.id: item for item in window if item.id not in self._under_way}
            self._bar.update(len(window) - len(by_id))  # named twice
            stored = self._retried(self._store.columns, list(by_id), _BOOKKEEPING)
            for item in by_id.values():
                if (task := self._task(item, stored.get(item.id))) is not None:
                    self._under_way.add(item.id)
                    yield task

    def _task(self, item: Item, stored: Mapping[str, Any] | None) -> _Task | None:
        stamp: dict[str, Any] = {}  # a URL is taken to be unchanging
        if item.path is not None:
            self._files += 1
            try:
                stamp = _stamp(item.path)
            except (OSError, ValueError) as error:
                self._unreadable.add(item.id)
                self._skip(item.name, str(getattr(error, "strerror", None) or error).lower())
                return None
        elif item.url is None:
            stamp = {"digest": _sha256(item.text)}
        task = _Task(item, {**item.metadata, **self._sidecar.columns(*item.sidecar_names)}, stamp, stored)
        if task.same and task.same_metadata:
            self._done("unchanged")
            return None
        return task

    # ------------------------------------------------------------------------------------------ reading, embedding

    def _ingest(self, tasks: Iterator[_Task]) -> None:
        pictures: list[tuple[_Task, ReadPicture]] = []
        rewritten: list[tuple[_Task, ReadPicture]] = []
        reading = read_ahead(self._without_texts(tasks), self._read, ahead=2 * self._batch_size)
        with closing(reading) as results:
            for task, picture in results:
                if picture.error:
                    self._unreadable.add(task.item.id)
                    self._skip(task.item.name, picture.error, task)
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

    def _without_texts(self, tasks: Iterator[_Task]) -> Iterator[_Task]:
        """Yield the pictures; texts need no reading and are embedded on the way."""
        texts: list[_Task] = []
        for task in tasks:
            if task.item.is_picture:
                yield task
                continue
            texts.append(task)
            if len(texts) == self._batch_size:
                self._embed_texts(texts)
                texts.clear()
        self._embed_texts(texts)

    def _read(self, task: _Task) -> ReadPicture:
        return read_picture(task.item.place, task.known_digest, self._embed_model.prepare_image, self._policy)

    def _embed_pictures(self, pictures: Sequence[tuple[_Task, ReadPicture]]) -> None:
        found = self._vectors([picture.prepared for _, picture in pictures], self._embed_model.embed_images)
        nodes = []
        for (task, picture), vector in zip(pictures, found, strict=True):
            if isinstance(vector, str):
                self._skip(task.item.name, vector, task)
            else:
                nodes.append((task, _picture_node(task, picture.digest, picture.size, vector)))
        self._write(nodes)

    def _embed_texts(self, tasks: Sequence[_Task]) -> None:
        found = self._vectors([task.item.text for task in tasks], self._text_vectors)
        nodes = []
        for task, vector in zip(tasks, found, strict=True):
            if isinstance(vector, str):
                self._skip(task.item.name, vector, task)
            else:
                nodes.append((task, _text_node(task, vector)))
        self._write(nodes)

    def _rewrite(self, pictures: Sequence[tuple[_Task, ReadPicture]]) -> None:
        """Store again what has the same pixels and other metadata, under the vector that it has."""
        ids = [task.item.id for task, _ in pictures]
        rows = self._retried(self._store.columns, ids, ("width", "height", self._store.embedding_field))
        nodes = []
        for task, picture in pictures:
            row = rows.get(task.item.id)
            if row is None:
                self._skip(task.item.name, "its row was removed while it was being read; run again", task)
                continue
            vector = np.asarray(row[self._store.embedding_field], dtype=np.float32)
            nodes.append((task, _picture_node(task, picture.digest, (row["width"], row["height"]), vector)))
        self._write(nodes, embedded=False)

    def _text_vectors(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        return np.asarray(self._embed_model.get_text_embedding_batch(list(texts)), dtype=np.float32)

    def _vectors(self, inputs: Sequence[T], embed: Callable[[Sequence[T]], Vector]) -> list[Vector | str]:
        """A vector for each input, or the reason why there is none: one bad picture does not cost its batch."""
        if not inputs:
            return []
        try:
            vectors = embed(inputs)
        except Exception as error:  # whatever a model raises
            if len(inputs) > 1:
                return [self._vectors([one], embed)[0] for one in inputs]
            self._model_failures += 1
            if self._model_failures >= _HOPELESS and not self._counts["embedded"]:
                raise
            return [f"the model failed: {type(error).__name__}: {error}"[:300]]
        self._counts["embedded"] += len(inputs)
        return [row if np.isfinite(row).all() else "the model gave NaN or infinity for it" for row in vectors]

    # ------------------------------------------------------------------------------------------ storing

    def _write(self, nodes: Sequence[tuple[_Task, BaseNode]], *, embedded: bool = True) -> None:
        if not nodes:
            return
        try:
            self._retried(self._store.add, [node for _, node in nodes])
        except NodeError as error:  # nothing was written
            if len(nodes) == 1:
                self._skip(nodes[0][0].item.name, str(error), nodes[0][0])
                return
            for one in nodes:
                self._write([one], embedded=embedded)
            return
        for task, _ in nodes:
            self._under_way.discard(task.item.id)
            if embedded:
                self._done("indexed" if task.stored is None else "replaced")
            else:
                self._done("unchanged" if task.same_metadata else "updated")

    def _prune(self, folder: str) -> None:
        if not self._files:
            raise IngestError(
                f"prune=True: there is no picture below {folder!r}, so nothing was removed. If that is right and not a "
                "drive that is missing, remove the rows with store.delete_nodes(filters=...) or store.clear()"
            )
        below = folder.rstrip("/") + "/"
        filters = MetadataFilters(
            filters=[
                MetadataFilter(key="file_path", operator=FilterOperator.GTE, value=below),
                MetadataFilter(key="file_path", operator=FilterOperator.LT, value=below[:-1] + chr(ord("/") + 1)),
            ]
        )
        for page in self._store.scan(["file_path"], filters):
            gone = [row["id"] for row in page if self._is_gone(row["id"], row["file_path"])]
            self._retried(self._store.delete_nodes, gone)
            self._counts["removed"] += len(gone)

    def _is_gone(self, row_id: str, path: str) -> bool:
        """Whether ingestion made the row, and its file is no longer there or no longer a picture."""
        if row_id != path_id(path):
            return False
        if row_id in self._unreadable:
            return True
        try:
            _stamp(path)
        except (FileNotFoundError, NotADirectoryError):
            return True
        except (OSError, ValueError):  # no permission, a stale mount: not known to be gone
            return False
        return False

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

    def _skip(self, name: str, reason: str, task: _Task | None = None) -> None:
        self._skipped.append(SkippedImage(name, reason))
        self._bar.update()
        if task is not None:
            self._under_way.discard(task.item.id)


def _picture_node(task: _Task, digest: str, size: tuple[int, int], vector: Vector) -> ImageNode:
    item = task.item
    metadata = {
        "label": item.label or None,
        **task.extra,
        "file_path": item.path,
        "file_name": os.path.basename(item.place),  # noqa: PTH119 - may be a URL
        "width": size[0],
        "height": size[1],
        **task.stamp,
        "digest": digest,
        "metadata_digest": task.metadata_digest,
    }
    return ImageNode(
        id_=item.id,
        text=item.text,
        image_path=item.path,
        image_url=item.url,
        metadata={key: value for key, value in metadata.items() if value not in (None, "")},
        excluded_embed_metadata_keys=_BOOKKEEPING,
        excluded_llm_metadata_keys=_BOOKKEEPING,
        relationships=item.relationships,
        embedding=vector.tolist(),
    )


def _text_node(task: _Task, vector: Vector) -> TextNode:
    return TextNode(
        id_=task.item.id,
        text=task.item.text,
        metadata={**task.extra, **task.stamp, "metadata_digest": task.metadata_digest},
        excluded_embed_metadata_keys=_BOOKKEEPING,
        excluded_llm_metadata_keys=_BOOKKEEPING,
        relationships=task.item.relationships,
        embedding=vector.tolist(),
    )


def _stamp(path: str) -> dict[str, int]:
    """Size and time of a regular file: equal stamps, equal contents."""
    status = os.stat(path)  # noqa: PTH116 - ten times Path's speed
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("not a file")
    return {"bytes": status.st_size, "mtime_ns": status.st_mtime_ns}


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
