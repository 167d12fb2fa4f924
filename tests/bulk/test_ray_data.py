"""The shards of `embed_to_shards`, made by the workers of a real Ray on this machine: each once, whoever dies."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from mm_retriever.bulk import ShardReport, embed_to_shards, embed_to_shards_on_ray
from mm_retriever.bulk.plan import read_plan
from mm_retriever.bulk.shards import ShardWriter
from mm_retriever.embedding import VisualizedBGEEmbedding
from mm_retriever.errors import IngestError, MissingExtraError, ModelNotFoundError
from mm_retriever.files import write_atomically
from mm_retriever.images import DEFAULT_POLICY
from mm_retriever.store.rows import vector_is_damaged
from mm_retriever.store.schema import CHECKSUM_FIELD
from tests.support.colour_embedding import COLOURS, ColourEmbedding, paint
from tests.support.processes import ROOT, ends, python
from tests.support.settled import settle
from tests.support.shards import SMALL, check_whole, rows_of, skips

pytestmark = pytest.mark.slow  # Ray starts in some seconds, and so does each worker

CLUSTER = """
import logging, sys, ray
ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
print(ray.get_runtime_context().gcs_address, flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="module", autouse=True)
def environment() -> Iterator[None]:
    """What workers need to import the models below, and no file in anybody's home."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("RAY_AUTH_MODE", "token")
        patch.setenv("RAY_AUTH_TOKEN", "0123456789abcdef" * 2)
        patch.delenv("RAY_ADDRESS", raising=False)
        yield


@pytest.fixture(scope="module")
def cluster(environment) -> Iterator[str]:
    """The address of a Ray that is not ours."""
    process = python("-c", CLUSTER, stdin=subprocess.PIPE)
    try:
        yield process.stdout.readline().strip()
    finally:
        family = psutil.Process(process.pid).children(recursive=True)
        process.communicate("")
        assert not still_there(family)


def still_there(family: list[psutil.Process]) -> list[psutil.Process]:
    """Those of some processes that do not end within seconds; a dead child that nobody has waited for has ended."""
    deadline = time.monotonic() + 20
    while left := [one for one in family if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]:
        if time.monotonic() > deadline:
            break
        time.sleep(0.1)
    return left


@pytest.fixture
def folder(tmp_path) -> Path:
    for number in range(23):
        paint(tmp_path / "photos" / ("cars" if number % 2 else "") / f"{number:02d}.png", list(COLOURS)[number % 8])
    (tmp_path / "photos" / "cut.png").write_bytes(b"\x89PNG")
    return tmp_path / "photos"


def on_ray(source: Any, out: Path, model: Any = None, **options: Any) -> ShardReport:
    return embed_to_shards_on_ray(source, out, model or ColourEmbedding(), **{**SMALL, **options})


class Broken(ColourEmbedding):
    def embed_images(self, images):
        raise RuntimeError("the device is lost")


def planned(folder: Path, out: Path) -> None:
    """A plan, and nothing else."""
    with pytest.raises(RuntimeError):
        embed_to_shards(folder, out, Broken(), **SMALL)
    assert read_plan(out).shards == 5


class Slow(ColourEmbedding):
    """Leaves the number of its process behind, and takes its time."""

    left_in: str = ""

    def embed_images(self, images):
        write_atomically(Path(self.left_in), str(os.getpid()).encode())
        time.sleep(0.1)
        return super().embed_images(images)


def test_the_rows_are_those_of_embed_to_shards(folder, tmp_path, monkeypatch, cluster):
    """By the bundled model, which each worker loads by itself, on a Ray that the environment names.

    And on a device that the caller's machine lacks: here that is the CPU, for a caller whose model can compute nothing.
    Truth: `embed_to_shards`. Vectors within 1e-6, for other threads add numbers up in another order.
    """
    monkeypatch.setenv("RAY_ADDRESS", cluster)
    settle(folder)  # or the second would store more of a file's stamp than the first
    model, idle = (VisualizedBGEEmbedding("tiny", device=device) for device in ("cpu", "meta"))
    options = {"rows_per_shard": 5, "batch_size": 2, "hybrid": True, "sidecar": {"cars/01.png": {"price": 9.5}}}
    report = embed_to_shards(folder, tmp_path / "here", model, show_progress=False, **options)
    again = on_ray(folder, tmp_path / "ray", idle, workers=1, device="cpu", **options)
    assert idle.device == "meta"
    assert (again.shards, again.written, again.rows) == (report.shards, report.written, report.rows) == (5, 5, 23)
    assert skips(again) == skips(report) != []
    for row, other in zip(rows_of(tmp_path / "ray"), rows_of(tmp_path / "here"), strict=True):
        assert not vector_is_damaged(row)
        assert np.allclose(row.pop("embedding"), other.pop("embedding"), atol=1e-6)
        ours, theirs = (one.pop(CHECKSUM_FIELD).rpartition("-") for one in (row, other))
        assert ours[0] == theirs[0]  # the rest is of the vector
        assert row == other


# ------------------------------------------------------------------------------------------ a Ray of our own

RUN = """
import sys
from mm_retriever.bulk import embed_to_shards_on_ray
from tests.bulk.test_ray_data import Slow

assert "ray" not in sys.modules
options = {"rows_per_shard": 5, "batch_size": 2, "workers": 1, "show_progress": False}
print(embed_to_shards_on_ray(sys.argv[1], sys.argv[2], Slow(left_in=sys.argv[3]), **options))
"""


def family_at(shards: Path, count: int, process: subprocess.Popen[str]) -> list[psutil.Process]:
    """All processes below a run, at the moment when it has made so many shards."""
    while len(list(shards.glob("*.parquet"))) < count:
        assert process.poll() is None
        time.sleep(0.01)
    return psutil.Process(process.pid).children(recursive=True)


def test_a_ray_of_our_own_is_silent_closed_to_others_and_gone_afterwards(folder, tmp_path, monkeypatch):
    """Our choice: nothing listens for, or speaks to, another machine; the output is the program's.

    Nor does Ray Data end a job that has gone without news for longer than its limit: a large shard takes hours.
    """
    monkeypatch.setenv("RAY_DATA_EXECUTION_NO_PROGRESS_TIMEOUT_S", "0.2")
    with (tmp_path / "errors").open("w") as errors:
        process = python("-c", RUN, folder, tmp_path / "out", tmp_path / "pid", stderr=errors)
    family = family_at(tmp_path / "out" / "shards", 1, process)
    connections = [one for member in [psutil.Process(process.pid), *family] for one in addresses(member)]
    assert process.communicate(timeout=60)[0].startswith("23 rows in 5 shards, 5 of them new, 1 skipped, in")
    assert process.returncode == 0
    assert len(connections) > 10
    assert {address.removeprefix("::ffff:") for address in connections} == {"127.0.0.1"}
    assert not still_there(family)
    noise = [line for line in (tmp_path / "errors").read_text().splitlines() if "Set ray log level" not in line]
    assert noise == []
    check_whole(folder, tmp_path / "out")


def addresses(process: psutil.Process) -> list[str]:
    """Where a process listens, and whom it is connected to."""
    try:
        connections = process.net_connections(kind="inet")
    except psutil.Error:  # it has ended
        return []
    return [end.ip for one in connections for end in (one.laddr, one.raddr) if end]


def test_what_was_broken_off_is_gone_on_with_by_either_function(folder, tmp_path, tried, monkeypatch, cluster):
    """The whole job is killed, Ray and all; `embed_to_shards` goes on until somebody stops it; Ray does the rest.

    A finished shard is the same file afterwards, not an equal one.
    """
    out = tmp_path / "out"
    process = python("-c", RUN, folder, out, tmp_path / "pid")
    family = family_at(out / "shards", 1, process)
    agents = [member for member in family if "Agent" in member.name()]
    ends(process)
    tried["Ray jobs killed"] += 1
    assert not still_there([member for member in family if member not in agents])
    for agent in agents:  # of Ray; they would end too, after a minute
        agent.kill()
    done = {path: path.stat().st_ino for path in (out / "shards").iterdir()}
    assert len(done) < 5

    class Stopped(ColourEmbedding):
        def embed_images(self, images):
            if self.embedded > 5:
                raise KeyboardInterrupt
            return super().embed_images(images)

    with pytest.raises(KeyboardInterrupt):
        embed_to_shards(folder, out, Stopped(), **SMALL)
    done |= {path: path.stat().st_ino for path in (out / "shards").iterdir()}
    monkeypatch.setenv("RAY_ADDRESS", cluster)
    report = on_ray(None, out)
    assert report.written == 5 - len(done) > 0
    assert {path: path.stat().st_ino for path in done} == done
    check_whole(folder, out)


# ------------------------------------------------------------------------------------------ deaths


def test_a_worker_that_is_killed_is_replaced_and_each_image_is_there_once(
    folder, tmp_path, tried, monkeypatch, cluster
):
    """By SIGKILL, as the kernel does it to who takes too much memory; in the middle of two shards."""
    monkeypatch.setenv("RAY_ADDRESS", cluster)
    out, left_in = tmp_path / "out", tmp_path / "pid"
    killed: list[int] = []

    def working() -> int | None:
        """The number of a worker that was not killed yet."""
        number = int(left_in.read_text()) if left_in.exists() else None
        return None if number in killed else number

    def kill() -> None:
        for begun in (0, 2):
            while len(list((out / "shards").glob("*"))) < begun or working() is None:
                time.sleep(0.01)
            killed.append(working())
            os.kill(killed[-1], signal.SIGKILL)
            tried["Ray workers killed"] += 1

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    report = on_ray(folder, out, Slow(left_in=str(left_in)), workers=1)
    killer.join(10)
    assert len(set(killed)) == 2
    assert (report.rows, report.written) == (23, 5)
    check_whole(folder, out)


def test_a_shard_counts_for_the_call_that_made_it(folder, tmp_path):
    """Although a worker that dies when its shard is in place, and has not said so, is asked for it again."""
    planned(folder, tmp_path / "out")
    options = {"hybrid": False, "batch_size": 2, "image_policy": DEFAULT_POLICY}
    one, other = (ShardWriter(read_plan(tmp_path / "out"), ColourEmbedding(), **options) for _ in range(2))
    assert one.write(0)
    assert pickle.loads(pickle.dumps(one)).write(0)
    assert not other.write(0)


class Deadly(ColourEmbedding):
    """Ends its process at an image, as a decoder does that crashes."""

    def prepare_image(self, image):
        if image.size == (7, 7):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().prepare_image(image)


def test_a_shard_that_kills_whoever_begins_it_ends_the_call(folder, tmp_path, monkeypatch, cluster):
    """Or else Ray would go on for ever. What was done before stays; without the image the call goes on."""
    monkeypatch.setenv("RAY_ADDRESS", cluster)
    out, image = tmp_path / "out", folder / "cars" / "01.png"
    paint(image, "red", (7, 7))
    with pytest.raises(IngestError, match=r"^3 workers died, one after the other, at the images of plan/000002.jsonl"):
        on_ray(folder, out, Deadly(), workers=1)
    assert '01.png"' in (out / "plan" / "000002.jsonl").read_text()
    image.unlink()
    assert on_ray(folder, out, Deadly()).rows == 22
    check_whole(folder, out)


# ------------------------------------------------------------------------------------------ errors


class Elsewhere(ColourEmbedding):
    """Another model in another process, as where machines have different files."""

    there: int = 0

    @property
    def model_id(self) -> str:
        return "colours" if os.getpid() == self.there else "others"


class Missing(ColourEmbedding):
    """A model that is not on the machine that unpickles it."""

    def __reduce__(self):
        return missing, ()


def missing():
    raise ModelNotFoundError("'weights' leads to no files")


@pytest.mark.parametrize(
    ("model", "error", "says"),
    [
        (Broken(), RuntimeError, "^the device is lost$"),
        (Missing(), ModelNotFoundError, "^'weights' leads to no files$"),
        (Elsewhere(there=os.getpid()), IngestError, r"^the shards are planned for the models \('colours', None\)"),
        (ColourEmbedding(), IngestError, "is empty or gone: a drive that is missing"),
    ],
)
def test_what_goes_wrong_in_a_worker_comes_out_as_itself(folder, tmp_path, cluster, model, error, says):
    """Not as an error of Ray's around it; that of somebody else says where in the worker it was.

    On a Ray that the program is connected to, and stays connected to, with all of it free for others again.
    """
    import ray

    out = tmp_path / "out"
    if type(model) is ColourEmbedding:
        planned(folder, out)
        folder.rename(tmp_path / "elsewhere")
    ray.init(cluster, logging_level="ERROR", log_to_driver=False)
    try:
        with pytest.raises(error, match=says) as caught:
            on_ray(None if type(model) is ColourEmbedding else folder, out, model)
        assert type(caught.value) is error
        ours = error is not RuntimeError
        assert caught.value.__suppress_context__
        assert (caught.value.__cause__ is None) if ours else ("in embed_images" in str(caught.value.__cause__))
        assert not list((out / "shards").iterdir())
        assert ray.is_initialized()
        deadline = time.monotonic() + 60
        while ray.available_resources().get("CPU") != 2.0:
            assert time.monotonic() < deadline
            time.sleep(0.1)
    finally:
        ray.shutdown()


class Placed(ColourEmbedding):
    device: str = "cpu"


class Locked(ColourEmbedding):
    def __reduce__(self):
        raise TypeError("cannot pickle a lock")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"workers": 0}, "workers 0 with"),
        ({"cpus_per_worker": 0}, "a CPU or a GPU to each"),
        ({"cpus_per_worker": -1}, "a CPU or a GPU to each"),
        ({"batch_size": 0}, "batch_size 0: give 1 or more"),
        ({"device": "cuda"}, "device 'cuda': ColourEmbedding has none to be changed"),
        ({"model": Locked()}, "does not pickle: cannot pickle a lock"),
        ({"model": Placed(device="cpu"), "device": "cuda"}, r"no machine of the cluster has .*'GPU': 1"),
        ({"gpus_per_worker": 1}, r"no machine of the cluster has .*'GPU': 1.*workers="),
        ({"cpus_per_worker": 3}, r"no machine of the cluster has .*'CPU': 3"),
        ({"address": "127.0.0.1:1"}, "there is no Ray at RAY_ADDRESS '127.0.0.1:1'"),
    ],
)
def test_what_cannot_be_asked_for_is_refused(folder, tmp_path, monkeypatch, cluster, options, says):
    """Before anything is embedded, and where Ray would wait for ever."""
    monkeypatch.setenv("RAY_ADDRESS", options.pop("address", cluster))
    with pytest.raises(IngestError, match=says):
        on_ray(folder, tmp_path / "out", **options)


def test_a_missing_ray_is_named_with_what_installs_it(folder, tmp_path, monkeypatch):
    """Architecture: the exact pip install; before anything is planned."""
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtraError, match=r'pip install "mm-retriever\[ray\]"'):
        on_ray(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
