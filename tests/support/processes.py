"""Processes of their own, for tests that kill what runs in them."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.support.warm import WarmProcess

ROOT = Path(__file__).parents[2]


def python(*arguments: object, **options) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)], cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, **options
    )


def ends(process: subprocess.Popen[str] | WarmProcess, how: int = signal.SIGKILL) -> None:
    process.send_signal(how)
    process.wait(30)
    for pipe in (process.stdin, process.stdout):
        if pipe:
            pipe.close()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def lite_server(folder: Path, port: int) -> subprocess.Popen[str]:
    """Milvus Lite behind a port of its own: a server that can be killed and come back."""
    arguments = ("server", "--host", "127.0.0.1", "--port", port, "--data-dir", folder)
    process = python("-m", "milvus_lite", *arguments, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return process
        except OSError:
            time.sleep(0.1)
    ends(process)
    raise AssertionError("the server did not start")
