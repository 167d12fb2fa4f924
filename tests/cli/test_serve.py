"""`mm-retriever serve` as a process of its own, and `search`, which finds it."""

from __future__ import annotations

import base64
import json
import os
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from mm_retriever.cli import main
from mm_retriever.running import NOTE, read_note
from tests.support.command_line import run
from tests.support.processes import ROOT
from tests.support.scripted_hub import scripted_hub

pytest.importorskip("starlette", reason='needs the extra "web"')

PATHS = os.pathsep.join([str(ROOT), str(ROOT / "integrations")])
ENVIRONMENT = {**os.environ, "PYTHONPATH": PATHS, "OMP_NUM_THREADS": "1"}
TINY = ROOT / "mm_retriever" / "embedders" / "visualized_bge" / "tiny"
SEARCH = ("search", "--json", "--model", "tiny")


@pytest.fixture(scope="module")
def queries(leopard) -> list[tuple[str, ...]]:
    return [
        ("--text", "a mug", "-k", "3"),
        ("--text", "phone case with this", "--image", str(leopard), "--exclude-query", "--each-once"),
        ("--text", "stars", "--where", "label=mug", "--min-score", "0.1"),
        ("--image", "data:image/png;base64," + base64.b64encode(leopard.read_bytes()).decode(), "-k", "3"),
    ]


@pytest.fixture(scope="module")
def served(db) -> Iterator[tuple[Path, str, subprocess.Popen[str]]]:
    """A file, and the server of it that runs until the last of these tests kills it."""
    command = [sys.executable, "-m", "mm_retriever.cli", "serve", "--db", str(db), "--model", "tiny", "--port", "0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
    with process, process.stderr:
        try:
            line = process.stderr.readline()
            assert line.startswith("serving on http://"), line + process.stderr.read()
            host, _, port = line.split()[2].removeprefix("http://").rstrip("/").rpartition(":")
            socket.create_connection((host, int(port)), 30).close()  # refused, if it did not listen yet
            until = time.monotonic() + 30
            while read_note(db) is None and time.monotonic() < until:
                time.sleep(0.02)
            yield db, line.split()[2], process
        finally:
            process.kill()


def line_of(process: subprocess.Popen[str], words: str) -> str:
    """The next line with these words, after bars of downloads, which end with no line."""
    before = []
    for line in process.stderr:
        if words in line:
            return line
        before.append(line)
    raise AssertionError("".join(before))


def rows(out: str) -> list[dict]:
    """Rows of --json; vectors of another batch differ in the last digits."""
    return [{**row, "score": pytest.approx(row["score"], abs=1e-6)} for row in json.loads(out)]


def test_search_asks_the_server_of_the_file_and_gives_the_same(served, queries, capfd):
    """Without a note it searches by itself."""
    db, _, process = served
    note = db / NOTE
    assert stat.S_IMODE(note.stat().st_mode) == 0o600
    assert read_note(db).pid == process.pid
    asked = [run(capfd, *SEARCH, "--db", db, *query) for query in queries]
    hidden = note.rename(db / "hidden")
    alone = [run(capfd, *SEARCH, "--db", db, *query) for query in queries]
    hidden.rename(note)
    for (code, out, err), (its_code, its_out, its_err) in zip(alone, asked, strict=True):
        assert (its_code, its_err) == (code, err)
        assert json.loads(its_out) == rows(out)


def test_via_gives_the_same_without_paths(served, queries, leopard, images, capfd):
    """The whole command line, but for where the files of the server lie."""
    db, url, _ = served
    more = ("--image", str(leopard), "--image", str(next(images.rglob("*stars.jpg"))), "-k", "4")
    hidden = (db / NOTE).rename(db / "hidden")
    for query in [*queries, more]:
        asked = run(capfd, *SEARCH, "--via", url, *query)
        alone = run(capfd, *SEARCH, "--db", db, *query)
        told = [{key: value for key, value in row.items() if key != "file_path"} for row in rows(alone[1])]
        assert (asked[0], asked[2]) == (alone[0], alone[2])
        assert json.loads(asked[1]) == told
    hidden.rename(db / NOTE)
    assert json.loads(run(capfd, *SEARCH, "--db", db, *more)[1]) == rows(alone[1])
    for option, says in (("--per-item", "--per-item: no column 'item'"), ("--rerank", "--via goes without --rerank")):
        code, _, err = run(capfd, *SEARCH, "--via", url, "--text", "mug", option)
        assert (code, says in err) == (2, True), err
    code, _, err = run(capfd, "search", "mug", "--via", url, "--paths")
    assert (code, "--via goes without --paths" in err) == (2, True)
    code, _, err = run(capfd, *SEARCH, "--via", "http://127.0.0.1:9", "--text", "mug")
    assert (code, "does not answer" in err) == (2, True)


def test_paths_come_from_a_server_too(served, capfd):
    db, _, _ = served
    code, out, _ = run(capfd, "search", "a mug", "--db", db, "-k", "2", "--paths")
    assert (code, [Path(path).parent.name for path in out.splitlines()]) == (0, ["mug", "mug"])


def test_errors_of_a_server_are_those_of_the_command(served, capfd):
    db, _, _ = served
    code, _, err = run(capfd, *SEARCH, "--db", db, "--text", "x", "--where", "nothing=1")
    assert (code, "--where: no column 'nothing'" in err) == (2, True)
    code, _, err = run(capfd, *SEARCH, "--db", db, "--image", "missing.png")
    assert (code, "missing.png" in err) == (2, True)


def test_a_note_that_others_could_have_written_is_not_believed(served, tmp_path):
    db, _, _ = served
    note = db / NOTE
    assert read_note(db) is not None
    note.chmod(0o644)
    assert read_note(db) is None
    note.chmod(0o600)
    copied = tmp_path / "copy.db"
    copied.mkdir()
    (copied / NOTE).write_bytes(note.read_bytes())
    (copied / NOTE).chmod(0o600)
    assert read_note(copied) is None  # of another folder
    reachable = read_note(db)
    folder = Path(reachable.address).parent
    folder.chmod(0o755)
    try:
        assert not reachable.is_reachable
    finally:
        folder.chmod(0o700)


def test_a_missing_collection_is_said_before_a_model_is_looked_for(db, capfd):
    code, _, err = run(capfd, "serve", "--db", db, "--collection", "other", "--model", "no-such-model")
    assert (code, len(err.splitlines())) == (2, 1)
    assert "there is no collection 'other'" in err and "'mm_retriever' (9 rows)" in err


def test_a_search_with_a_server_waits_for_no_model(served):
    """Truth: Python's own list of what the command imports; torch alone takes seconds."""
    db, _, _ = served
    command = [sys.executable, "-X", "importtime", "-m", "mm_retriever.cli", *SEARCH, "--db", str(db), "--text", "mug"]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=ENVIRONMENT)
    assert json.loads(done.stdout)
    lines = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    imported = {line.rsplit("|", 1)[1].strip().split(".")[0] for line in lines}
    assert "http" in imported
    assert imported.isdisjoint({"torch", "transformers", "llama_index", "pymilvus", "milvus_lite"})


@pytest.mark.slow
def test_weights_that_are_not_here_are_downloaded_behind_a_page(images, tmp_path):
    """Truth: the page, and what it answers, while half of the weights are here, and after the rest came."""
    db, released = tmp_path / "a.db", threading.Event()
    with pytest.raises(SystemExit):
        main(["index", str(images), "--db", str(db), "--model", "tiny"])
    with scripted_hub({"some/model": TINY}, released) as (hub, _):
        network = {"HF_ENDPOINT": hub, "HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "0"}
        command = ["serve", "--db", str(db), "--model", "some/model", "--port", "0"]
        process = subprocess.Popen(
            [sys.executable, "-m", "mm_retriever.cli", *command],
            stderr=subprocess.PIPE,
            text=True,
            env={**ENVIRONMENT, **network},
        )
        try:
            address = line_of(process, "downloading some/model; how far it is: http://127.0.0.1:").split()[-1]
            page = httpx.get(address, headers={"accept-language": "de"})
            assert (page.status_code, page.headers["retry-after"]) == (503, "5")
            assert "Die Gewichte von some/model werden heruntergeladen" in page.text
            assert "<progress" in page.text
            assert "script-src 'self'" in page.headers["content-security-policy"]
            assert httpx.get(address + "static/waiting.js").status_code == 200
            refused = httpx.post(address + "v1/search", json={"text": "mug"})
            assert (refused.status_code, refused.headers["retry-after"]) == (503, "5")
            assert "are being downloaded" in refused.json()["error"]
            assert httpx.get(address, headers={"host": "elsewhere.example"}).status_code == 421
            released.set()
            line_of(process, f"serving on {address}")
            found = httpx.post(address + "v1/search", json={"text": "a mug", "top_k": 1}).json()["results"]
            assert [one["label"] for one in found] == ["mug"]
        finally:
            released.set()
            process.kill()
            process.wait()
            process.stderr.close()


def test_a_server_that_was_killed_is_said_and_done_without(served, capfd):
    db, _, process = served
    process.kill()
    process.wait()
    code, out, err = run(capfd, *SEARCH, "--db", db, "--text", "a mug", "-k", "1")
    assert (code, json.loads(out)[0]["label"]) == (0, "mug")
    assert "searching without a server" in err
