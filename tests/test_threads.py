"""Processes that fork after a model was used: gunicorn --preload, and multiprocessing before Python 3.14."""

from __future__ import annotations

import http.client
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from mm_retriever.errors import CheckpointError
from mm_retriever.threads import ForkLock, check_forked
from tests.support.processes import ROOT, free_port

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
WORKERS = """
import multiprocessing, sys, threading
import torch
from mm_retriever import VisualizedBGEEmbedding

torch.set_num_threads(2)
model = VisualizedBGEEmbedding("tiny", device="cpu")
expected = model.get_text_embedding("a red mug")
busy = model.encoder._lock  # as another thread of the parent holds it, in the middle of a pass


def work(number):
    return model.get_text_embedding("a red mug")


if __name__ == "__main__":
    with busy:
        pool = multiprocessing.get_context("fork").Pool(2)
    with pool:
        answers = pool.map_async(work, range(4)).get(60)
    print(max(abs(a - b) for answer in answers for a, b in zip(answer, expected)))
"""
APP = """
import json
import torch
from mm_retriever import VisualizedBGEEmbedding

torch.set_num_threads(2)
model = VisualizedBGEEmbedding("tiny", device="cpu")
model.get_text_embedding("warm up")


def app(environ, start_response):
    vector = model.get_text_embedding(environ["PATH_INFO"])
    start_response("200 OK", [("content-type", "application/json")])
    return [json.dumps(vector).encode()]
"""


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "2"}


@pytest.mark.slow
def test_workers_of_multiprocessing_compute_the_same_vectors(tmp_path, tried):
    """Without renewed locks and a pool of one thread they would wait for ever."""
    script = tmp_path / "workers.py"
    script.write_text(WORKERS)
    done = subprocess.run(
        [sys.executable, script], env=environment(), capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 1e-6
    tried["workers forked after a model was used"] += 2


@pytest.mark.slow
def test_gunicorn_workers_of_a_preloaded_app_answer(tmp_path, tried):
    pytest.importorskip("gunicorn")
    (tmp_path / "shop.py").write_text(APP)
    port = free_port()
    command = [
        sys.executable,
        "-m",
        "gunicorn",
        "--preload",
        "--workers",
        "2",
        "--bind",
        f"127.0.0.1:{port}",
        "shop:app",
    ]
    with subprocess.Popen(command, cwd=tmp_path, env=environment(), stderr=subprocess.DEVNULL) as server:
        try:
            vectors = [answer(port) for _ in range(4)]
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait(30)
    assert np.allclose(vectors, vectors[0], atol=1e-6)
    assert np.isclose(np.linalg.norm(vectors[0]), 1)
    tried["workers forked after a model was used"] += 2


def answer(port: int) -> list[float]:
    """The server's answer, once it listens."""
    deadline = time.monotonic() + 90
    while True:
        try:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
            connection.request("GET", "/mug")
            vector: list[float] = json.loads(connection.getresponse().read())
            return vector
        except ConnectionRefusedError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


@pytest.mark.parametrize("make", [threading.Lock, threading.RLock])
def test_a_lock_that_another_thread_holds_is_free_in_a_forked_child(make):
    lock, held, release = ForkLock(make), threading.Event(), threading.Event()

    def hold() -> None:
        with lock:
            held.set()
            release.wait(30)

    holder = threading.Thread(target=hold)
    holder.start()
    held.wait(30)
    try:
        context = multiprocessing.get_context("fork")
        child = context.Process(target=lock.__enter__)
        child.start()
        child.join(20)
        assert child.exitcode == 0
    finally:
        child.kill()
        release.set()
        holder.join()


def test_a_model_on_a_gpu_is_refused_in_a_forked_child():
    """CUDA's own error has no way out in it."""
    check_forked(os.getpid(), "cuda")
    check_forked(-1, "cpu")
    with pytest.raises(CheckpointError, match="load it in each worker, or start workers by 'spawn'"):
        check_forked(-1, "cuda")
