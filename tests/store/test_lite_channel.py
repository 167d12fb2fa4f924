"""One Milvus Lite file, many processes: who serves it, who takes over, who is kept out, and what is said then."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import milvus_lite.engine.collection
import psutil
import pytest
from llama_index.core.schema import ImageNode
from llama_index.core.vector_stores.types import VectorStoreQuery

from mm_retriever.errors import StoreError, StoreLockedError, StoreUnavailableError
from mm_retriever.store import open_store
from mm_retriever.store.channel import deadline
from mm_retriever.store.lite_channel import LITE_FILES
from mm_retriever.store.lite_server import LiteServer
from mm_retriever.store.lite_wire import RECORD, read_record
from tests.support.processes import ends, python
from tests.support.warm import WarmProcess

MODEL = SimpleNamespace(dimension=3, model_id="three numbers")
QUERY = VectorStoreQuery(query_embedding=[1.0, 0.0, 0.0], similarity_top_k=50)
NOBODY = 65534

PRELUDE = """
import os, sys, time
from types import SimpleNamespace
from llama_index.core.schema import ImageNode
from mm_retriever.store import open_store

def nodes(*ids):
    return [ImageNode(id_=one, image_path=f"/{one}.png", embedding=[1.0, 0.0, 0.0]) for one in ids]

store = open_store(sys.argv[1], SimpleNamespace(dimension=3, model_id="three numbers"))
"""
HOLD = PRELUDE + 'print("open", flush=True)\nsys.stdin.read()\n'
HOLD_AND_FORK = (
    PRELUDE
    + """
parent, child = os.getpid(), os.fork()
if child:
    print(child, flush=True)
    sys.stdin.read()
print("forked", store.count(), flush=True)
while os.getppid() == parent:
    time.sleep(0.01)
store.add(nodes("child"))
print("took over", store.count(), flush=True)
"""
)
ADD = PRELUDE + "for number in range(5):\n    store.add(nodes(f'{sys.argv[2]}-{number}'))\nprint(store.count())\n"
WATCH = (
    PRELUDE
    + """
print("open", flush=True)
fewest, last = 100, False
while not last:
    last = os.path.exists(sys.argv[2])
    fewest = min(fewest, sum(len(page) for page in store.scan()))
print(fewest, flush=True)
"""
)


def nodes(*ids: str) -> list[ImageNode]:
    return [ImageNode(id_=one, image_path=f"/{one}.png", embedding=[1.0, 0.0, 0.0]) for one in ids]


def ids(store) -> list[str]:
    return [row["id"] for page in store.scan() for row in page]


def started(script: str, *arguments: object, first: str = "open") -> WarmProcess:
    process = WarmProcess("-c", script, *arguments)
    assert process.stdout.readline() == f"{first}\n"
    return process


@pytest.fixture
def db(tmp_path) -> Path:
    return tmp_path / "a.db"


# ------------------------------------------------------------------------------------------ sharing and taking over


def test_a_second_process_attaches_and_takes_over_when_the_first_is_killed(db):
    owner = started(HOLD, db)
    try:
        with open_store(db, MODEL) as store:
            store.add(nodes("a", "b"))
            assert sorted(store.query(QUERY).ids) == ["a", "b"]
            assert read_record(db).pid == owner.pid
            ends(owner)
            start = time.monotonic()
            assert sorted(store.query(QUERY).ids) == ["a", "b"], "the collection is loaded after a takeover"
            store.add(nodes("b", "c"))
            assert ids(store) == ["a", "b", "c"]
            assert time.monotonic() - start < 15
            assert read_record(db).pid == os.getpid()
    finally:
        ends(owner)
    assert not (db / RECORD).exists(), "a closed file says nothing of who had it"


def test_the_other_process_goes_on_when_the_owner_closes(db):
    with open_store(db, MODEL) as store:
        store.add(nodes("a"))
        other = started(WATCH, db, db.with_name("stop"))
    db.with_name("stop").touch()
    assert other.stdout.readline() == "1\n"
    other.stdin.close()
    assert other.wait(30) == 0
    other.stdout.close()


@pytest.mark.slow
def test_processes_that_open_a_new_file_at_once_make_one_collection(db):
    processes = [WarmProcess("-c", ADD, db, name) for name in "abc"]
    for process in processes:
        assert int(process.stdout.read()) >= 5
        assert process.wait(60) == 0
        ends(process)
    with open_store(db, MODEL) as store:
        assert ids(store) == sorted(f"{name}-{number}" for name in "abc" for number in range(5))


def test_another_process_reads_no_half_emptied_memory(db, monkeypatch):
    """Milvus Lite moves rows from memory to disk in steps; a read between two of them would miss all of them."""

    class SlowLog(milvus_lite.engine.collection.WAL):
        def __init__(self, *args, **kwargs) -> None:
            time.sleep(0.3)
            super().__init__(*args, **kwargs)

    with open_store(db, MODEL) as store:
        store.add(nodes("a", "b"))
        monkeypatch.setattr(milvus_lite.engine.collection, "WAL", SlowLog)
        monkeypatch.setattr(milvus_lite.engine.collection, "MEMTABLE_MEMORY_LIMIT", 1)
        stop = db.with_name("stop")
        reader = started(WATCH, db, stop)
        for number in range(3):
            store.add(nodes(f"c{number}"))
        stop.touch()
        assert int(reader.stdout.readline()) >= 2
        ends(reader)


def test_a_search_runs_in_the_thread_that_asks_and_a_write_in_one_that_no_interrupt_reaches(db, monkeypatch):
    """Our choice: a thread less to wait for, and Ctrl-C breaks off nothing that changes the file."""
    ran = {}
    answer = LiteServer._answer

    def spy(self: LiteServer, header: dict[str, Any], body: bytes) -> tuple[dict[str, Any], bytes]:
        ran[str(header["method"]).rpartition("/")[2]] = threading.current_thread()
        return answer(self, header, body)

    monkeypatch.setattr(LiteServer, "_answer", spy)
    with open_store(db, MODEL) as store:
        store.add(nodes("a"))
        assert store.query(QUERY).ids == ["a"]
    here = threading.current_thread()
    assert ran["Search"] is here
    assert here not in (ran["CreateCollection"], ran["Insert"])


def test_a_search_behind_another_turn_ends_by_its_deadline(db):
    """Our choice, as between processes: busy is an error in time, and the next search is answered."""
    with open_store(db, MODEL) as store:
        store.add(nodes("a"))
        server = LITE_FILES._files[str(db.resolve())]._server
        with server._lock, deadline(0.1), pytest.raises(StoreUnavailableError, match="busy"):
            store.query(QUERY)
        assert store.query(QUERY).ids == ["a"]


def test_a_forked_child_attaches_to_its_parent_and_takes_over_when_that_is_killed(db):
    """The child inherits descriptors of the lock and of all connections; none of them may outlive the parent in it."""
    parent = WarmProcess("-c", HOLD_AND_FORK, db)
    child = int(parent.stdout.readline())
    try:
        assert parent.stdout.readline() == "forked 0\n"
        assert read_record(db).pid == parent.pid
        with open_store(db, MODEL) as store:
            store.add(nodes("a"))
            parent.kill()
            parent.wait(30)
            assert parent.stdout.readline() == "took over 2\n"
            assert ids(store) == ["a", "child"]
    finally:
        ends(parent)
        with suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)


def test_an_owner_that_is_stopped_is_an_error_in_time_and_answers_again_when_it_goes_on(db):
    owner = started(HOLD, db)
    try:
        with open_store(db, MODEL, timeout=20) as patient:
            patient.add(nodes("a"))
            owner.send_signal(signal.SIGSTOP)
            start = time.monotonic()
            with pytest.raises(StoreUnavailableError, match=f"process {owner.pid}, which has it open, does not answer"):
                open_store(db, MODEL, timeout=0.5)
            assert time.monotonic() - start < 15
            owner.send_signal(signal.SIGCONT)
            assert ids(patient) == ["a"]
    finally:
        ends(owner)


# ------------------------------------------------------------------------------------------ what cannot be shared


def test_a_file_that_something_else_holds_says_so_in_one_line(db, capfd):
    """An earlier version, another user, another container: they hold the lock and do not share."""
    with open_store(db, MODEL):
        pass
    with (db / "LOCK").open("r+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(StoreLockedError, match="open in another process") as caught:
            open_store(db, MODEL, timeout=0.5)
    assert isinstance(caught.value, BlockingIOError)
    assert str(db) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""


def test_a_copy_of_an_open_file_is_a_file_of_its_own(db):
    """The record in it names a server, which serves the original."""
    copy = db.with_name("copy.db")
    with open_store(db, MODEL) as store:
        store.add(nodes("a"))
        shutil.copytree(db, copy)
        assert (copy / RECORD).exists()
        with open_store(copy, MODEL) as other:
            other.add(nodes("b"))
            assert ids(other) == ["a", "b"]
        assert ids(store) == ["a"]


def test_a_file_that_was_replaced_while_it_was_open_is_not_written_to(db):
    with open_store(db, MODEL) as store:
        store.add(nodes("a"))
        db.rename(db.with_name("moved.db"))
        with pytest.raises(StoreError, match="moved, removed or replaced"):
            store.add(nodes("b"))
        with pytest.raises(StoreError, match="moved, removed or replaced"):
            open_store(db.with_name("moved.db"), MODEL, timeout=5)
    assert not db.exists()
    with open_store(db.with_name("moved.db"), MODEL) as moved:
        assert ids(moved) == ["a"]


@pytest.fixture
def read_only(db) -> Iterator[Path]:
    """A file with the row "a" on a file system that is mounted for reading only, in which it was killed."""
    with open_store(db, MODEL) as store:
        store.add(nodes("a"))
        shutil.copytree(db, db.with_name("disk") / "killed.db")
    disk = db.with_name("disk")
    for options in (["--bind"], ["-o", "remount,bind,ro"]):
        if subprocess.run(["mount", *options, str(disk), str(disk)], capture_output=True).returncode:
            pytest.skip("a file system cannot be mounted here")
    yield disk / "killed.db"
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_file_that_cannot_be_written_can_be_searched(read_only, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = sorted(tmp_path.iterdir())
    with open_store(read_only, MODEL, timeout=5) as store, open_store(read_only, MODEL, timeout=5) as second:
        assert store.query(QUERY).ids == ids(second) == ["a"]
        for change in (lambda: store.add(nodes("b")), lambda: store.delete_nodes(["a"]), store.clear):
            with pytest.raises(StoreError, match="cannot be written: it can be searched, not changed"):
                change()
        with pytest.raises(StoreError, match="cannot be written"):
            open_store(read_only, MODEL, collection="new", timeout=5)
        assert ids(store) == ["a"]
    assert sorted(tmp_path.iterdir()) == before, "nothing is left of the copy that was searched"


def test_a_copy_on_a_full_disk_can_be_searched(db):
    """The files of a copy are checked and recorded anew: where there is no room for the records, it was an error."""
    with open_store(db, MODEL) as store:
        store.add(nodes("a"))
    disk = db.with_name("disk")
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(disk)], capture_output=True).returncode:
        pytest.skip("a file system cannot be mounted here")
    try:
        shutil.copytree(db, disk / "copy.db")
        with suppress(OSError), (disk / "rest").open("wb", buffering=0) as rest:
            while rest.write(b"0" * 4096):
                pass
        with open_store(disk / "copy.db", MODEL) as store:
            assert store.query(QUERY).ids == ["a"]
            with pytest.raises(StoreError, match="No space left on device"):
                store.add(nodes(*("b" * 9_000 + str(number) for number in range(9))))
        (disk / "rest").unlink()
        with open_store(disk / "copy.db", MODEL) as store:
            assert ids(store) == ["a"]
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_place_that_may_not_be_entered_is_an_error_in_one_line(common_place):
    closed = common_place / "closed"
    closed.mkdir(mode=0o700)

    def attempt(place: Path) -> str:
        try:
            open_store(place, MODEL, timeout=1)
        except StoreError as error:
            return str(error)
        return "opened"

    for place, reason in (
        (closed / "a.db", "cannot open"),
        (common_place / "a.db", "cannot open"),
        ("~no-one/a.db", ""),
    ):
        answer = as_nobody(lambda place=place: attempt(place))
        assert str(place) in answer
        assert reason in answer
        assert "\n" not in answer


# ------------------------------------------------------------------------------------------ no port, no proxy


def listening() -> list[Any]:
    return [one for one in psutil.Process().net_connections("inet") if one.status == psutil.CONN_LISTEN]


def test_no_port_is_opened(db):
    before = listening()
    with open_store(db, MODEL) as store:
        store.add(nodes("a"))
        assert listening() == before


@pytest.mark.parametrize("variable", ["http_proxy", "https_proxy", "grpc_proxy", "HTTP_PROXY"])
def test_a_proxy_is_not_asked_for_a_file(variable, db, monkeypatch):
    monkeypatch.setenv(variable, "http://127.0.0.1:9")
    with open_store(db, MODEL, timeout=5) as store:
        store.add(nodes("a"))
        assert ids(store) == ["a"]


# ------------------------------------------------------------------------------------------ other users


@pytest.fixture
def common_place(monkeypatch) -> Iterator[Path]:
    """A folder that every user of the machine may enter."""
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    place = Path(tempfile.mkdtemp())
    place.chmod(0o755)
    yield place
    shutil.rmtree(place)


def as_nobody(attempt: Callable[[], object]) -> object:
    """What comes of an attempt as another user: what it returns, or the name of its error."""
    if os.geteuid():
        pytest.skip("only root can become another user")
    heard, told = os.pipe()
    process = os.fork()
    if not process:
        try:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            try:
                answer = attempt()
            except OSError as error:
                answer = type(error).__name__
            os.write(told, json.dumps(answer).encode())
        finally:
            os._exit(0)
    os.close(told)
    os.waitpid(process, 0)
    with os.fdopen(heard) as answer:
        return json.loads(answer.read())


def said_to(address: str | tuple[str, int]) -> str:
    """What a server tells somebody who does not know its secret, beyond its greeting."""
    with socket.socket(socket.AF_UNIX if isinstance(address, str) else socket.AF_INET) as line:
        line.settimeout(10)
        line.connect(address)
        greeting = line.recv(4096)
        line.sendall(greeting)  # as if it were ours
        return line.recv(4096).hex()


def test_another_user_can_neither_read_nor_write_nor_connect(common_place, tried):
    db = common_place / "a.db"
    with open_store(db, MODEL) as store:
        store.add(nodes("a"))
        assert stat.S_IMODE(db.stat().st_mode) == 0o700
        assert as_nobody(lambda: os.listdir(db)) == "PermissionError"
        db.chmod(0o777)  # an existing folder keeps its mode; what is made in it does not depend on that
        record = read_record(db)
        assert stat.S_IMODE((db / RECORD).stat().st_mode) == 0o600
        assert as_nobody(lambda: (db / RECORD).read_text()) == "PermissionError"
        assert as_nobody(lambda: (db / RECORD).write_text("{}")) == "PermissionError"
        assert stat.S_IMODE(Path(record.address).parent.stat().st_mode) == 0o700
        assert stat.S_IMODE(Path(record.address).stat().st_mode) == 0o600
        assert as_nobody(lambda: said_to(record.address)) == "PermissionError"
        Path(record.address).parent.chmod(0o755)
        assert as_nobody(lambda: said_to(record.address)) == "PermissionError", "the socket itself is closed to others"
        Path(record.address).chmod(0o666)
        assert as_nobody(lambda: said_to(record.address)) == "", "nor is anything said without the secret"
        Path(record.address).parent.chmod(0o700)
        tried["attempts of another user on an open file"] += 6
        assert ids(store) == ["a"]


def test_without_a_place_for_a_socket_a_port_asks_for_the_secret(db, monkeypatch):
    def no_folder(*args, **kwargs):
        raise PermissionError(13, "nowhere")

    monkeypatch.setattr(tempfile, "mkdtemp", no_folder)
    with open_store(db, MODEL) as store:
        store.add(nodes("a"))
        address = read_record(db).address
        assert address[0] == "127.0.0.1"
        assert said_to(address) == ""
        other = started(WATCH, db, db.with_name("stop"))
        db.with_name("stop").touch()
        assert other.stdout.readline() == "1\n", "processes of the same user read the secret in the record"
        ends(other)


@pytest.mark.parametrize("planted", ["another user's", "a link", "writable by others", "a socket that anyone may use"])
def test_a_record_that_another_user_could_have_written_is_not_followed(planted, common_place, tried):
    """It would lead to a server of theirs, which would be told every row and query."""
    db = common_place / "a.db"
    with open_store(db, MODEL) as store:
        store.add(nodes("a"))
        record = (db / RECORD).read_text()
    trap = Path(json.loads(record)["address"])
    trap.parent.mkdir(mode=0o700)
    with socket.socket(socket.AF_UNIX) as listener, (db / "LOCK").open("r+") as lock:
        listener.bind(str(trap))
        listener.listen()
        (db / RECORD).write_text(record)
        (db / RECORD).chmod(0o600)
        if planted == "another user's":
            if os.geteuid():
                pytest.skip("only root can give a file away")
            os.chown(db / RECORD, NOBODY, NOBODY)
        elif planted == "a link":
            (db / RECORD).rename(db / "elsewhere")
            (db / RECORD).symlink_to(db / "elsewhere")
        elif planted == "writable by others":
            (db / RECORD).chmod(0o622)
        else:
            trap.parent.chmod(0o777)
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(StoreLockedError, match="open in another process"):
            open_store(db, MODEL, timeout=0.5)
        listener.settimeout(0.1)
        with pytest.raises(TimeoutError):
            listener.accept()
    shutil.rmtree(trap.parent)
    tried["attempts of another user on an open file"] += 1


def test_a_server_that_does_not_know_the_secret_is_told_nothing(db):
    """Somebody listens where the last owner did, after it was killed."""
    with open_store(db, MODEL) as store:
        store.add(nodes("a"))
        record = (db / RECORD).read_text()
    trap = Path(json.loads(record)["address"])
    trap.parent.mkdir(mode=0o700)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(trap))
        listener.listen()
        (db / RECORD).write_text(record)
        (db / RECORD).chmod(0o600)
        liar = python(
            "-c",
            """
import json, socket, struct, sys
listener = socket.socket(fileno=int(sys.argv[1]))
line = listener.accept()[0]
def frame(**header):
    head = json.dumps(header).encode()
    line.sendall(struct.pack("!IQ", len(head), 0) + head)
frame(nonce="0" * 64)
line.recv(4096)
frame(proof="0" * 64)
print(line.recv(4096), flush=True)
""",
            listener.fileno(),
            pass_fds=(listener.fileno(),),
        )
        with open_store(db, MODEL, timeout=20) as store:
            assert ids(store) == ["a"]
        assert liar.stdout.readline() == "b''\n", "not a word after its false proof"
        ends(liar)
    shutil.rmtree(trap.parent, ignore_errors=True)
