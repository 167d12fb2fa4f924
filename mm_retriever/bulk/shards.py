"""Images into shards, files of rows that a Milvus server imports by itself: for collections of millions.

Owns how one shard is made: its part of the plan is read ahead, embedded, and written to one file that appears whole. A
shard is done when its file exists; a run that died is continued by the next, also on another machine.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import KW_ONLY, asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from llama_index.core.schema import ImageNode
from tqdm import tqdm

from mm_retriever.bulk.plan import PathsOrURLs, ShardPlan, make_plan, read_plan
from mm_retriever.embedding import ComposedEmbedding
from mm_retriever.errors import ImageLoadError, IngestError, StoreError, StoreMismatchError
from mm_retriever.images import DEFAULT_POLICY, ImagePolicy
from mm_retriever.ingest.folder import IgnoredFiles
from mm_retriever.ingest.nodes import Layer, Task, current_stamp, image_node, write_each
from mm_retriever.ingest.reading import ReadImage, read_ahead, read_image
from mm_retriever.ingest.report import SkippedImage
from mm_retriever.ingest.sidecar import SidecarSource
from mm_retriever.ingest.vectors import Vectors
from mm_retriever.notebook import shown_facts
from mm_retriever.store import ImageStore, SparseEmbedding, model_facts, same_model
from mm_retriever.store.bulk_import import ImportReport, import_files
from mm_retriever.store.parquet import ParquetRows, read_account, remove_drafts
from mm_retriever.store.words import words_name


@dataclass(frozen=True)
class ShardReport:
    """What the shards in a folder hold, after one call of `embed_to_shards`."""

    shards: int
    written: int  # by this call; the others were done before
    rows: int  # images in all shards
    skipped: tuple[SkippedImage, ...]  # images in none of them
    seconds: float  # of the whole call
    ignored: tuple[IgnoredFiles, ...] = ()  # what the folder holds beside images
    unused_rows: int = 0  # rows of the sidecar that match no image
    notes: tuple[str, ...] = ()  # everything else that should be known, a line each

    def __str__(self) -> str:
        skipped = f", {len(self.skipped)} skipped" if self.skipped else ""
        skipped += f", {ignored} ignored" if (ignored := sum(files.count for files in self.ignored)) else ""
        return f"{self.rows} rows in {self.shards} shards, {self.written} of them new{skipped}, in {self.seconds:.1f} s"

    def _repr_html_(self) -> str:
        left_out = (f"{image.path}: {image.reason}" for image in self.skipped)
        not_taken = (f"{files.count} {files.kind}: {files.reason}" for files in self.ignored)
        return shown_facts(str(self), {}, [*self.notes, *left_out, *not_taken])

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON takes it."""
        return asdict(self)


Progress: TypeAlias = Callable[[int], object]
"""Called with the number of images that were just dealt with."""


def embed_to_shards(
    source: PathsOrURLs | None,
    out: str | Path,
    embed_model: ComposedEmbedding,
    *,
    rows_per_shard: int | None = None,
    batch_size: int = 32,
    sidecar: SidecarSource | None = None,
    hybrid: bool | SparseEmbedding = False,
    show_progress: bool = True,
    image_policy: ImagePolicy = DEFAULT_POLICY,
    exif: bool = True,
    write_shards: Callable[[ShardWriter, Sequence[int], Progress], int] | None = None,
) -> ShardReport:
    """Embed images into Parquet files that a Milvus server imports by itself, and return what they hold.

    The rows are those that `ingest_images` would store. The first call fixes which image is in which shard; whatever
    happens to it or to the folder, the same call goes on with that plan and does the shards that are not done. To have
    a shard embedded again, remove its file. One shard of rows is in memory at a time, whatever the size of the source.

    The files in `out/shards` go to the object storage of the server (`aws s3 sync`); `import_shards` has them imported.
    On Zilliz Cloud that is `pymilvus.bulk_writer.bulk_import`, which takes the same files.

    Args:
        source: a folder as in `ingest_images`, or an iterable of paths and URLs; None goes on with the plan in `out`.
        out: a folder for the plan and the shards.
        embed_model: a `ComposedEmbedding` such as `VisualizedBGEEmbedding`.
        rows_per_shard: images in one file; default: as the plan in `out` has it, 10,000 in a new one.
        batch_size: images that go through the model together.
        sidecar: as in `ingest_images`; read when the plan is made.
        hybrid: as the collection is, or will be, opened with.
        show_progress: a progress bar with rate and time left.
        image_policy: what may be read, and how large.
        exif: as in `ingest_images`.
        write_shards: writes the shards of these numbers, and returns how many of them it made; default: one after the
            other in this process.

    Raises:
        IngestError: a source that cannot be used at all, or a plan in `out` for something else.
        MissingExtraError: pyarrow is not installed.
    """
    start = time.perf_counter()
    plan = make_plan(
        source,
        out,
        **model_facts(embed_model),
        words=words_name(hybrid),
        rows_per_shard=rows_per_shard,
        sidecar=sidecar,
    )
    writer = ShardWriter(plan, embed_model, hybrid=hybrid, batch_size=batch_size, image_policy=image_policy, exif=exif)
    unfinished = plan.unfinished()
    done = plan.images - sum(plan.size(number) for number in unfinished)
    with tqdm(total=plan.images, initial=done, desc="Embedding", unit="image", disable=not show_progress) as bar:
        written = (write_shards or _one_after_another)(writer, unfinished, bar.update)
    rows, skipped = 0, list(plan.skipped)
    for number in range(plan.shards):
        held, left_out = read_shard(plan, number)
        rows += held
        skipped += left_out
        remove_drafts(plan.shard(number), plan.drafts)
    seconds = time.perf_counter() - start
    return ShardReport(plan.shards, written, rows, tuple(skipped), seconds, plan.ignored, plan.unused_rows, plan.notes)


def _one_after_another(writer: ShardWriter, unfinished: Sequence[int], progress: Progress) -> int:
    return sum(writer.write(number, progress) for number in unfinished)


@dataclass
class ShardWriter:
    """Makes the shards of one plan, one at a time, with one model; goes to other processes if the model does."""

    plan: ShardPlan
    embed_model: ComposedEmbedding
    _: KW_ONLY
    hybrid: bool | SparseEmbedding
    batch_size: int
    image_policy: ImagePolicy
    exif: bool = True
    call: str = field(default_factory=lambda: uuid.uuid4().hex)  # copies share it, and each shard names its writer

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise IngestError(f"batch_size {self.batch_size!r}: give 1 or more")
        self._vectors = Vectors(self.embed_model)

    def write(self, number: int, progress: Progress = lambda images: None) -> bool:
        """Make a shard; return False if another writer, no copy of this one, made it meanwhile."""
        path = self.plan.shard(number)
        if path.exists():
            return _account(path)[1].get("call") == self.call
        self._check_models()
        rows = ParquetRows(self.plan.dimension, self.hybrid)
        skipped: list[tuple[str, str]] = []
        batch: list[tuple[Task, ReadImage]] = []
        with closing(read_ahead(self._tasks(number, skipped), self._read, ahead=2 * self.batch_size)) as images:
            for task, image in images:
                if image.error:
                    skipped.append((task.item.name, image.error))
                    continue
                batch.append((task, image))
                if len(batch) == self.batch_size:
                    self._embed(batch, rows, skipped)
                    progress(len(batch))
                    batch.clear()
        self._embed(batch, rows, skipped)
        if skipped and self.plan.source_is_gone():
            raise IngestError(f"{self.plan.source!r} is empty or gone: a drive that is missing? Its images are planned")
        progress(self.plan.size(number) - (len(rows) + len(skipped)))
        account = {"plan": self.plan.id, "shard": number, "skipped": skipped, "call": self.call}
        return rows.write(path, self.plan.drafts, account)

    def _check_models(self) -> None:
        """In another process, and on another machine, the models were loaded again: from the same files?"""
        planned = (self.plan.model_id, self.plan.words)
        loaded = (self.embed_model.model_id, words_name(self.hybrid))
        if not same_model(planned[0], loaded[0]) or not same_model(planned[1] or "", loaded[1] or ""):
            raise IngestError(f"the shards are planned for the models {planned}, and {loaded} were loaded here")

    def _tasks(self, number: int, skipped: list[tuple[str, str]]) -> Iterator[Task]:
        for item in self.plan.items(number):
            try:
                stamp = current_stamp(item)
            except ImageLoadError as error:
                skipped.append((item.name, str(error)))
                continue
            layer = Layer(item.text, item.metadata)
            yield Task(item, {"sidecar": layer} if layer else {}, stamp, stored=None)

    def _read(self, task: Task) -> ReadImage:
        return read_image(task.item.source, "", self.embed_model.prepare_image, self.image_policy, self.exif)

    def _embed(
        self, batch: Sequence[tuple[Task, ReadImage]], rows: ParquetRows, skipped: list[tuple[str, str]]
    ) -> None:
        nodes: list[tuple[Task, ImageNode]] = []
        vectors = self._vectors.of_images([image.prepared for _, image in batch])
        for (task, image), vector in zip(batch, vectors, strict=True):
            if isinstance(vector, str):
                skipped.append((task.item.name, vector))
            else:
                nodes.append((task, image_node(task, image.digest, image.size, vector, image.exif)))
        write_each(
            nodes,
            lambda nodes: rows.add([node for _, node in nodes]),
            lambda task, reason: skipped.append((task.item.name, reason)),
        )


def read_shard(plan: ShardPlan, number: int) -> tuple[int, list[SkippedImage]]:
    """Return how many rows a shard has, and which of its images it lacks."""
    path = plan.shard(number)
    if not path.exists():
        raise IngestError(f"{len(plan.unfinished())} of {plan.shards} shards are not embedded yet: do that first")
    rows, account = _account(path)
    if (account.get("plan"), account.get("shard")) != (plan.id, number):
        raise IngestError(f"{str(path)!r} is a shard of another plan: remove it, and embed it again")
    return rows, [SkippedImage(*names) for names in account["skipped"]]


def _account(path: Path) -> tuple[int, dict[str, Any]]:
    """The number of rows in a shard, and its writer's account."""
    try:
        return read_account(path)
    except StoreError as error:
        raise StoreError(f"{error}: remove it, and embed it again") from error


def import_shards(
    out: str | Path,
    store: ImageStore,
    *,
    remote_folder: str = "",
    timeout: float = 600.0,
    show_progress: bool = True,
) -> ImportReport:
    """Have a Milvus server import the shards of a folder, and return when each row is there exactly once.

    The server reads the files from its own object storage: copy `out/shards` there first. Rows whose ids are there
    already, from an earlier call or from `ingest_images`, stay as they are if their whole shard is there; otherwise
    those of the shard are removed and imported. A call that died is repeated: it waits for what the server still does.
    Afterwards every id is counted, and some vectors of each file are compared. Nothing else should store these
    images meanwhile.

    Args:
        out: the folder of `embed_to_shards`, with every shard done.
        store: on a Milvus server, opened for the model of the shards.
        remote_folder: where the files are in the server's bucket, `photos/shards` for
            `aws s3 sync out/shards s3://BUCKET/photos/shards`; for a server that keeps its data in local files, the
            folder as the server sees it.
        timeout: seconds without any progress of the server.
        show_progress: a progress bar.

    Raises:
        IngestError: shards are missing, or not of one plan.
        StoreMismatchError: the store is for another model, or another index of words.
        StoreUnavailableError: the server went away, or makes no progress.
        StoreError: the server refused a file, the message has its reason; or the store is a Milvus Lite file.
    """
    plan = read_plan(out)
    if store.dim != plan.dimension or not same_model(plan.model_id, store.model_id):
        raise StoreMismatchError(
            f"the shards are of {plan.model_id!r} ({plan.dimension} numbers), "
            f"the store was opened for {store.model_id!r} ({store.dim} numbers)"
        )
    files = [plan.shard(number) for number in range(plan.shards) if read_shard(plan, number)[0]]
    return import_files(
        store, files, remote_folder=remote_folder, words=plan.words, timeout=timeout, show_progress=show_progress
    )
