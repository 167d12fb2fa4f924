"""A real Milvus server (the standalone binary in the `milvus` wheel) that tests may kill, freeze and start again.

The server listens on every interface and has no password, so it runs in a network namespace of its own, which has
nothing but a loopback device. Run as a script, this file is what stands between: it takes a port of 127.0.0.1, moves to
a new namespace, starts the server there, and passes on what comes to the port (a socket stays in the namespace that it
was made in).
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import random
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

START_SECONDS = 180
SETTINGS = {
    "common.session.ttl": "15",  # seconds (30) for which a killed server's parts count as alive beside the new ones
    "common.gracefulStopTimeout": "3",
    "grpc.client.initialBackOff": "0.1",  # its parts look for each other a little more often: it starts in 2 to 8 s
    "grpc.client.maxBackoff": "0.5",
    "proxy.timeTickInterval": "40",  # ms (200): how long a strong read waits
    "log.level": "warn",
    "log.file.rootPath": "",
}
_NO_NAMESPACE = 77
_NEW_USER, _NEW_NET, _NEW_MOUNTS = 0x10000000, 0x40000000, 0x00020000
_PRIVATE_BELOW = 0x4000 | 0x40000
_SET_DEATH_SIGNAL = 1
_INTERFACE_IS_UP = 1


class ServerUnavailable(Exception):
    """This machine cannot run the server: the message says why."""


class MilvusServer:
    """One server on one folder. What is stored stays in the folder, the port stays the same.

    Attributes:
        uri: for clients.
        data: its own folder. A bulk import names files by absolute paths, here or anywhere else.
        log: what the server said.
    """

    def __init__(self, folder: Path) -> None:
        if find_spec("milvus") is None:
            raise ServerUnavailable("the package `milvus` (Linux on x86-64) is not installed")
        self._folder = folder
        self._port = _unused_port()
        self._process: subprocess.Popen[bytes] | None = None
        self.uri = f"http://127.0.0.1:{self._port}"
        self.data = folder / "data"
        self.log = folder / "server.log"

    def start(self, *, wait: bool = True) -> None:
        """Start the server on what it has stored; `wait` until it says that all its parts are healthy."""
        self._folder.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, __file__, str(self._folder), str(self._port)],
                stdin=subprocess.PIPE,  # its end tells the launcher that we are gone
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,  # so that the end reaches the server and its launcher together
            )
        if wait:
            self.wait()

    def wait(self) -> None:
        """Return when the server is healthy."""
        assert self._process is not None
        assert self._process.stdout is not None
        said = self._process.stdout.readline()
        if said != b"healthy\n":
            code = self._process.wait(30)
            last = "\n".join(self.log.read_text(errors="replace").splitlines()[-5:])
            self._release()
            if code == _NO_NAMESPACE:
                raise ServerUnavailable(f"no network namespace for the server: {last}")
            raise AssertionError(f"the server did not start: {last}")

    def kill(self) -> None:
        """End it as a power cut would, without a chance to write anything."""
        self._signal(signal.SIGKILL)
        self._release()

    def stop(self) -> None:
        """Let it end in its own time; kill it if that takes long."""
        if self._process is None:
            return
        self._signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(10)
        self.kill()

    def revive(self) -> bool:
        """Start it again if it died by itself; whether it did.

        Milvus 2.3.5 dies of a list of import tasks that the client has given up (`Proxy.ListImportTasks`).
        """
        died = self._process is not None and self._process.poll() is not None
        if died:
            self._release()
            self.start()
        return died

    def freeze(self) -> None:
        """Let it accept connections and answer nothing, until `thaw`.

        Only what stands between is stopped: the server itself would take its parts for dead, and end when it wakes up.
        """
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def __enter__(self) -> MilvusServer:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _signal(self, number: int) -> None:
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)

    def _release(self) -> None:
        if self._process is not None:
            self._process.wait(30)
            for pipe in (self._process.stdin, self._process.stdout):
                assert pipe is not None
                pipe.close()
            self._process = None


def _unused_port() -> int:
    """A port that no outgoing connection is given while the server is down, its client's own included."""
    # not of the seeded generator, which is the same in every worker: two servers would share a port until one is killed
    for port in random.SystemRandom().sample(range(20_000, 32_000), 50):
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    raise AssertionError("no free port")


# ------------------------------------------------------------------------------------------ the launcher


def launch(folder: Path, port: int) -> int:
    """Run the server in a new namespace, and what comes to the port in the old one to it; until one of both ends."""
    signal.signal(signal.SIGTERM, lambda *_: None)  # the server ends first
    entrance = socket.socket()
    entrance.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    entrance.bind(("127.0.0.1", port))
    try:
        _enter_new_namespace()
    except OSError as error:
        print(error, file=sys.stderr)
        return _NO_NAMESPACE
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with subprocess.Popen(
        [folder / "bin" / "milvus", "run", "standalone"],
        cwd=folder,
        env=_prepared(folder),
        stdout=sys.stderr,
        stderr=sys.stderr,
        preexec_fn=_die_with_launcher,
    ) as server:
        threading.Thread(target=lambda: os._exit(server.wait() and 1), daemon=True).start()
        _until(lambda: socket.create_connection(("127.0.0.1", 19530), 1).close())
        threading.Thread(target=_say_when_healthy, daemon=True).start()
        asyncio.run(_pass_on(entrance))
    return 0


def _end_with_parent() -> None:
    sys.stdin.buffer.read()
    os._exit(1)


def _enter_new_namespace() -> None:
    import fcntl

    libc = ctypes.CDLL(None, use_errno=True)
    owner, group = os.getuid(), os.getgid()

    def call(name: str, *arguments: object) -> None:
        if getattr(libc, name)(*arguments):
            raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")

    call("unshare", _NEW_NET | _NEW_MOUNTS | (0 if owner == 0 else _NEW_USER))
    if owner != 0:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{owner} {owner} 1")
        Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
    with socket.socket() as any_socket:
        interface = struct.pack("16sh22x", b"lo", _INTERFACE_IS_UP)
        fcntl.ioctl(any_socket, 0x8914, interface)  # SIOCSIFFLAGS
    # The server locks a file in /run, one for the whole machine.
    call("mount", b"none", b"/", None, _PRIVATE_BELOW, None)
    call("mount", b"tmpfs", b"/run", b"tmpfs", 0, b"mode=777")


def _prepared(folder: Path) -> dict[str, str]:
    """Unpack the server, unless that is done, write its configuration, and return its environment."""
    import milvus

    milvus._initialize_data_files(folder)
    config = milvus.MilvusServerConfig(data_dir=str(folder))
    for name, value in SETTINGS.items():
        config.set(name, value)
    config.resolve()
    return {
        **os.environ,
        "DEPLOY_MODE": "STANDALONE",
        "METRICS_PORT": "9091",
        "LD_LIBRARY_PATH": str(folder / "bin"),
        "MILVUS_RUN_DIR": str(folder / "run"),
    }


def _die_with_launcher() -> None:
    ctypes.CDLL(None).prctl(_SET_DEATH_SIGNAL, signal.SIGKILL)


def _until(attempt: Callable[[], None]) -> None:
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            attempt()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
        time.sleep(0.05)


def _say_when_healthy() -> None:
    try:
        _until(lambda: urllib.request.urlopen("http://127.0.0.1:9091/healthz", timeout=10).close())
        print("healthy", flush=True)
    except OSError as error:
        print(f"not healthy after {START_SECONDS} s: {error}", file=sys.stderr, flush=True)
        os._exit(1)


async def _pass_on(entrance: socket.socket) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", 19530)
            await asyncio.gather(_copy(reader, far_writer), _copy(far_reader, writer))
        writer.close()

    async with await asyncio.start_server(serve, sock=entrance) as server:
        await server.serve_forever()


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(65_536):
            writer.write(data)
            await writer.drain()
    writer.close()


if __name__ == "__main__":
    sys.exit(launch(Path(sys.argv[1]), int(sys.argv[2])))
