"""`reindex`: changes the model of a collection.

Owns the input for the new vector of each row. Every row keeps id, text, metadata and relationships. The rows are
written to a new collection, which replaces the old one in one step (`store/succession.py`): a run may die at any point,
and the next one goes on.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llama_index.core.schema import BaseNode, ImageNode, MetadataMode
from tqdm import tqdm

from mm_retriever.embedding import ComposedEmbedding
from mm_retriever.errors import IngestError, ReindexError, StoreError
from mm_retriever.images import DEFAULT_POLICY, ImagePolicy, ImageSource
from mm_retriever.ingest.reading import ReadImage, read_ahead, read_image
from mm_retriever.ingest.remote import RemoteFile
from mm_retriever.ingest.report import ReindexReport, SkippedImage
from mm_retriever.ingest.vectors import Vectors
from mm_retriever.own_keys import own_columns, own_value
from mm_retriever.request import node_images
from mm_retriever.store.rows import row_to_node
from mm_retriever.store.schema import model_facts
from mm_retriever.store.succession import RowsState, Succession

Row = Mapping[str, Any]

_PASSES = 5
"""Passes over rows that others write meanwhile, before that becomes an error."""

_REMOTE = re.compile(r"(?!https?:|data:)[a-z][a-z0-9+.-]+://", re.IGNORECASE)
_COMPARED = ("text", "_node_content", "_node_type")


def reindex(
    store_uri: str | Path,
    model: str | ComposedEmbedding,
    *,
    collection: str = "mm_retriever",
    token: str | None = None,
    timeout: float = 30.0,
    batch_size: int = 32,
    drop_missing: bool = False,
    show_progress: bool = True,
    image_policy: ImagePolicy = DEFAULT_POLICY,
    fs: Any | None = None,
) -> ReindexReport:
    """Change the model of a collection, and return a report.

    Every image is read once, from the path or URL in its row. The rows are written to a new collection; the old one
    answers as before until the switch at the end, and is then removed. If a run ends before the switch, the same call
    continues it. Rows that others write to the collection meanwhile are included. Stores that have the collection open
    for the old model raise a StoreMismatchError after the switch.

    An image is embedded by its pixels, as by `ingest_images` and `ImageStore.add`. A text that `ingest_images` stored
    is embedded alone, any other with the metadata that LlamaIndex shows an embedding model.

    Args:
        store_uri: a Milvus Lite file, or the URI of a Milvus server.
        model: the new model, or its name.
        collection: name of the collection.
        token: `user:password` or an API key, for servers that ask for one.
        timeout: seconds for connecting, and for each request.
        batch_size: images that go through the model together.
        drop_missing: leave out rows whose image cannot be read; otherwise such rows prevent the switch.
        show_progress: a progress bar with rate and time left.
        image_policy: what may be read, and how large; URLs only if it allows them.
        fs: a file system of fsspec, for images that are not on this machine.

    Raises:
        ReindexError: images cannot be read, or rows keep changing. The collection is as it was.
        StoreError: the store failed, or another process reindexes the same collection.
    """
    if batch_size < 1:
        raise IngestError(f"batch_size {batch_size!r}: give 1 or more")
    embed_model = ComposedEmbedding(model) if isinstance(model, str) else model
    into = model_facts(embed_model)
    if embed_model.compose_nodes:
        raise IngestError("reindex embeds images by their pixels alone: give a model without compose_nodes=True")
    start = time.perf_counter()
    with Succession(store_uri, collection, token=token, timeout=timeout, **into) as succession:
        was = succession.old.model_note or succession.old.model_id or "a model that it does not name"
        rows = succession.old.count("")
        facts: dict[str, Any] = {"collection": collection, "model": embed_model.model_note, "before": was}
        if succession.is_done:
            return ReindexReport(**facts, rows=rows, seconds=time.perf_counter() - start, already=True)
        with tqdm(total=rows, desc="Reindexing", unit="row", smoothing=0, disable=not show_progress) as bar:
            run = _Run(succession, embed_model, batch_size, image_policy, fs, bar)
            try:
                run.finish(drop_missing=drop_missing)
            except ReindexError as error:
                error.unreadable = tuple((row.path, row.reason) for row in run.unreadable)
                raise
            except StoreError as error:
                raise type(error)(
                    f"{error}. {run.embedded} rows were embedded; the same call goes on from there"
                ) from error
        return ReindexReport(
            **facts,
            rows=run.rows - len(run.unreadable),
            embedded=run.embedded,
            reused=run.reused,
            changed=len(run.changed),
            dropped=tuple(run.unreadable),
            seconds=time.perf_counter() - start,
        )


@dataclass(frozen=True)
class _Task:
    """A row that the new collection lacks."""

    row: Row
    node: BaseNode
    images: tuple[ImageSource, ...]

    @property
    def name(self) -> str:
        """The place of its image, or its id, for people."""
        return str(self.images[0])[:300] if self.images else str(self.row["id"])


@dataclass
class _Run:
    """One call of `reindex`."""

    succession: Succession
    embed_model: ComposedEmbedding
    batch_size: int
    policy: ImagePolicy
    fs: Any | None
    bar: tqdm[Any]
    rows: int = 0
    embedded: int = 0
    reused: int = 0
    unreadable: list[SkippedImage] = field(default_factory=list)
    changed: dict[str, Any] = field(default_factory=dict)  # rows whose image has changed: what was stored of them
    first: bool = True

    def __post_init__(self) -> None:
        self.vectors = Vectors(self.embed_model)

    def finish(self, *, drop_missing: bool) -> None:
        """Copy rows until none has changed meanwhile, then switch."""
        for _ in range(_PASSES):
            state = self._copy()
            self.first = False
            if self.unreadable and not drop_missing:
                raise _unreadable(self.unreadable, self.rows)
            kept = self.rows - len(self.unreadable)
            if self.succession.count_new() != kept:
                self.succession.remove_gone()
            if self.succession.switch(state, kept):
                return
        raise ReindexError(
            f"rows of {self.succession.old.name!r} were written or removed all the time, {_PASSES} times over: stop "
            "what writes to it, and run it again. Nothing was switched, and what was embedded is kept"
        )

    def _copy(self) -> str:
        """Write every row that the new collection lacks, and return the state of the old one."""
        self.rows = 0
        self.unreadable.clear()
        plain, exact = RowsState(exact=False), RowsState(exact=True)
        lacking: list[str] = []
        images: list[tuple[_Task, ReadImage]] = []
        with closing(read_ahead(self._tasks(plain, exact, lacking), self._read, ahead=2 * self.batch_size)) as reading:
            texts: list[_Task] = []
            for task, image in reading:
                if image.error:
                    self._refuse(task, image.error)
                elif task.images:
                    images.append((task, image))
                else:
                    texts.append(task)
                if len(images) == self.batch_size:
                    self._embed_images(images)
                    images.clear()
                if len(texts) == self.batch_size:
                    self._embed_texts(texts)
                    texts.clear()
        self._embed_images(images)
        self._embed_texts(texts)
        return str(exact if lacking else plain)

    def _tasks(self, plain: RowsState, exact: RowsState, lacking: list[str]) -> Iterator[_Task]:
        """Yield the rows to copy; `lacking` gets the id of a row without a checksum, if there is one."""
        known = self.succession.count_new() > 0
        for page in self.succession.old_rows():
            plain.add(page)
            exact.add(page)
            if not lacking:
                lacking += [row["id"] for row in page if not row.get("_row_checksum")][:1]
            self.rows += len(page)
            have = self.succession.new_rows([row["id"] for row in page]) if known else {}
            for row in page:
                content = _content(row)
                new = have.get(row["id"])
                if new is not None and (_content(new) == content or self.changed.get(row["id"]) == content):
                    self._reuse()
                    continue
                node = row_to_node(row)
                yield _Task(row, node, node_images(node))

    def _reuse(self) -> None:
        if self.first:
            self.reused += 1
            if not self.bar.disable:
                self.bar.initial += 1  # no part of the rate
                self.bar.update()

    # ------------------------------------------------------------------------------------------ reading, embedding

    def _read(self, task: _Task) -> ReadImage:
        """The image of a row, from the first place where it can be read; an empty result for a text."""
        if isinstance(task.node, ImageNode) and not task.images and own_value(task.node.metadata, "width"):
            return ReadImage(error="it came as bytes, which no store keeps: ingest it again under the new model")
        outcome = ReadImage()
        for place in task.images:
            source: Any = place
            if isinstance(place, str) and _REMOTE.match(place):
                if self.fs is None:
                    return ReadImage(error="it is in no file system of this machine: give fs=, in Python")
                source = RemoteFile(self.fs, place)
            read = read_image(source, "", self.embed_model.prepare_image, self.policy)
            if not read.error:
                return read
            outcome = outcome if outcome.error else read
        return outcome

    def _embed_images(self, images: list[tuple[_Task, ReadImage]]) -> None:
        vectors = self.vectors.of_images([image.prepared for _, image in images])
        rows = []
        for (task, image), vector in zip(images, vectors, strict=True):
            if isinstance(vector, str):
                self._refuse(task, vector)
            else:
                rows.append((task.row, self._changed_node(task, image), vector))
        self._write(rows)

    def _changed_node(self, task: _Task, image: ReadImage) -> BaseNode | None:
        """The node to store if the file changed since it was indexed; the next `index` updates its other metadata."""
        known = own_value(task.node.metadata, "digest")
        if known in (None, "", image.digest):
            return None
        facts = {"digest": image.digest, "width": image.size[0], "height": image.size[1]}
        metadata = dict(task.node.metadata)
        for key, value in facts.items():
            plain, beside = own_columns(key)
            metadata[beside if beside in metadata else plain] = value
        self.changed[task.row["id"]] = _content(task.row)
        return task.node.model_copy(update={"metadata": metadata})

    def _embed_texts(self, tasks: list[_Task]) -> None:
        rows = []
        for task, vector in zip(tasks, self.vectors.of_texts([_text(task.node) for task in tasks]), strict=True):
            if isinstance(vector, str):
                self._refuse(task, vector)
            else:
                rows.append((task.row, None, vector))
        self._write(rows)

    def _write(self, rows: Sequence[tuple[Any, BaseNode | None, Any]]) -> None:
        if rows:
            self.succession.write(rows)
            self.embedded += len(rows)
            self.bar.update(len(rows))

    def _refuse(self, task: _Task, reason: str) -> None:
        self.unreadable.append(SkippedImage(task.name, reason))
        self.succession.remove([task.row["id"]])  # of an earlier run, when it could be read
        self.bar.update()


def _content(row: Row) -> list[Any]:
    return [row.get(name) or "" for name in _COMPARED]


def _text(node: BaseNode) -> str:
    text = node.get_content(metadata_mode=MetadataMode.NONE)
    ingested = own_value(node.metadata, "digest") == hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
    return text if ingested else node.get_content(metadata_mode=MetadataMode.EMBED)


def _unreadable(unreadable: list[SkippedImage], rows: int) -> ReindexError:
    first = unreadable[0]
    return ReindexError(
        f"{len(unreadable)} of {rows} rows cannot be embedded anew, for example {first.path}: {first.reason}. Nothing "
        "was switched, and what was embedded is kept: run it again when they can be read, or leave their rows out with "
        "--drop-missing (drop_missing=True in Python)"
    )
