"""The same shards by many workers: `embed_to_shards` as a Ray Data job.

Owns what is asked of Ray: a row for each shard that is not done, a pool of workers that hold the model, and how errors
come back from them. Ray is loaded when it is used.
"""

from __future__ import annotations

import copy
import logging
import os
import pickle
import socket
import traceback
import uuid
from collections.abc import Generator, Iterator, MutableMapping, Sequence
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from mm_retriever.bulk.plan import PathsOrURLs, ShardPlan
from mm_retriever.bulk.shards import Progress, ShardReport, ShardWriter, embed_to_shards
from mm_retriever.embedding import ComposedEmbedding
from mm_retriever.errors import IngestError, MissingExtraError, MMRetrieverError

_DEATHS = 3
"""Workers that may die at one shard before the shard, and not the machine, is taken to kill them."""

_PATIENCE = 10.0
"""Seconds for a Ray at another address to answer."""

_QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_BACKEND_LOG_LEVEL": "fatal"}
"""For a Ray of our own: no report to its makers, and no remarks on how Ray Data uses Ray."""


def embed_to_shards_on_ray(
    source: PathsOrURLs | None,
    out: str | Path,
    embed_model: ComposedEmbedding,
    *,
    workers: int | None = None,
    cpus_per_worker: float = 1.0,
    gpus_per_worker: float | None = None,
    device: str | None = None,
    **options: Any,
) -> ShardReport:
    """Do what `embed_to_shards` does, a shard to a worker, on the machines of a Ray cluster; return what they hold.

    Plan, files and report are the same: where one of the two functions was broken off, the other goes on. A worker that
    dies is replaced by Ray, and begins its shard again; what is done stays as it is.

    Runs on the Ray that the program is connected to, or the one that the environment's `RAY_ADDRESS` names; otherwise
    on one of its own on this machine, for as long as the call takes. The images and `out` must be on a file system
    that all machines see under the same paths, and this package installed on each. A model given as a path is given as
    an absolute one.

    Args:
        source: as in `embed_to_shards`; listed by the caller's machine.
        out: as in `embed_to_shards`.
        embed_model: pickled for the workers. A `VisualizedBGEEmbedding` pickles as its options: each worker loads the
            weights itself.
        workers: how many models work at a time; default: as many as the cluster has room for now.
        cpus_per_worker: set aside for each, and how many threads its model uses.
        gpus_per_worker: set aside for each, a half means two workers to one; default: one if `device` is "cuda".
        device: where workers load the model: "cuda" for GPUs that this machine lacks; default: as `embed_model` is.
        **options: of `embed_to_shards`. A sparse model given as `hybrid` is pickled too; `rows_per_shard` is what a
            worker does at a time, and loses when it dies; progress moves with each shard that is done.

    Raises:
        IngestError: as in `embed_to_shards`; the model does not pickle; there is no room for a worker; or a shard kills
            every worker that begins it.
        MissingExtraError: Ray is not installed, or pyarrow.
    """
    try:
        import ray.data  # noqa: F401 - a missing package is named before anything is done
    except ImportError as error:
        raise MissingExtraError.of(error, "ray", "ray") from error
    if device is not None:
        embed_model = _on_device(embed_model, device)
    if gpus_per_worker is None:
        gpus_per_worker = float(str(getattr(embed_model, "device", "")).startswith("cuda"))
    needs = {"CPU": cpus_per_worker, "GPU": gpus_per_worker}
    if not any(needs.values()) or min(needs.values()) < 0 or (workers is not None and workers < 1):
        raise IngestError(f"workers {workers!r} with {needs}: give 1 or more, and a CPU or a GPU to each")
    write_shards = partial(_on_ray, workers=workers, needs=needs)
    return embed_to_shards(source, out, embed_model, write_shards=write_shards, **options)


def _on_device(embed_model: ComposedEmbedding, device: str) -> ComposedEmbedding:
    """Return a copy that is loaded on another device where it is unpickled."""
    if getattr(embed_model, "device", None) is None:
        raise IngestError(f"device {device!r}: {type(embed_model).__name__} has none to be changed")
    moved: Any = copy.copy(embed_model)
    moved.device = device
    return moved  # type: ignore[no-any-return]


def _on_ray(
    writer: ShardWriter,
    unfinished: Sequence[int],
    progress: Progress,
    *,
    workers: int | None,
    needs: dict[str, float],
) -> int:
    """Have shards written by workers, and return how many they made."""
    from ray import cloudpickle

    if not unfinished:
        return 0
    try:
        packed = cloudpickle.dumps(writer)  # here, and as bytes: where it fails, here or there, is known then
    except Exception as error:  # whatever a model raises
        raise IngestError(f"the model cannot be sent to workers, it does not pickle: {error}") from error
    written = 0
    with _ray() as ours, _quiet_ray_data():
        if workers is None or ours:
            workers = min(workers or len(unfinished), _room(needs))
        with closing(_answers(writer, packed, unfinished, min(workers, len(unfinished)), needs)) as answers:
            for answer in answers:
                if answer["error"]:
                    _raise(answer["error"])
                written += answer["written"]
                progress(writer.plan.size(answer["shard"]))
    return written


def _answers(
    writer: ShardWriter, packed: bytes, unfinished: Sequence[int], workers: int, needs: dict[str, float]
) -> Generator[dict[str, Any], None, None]:
    """Yield the answers of workers as they arrive."""
    import ray.data

    # A block of one row is a task of one shard, and a worker has one task at a time: none waits for a slower one.
    # Ray Data itself restarts workers that die and gives them their task again, any number of times.
    rows = ray.data.from_items([{"shard": number} for number in unfinished], override_num_blocks=len(unfinished))
    rows.context.enable_progress_bars = False
    rows.context.execution_no_progress_timeout_s = -1  # or a shard that takes half an hour would end the job
    answers = rows.map(
        _Worker,  # type: ignore[arg-type]
        fn_constructor_args=(writer.plan, writer.call, packed),
        compute=ray.data.ActorPoolStrategy(size=workers, max_tasks_in_flight_per_actor=1),
        num_cpus=needs["CPU"],
        num_gpus=needs["GPU"],
    )
    tables: Any = answers.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)
    for table in tables:
        yield from table.to_pylist()


class _Worker:
    """Runs in a process of Ray: a writer, unpickled at the first shard, for one shard after the other."""

    def __init__(self, plan: ShardPlan, call: str, packed: bytes) -> None:
        self._plan = plan
        self._call = call
        self._packed = packed
        self._writer: ShardWriter | None = None

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        answer = {"shard": row["shard"], "written": False, "error": b""}
        try:
            with self._marked(row["shard"]):
                if self._writer is None:
                    self._writer = pickle.loads(self._packed)  # noqa: S301 - our caller's own, as everything in Ray
                answer["written"] = self._writer.write(row["shard"])
        except Exception as error:  # raised here, Ray would wrap it in its own, and print pages of it
            answer["error"] = _packed_error(error)
        return answer

    @contextmanager
    def _marked(self, number: int) -> Iterator[None]:
        """Keep a file while a worker is at a shard; one that stays tells of a death, which Ray Data does not count."""
        stem = self._plan.shard(number).stem
        mark = f"{stem}.begun.{self._call}"  # removed with the drafts of the shard
        if len(list(self._plan.drafts.glob(f"{mark}.*"))) >= _DEATHS:
            raise IngestError(
                f"{_DEATHS} workers died, one after the other, at the images of plan/{stem}.jsonl: too little memory "
                "for the model and so many rows, or an image that crashes what decodes it"
            )
        own = self._plan.drafts / f"{mark}.{uuid.uuid4().hex}"
        own.touch()
        try:
            yield
        finally:
            own.unlink(missing_ok=True)


def _packed_error(error: Exception) -> bytes:
    from ray import cloudpickle

    where = traceback.format_exc()
    try:
        packed: bytes = cloudpickle.dumps((error, where))
        pickle.loads(packed)  # noqa: S301 - some pickle, and cannot be unpickled
    except Exception:  # whatever a model raises
        packed = cloudpickle.dumps((RuntimeError(f"{type(error).__name__}: {error}"), where))
    return packed


def _raise(packed: bytes) -> None:
    """Raise the error of a worker; one that is not ours has the worker's traceback as its cause."""
    error, where = pickle.loads(packed)  # noqa: S301 - our workers' own, as everything in Ray
    raise error from None if isinstance(error, MMRetrieverError) else RuntimeError(f"in a worker:\n{where}")


def _room(needs: dict[str, float]) -> int:
    """Return how many workers there is room for."""
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    fits = [min(node.get(what, 0.0) / need for what, need in needs.items() if need) for node in nodes]
    room = sum(int(workers + 1e-9) for workers in fits)  # ten tenths are one
    if not room:
        raise IngestError(f"no machine of the cluster has {needs}; if it grows by itself, say with how many workers=")
    return room


# ------------------------------------------------------------------------------------------ Ray itself


@contextmanager
def _ray() -> Iterator[bool]:
    """Use the program's Ray, the environment's, or a temporary one of our own; yields whether it is ours."""
    import ray

    if ray.is_initialized():
        yield False
        return
    address = os.environ.get("RAY_ADDRESS") or "local"
    if address == "local":
        _start_ray()
    else:
        _connect(address)
    try:
        yield address == "local"
    finally:
        ray.shutdown()


def _connect(address: str) -> None:
    import ray

    host, _, port = address.rpartition("://")[2].rpartition(":")
    try:
        if port.isdigit():  # asked by itself, Ray would wait for a quarter of an hour
            socket.create_connection((host.strip("[]"), int(port)), _PATIENCE).close()
        ray.init(log_to_driver=False, logging_level=logging.ERROR)
    except OSError as error:
        raise IngestError(f"there is no Ray at RAY_ADDRESS {address!r}: {error}") from error


def _start_ray() -> None:
    """Start a Ray that nobody else can reach, without its web page.

    No public option keeps it off the network: `ENABLE_RAY_CLUSTER` is read from the environment when Ray is imported,
    and left set it would hold for every later Ray of the program.
    """
    import ray
    from ray._private import ray_constants

    # A cluster takes the address of the network for its own, whatever it is given, and listens there.
    alone = _changed(vars(ray_constants), ENABLE_RAY_CLUSTER=False)
    with alone, _changed(os.environ, **{name: os.environ.get(name, value) for name, value in _QUIET.items()}):
        quiet: dict[str, Any] = {"include_dashboard": False, "log_to_driver": False, "logging_level": logging.ERROR}
        ray.init("local", _node_ip_address="127.0.0.1", **quiet)


@contextmanager
def _changed(settings: MutableMapping[str, Any], **changes: Any) -> Iterator[None]:
    """Settings that are changed for the duration of a block."""
    before = {name: settings[name] for name in changes if name in settings}
    settings.update(changes)
    try:
        yield
    finally:
        for name in changes:
            settings.pop(name, None)
        settings.update(before)


@contextmanager
def _quiet_ray_data() -> Iterator[None]:
    """Keep the messages of Ray Data in its log file: those that matter are raised as errors."""
    handlers = logging.getLogger("ray.data").handlers
    consoles = {handler: handler.level for handler in handlers if isinstance(handler, logging.StreamHandler)}
    try:
        for console in consoles:
            console.setLevel(logging.CRITICAL)
        yield
    finally:
        for console, level in consoles.items():
            console.setLevel(level)
