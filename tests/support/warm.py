"""Processes that begin warm: forks of one that has imported the package, by Python's own fork server.

What a test asks, holds, stops or kills is a process like any other; it only begins in tenths of a second, not in five.
What is said at imports, and what they cost, takes a process of `tests.support.processes.python`.
"""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from multiprocessing.reduction import DupFd
from signal import SIGKILL
from typing import IO, Any

from tests.support.processes import ROOT

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(
    [
        "mcp_server_mm_retriever",
        "milvus_lite.adapter.grpc.server",
        "milvus_lite.server_manager",
        "mm_retriever.cli",
        "mm_retriever.embedders.visualized_bge.encoder",
        "mm_retriever.ingest",
        "mm_retriever.store",
        "pyarrow.parquet",
        "torch",
    ]
)


class WarmProcess:
    """As much of `subprocess.Popen` as tests need, for a program that Python would be given by -c or -m.

    Attributes:
        stdin: text for the process.
        stdout: what it prints.
        pid: its number.
    """

    def __init__(self, *arguments: object, stderr: IO[str] | None = None) -> None:
        its_stdin, ours = os.pipe()
        self.stdin = os.fdopen(ours, "w")
        ours, its_stdout = os.pipe()
        self.stdout = os.fdopen(ours)
        descriptors = (its_stdin, its_stdout, stderr.fileno() if stderr else 2)
        given = (list(map(str, arguments)), dict(os.environ), *map(_Descriptor, descriptors))
        self._process = _FORKS.Process(target=_begin, args=given, daemon=True)
        self._process.start()
        os.close(its_stdin)
        os.close(its_stdout)
        self.pid: int = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, seconds: float | None = None) -> int:
        self._process.join(seconds)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("a warm process", seconds or 0)
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        if self._process.exitcode is None:
            with contextlib.suppress(ProcessLookupError):  # the fork server hears of an end before we do
                os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(SIGKILL)


def warm_run(*arguments: object) -> subprocess.CompletedProcess[str]:
    """What a program printed that ran to its end."""
    with tempfile.TemporaryFile("w+", encoding="utf-8") as errors:
        process = WarmProcess(*arguments, stderr=errors)
        process.stdin.close()
        with process.stdout:
            printed = process.stdout.read()
        code = process.wait()
        errors.seek(0)
        return subprocess.CompletedProcess(arguments, code, printed, errors.read())


class _Descriptor:
    """A descriptor of this process that is the other's own after it was sent there."""

    def __init__(self, number: int) -> None:
        self._number = number

    def __reduce__(self) -> tuple[Any, ...]:
        return _received, (DupFd(self._number),)


def _received(descriptor: Any) -> int:
    return descriptor.detach()


def _begin(arguments: list[str], environment: dict[str, str], *descriptors: int) -> None:
    """In the fork: be the process that `python ARGUMENTS` would be."""
    for place, descriptor in enumerate(descriptors):
        os.dup2(descriptor, place)
        os.close(descriptor)
    sys.stdin, sys.stdout, sys.stderr = (os.fdopen(place, mode, 1, closefd=False) for place, mode in enumerate("rww"))
    os.environ.update(environment)
    os.chdir(ROOT)
    option, program, *rest = arguments
    sys.argv = [program if option == "-m" else option, *rest]
    try:
        if option == "-m":
            runpy.run_module(program, run_name="__main__", alter_sys=True)
        else:
            exec(compile(program, "<string>", "exec"), {"__name__": "__main__"})
    finally:
        atexit._run_exitfuncs()  # a process of multiprocessing ends without them
