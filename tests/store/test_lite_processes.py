"""One Milvus Lite file while `index`, two MCP servers, a program, `search` and `info` use it, and its owner is killed.

Ten times whoever serves the file is killed. The others go on within five seconds; what is killed is started again. In
the end every image is there exactly once.
"""

from __future__ import annotations

import json
import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest

from mm_retriever.embedding import VisualizedBGEEmbedding
from mm_retriever.ingest import ingest_images
from mm_retriever.store import open_store
from mm_retriever.store.lite_wire import read_record
from tests.support.colour_embedding import COLOURS, paint
from tests.support.effort import EFFORT
from tests.support.processes import ends
from tests.support.warm import WarmProcess, warm_run

IMAGES = 300
KILLS = 10
PATIENCE = 20.0  # seconds; on a quiet machine the others go on within five

PROGRAM = """
import sys
from mm_retriever.embedding import VisualizedBGEEmbedding
from mm_retriever.store import open_store
store = open_store(sys.argv[1], VisualizedBGEEmbedding("tiny", device="cpu"))
print("ready", flush=True)
for line in sys.stdin:
    print(store.count(), flush=True)
"""


class Worker:
    """A process that is asked one line at a time, and started again when it was killed."""

    def __init__(self, *command: object) -> None:
        self._command = command
        self.start()

    def start(self) -> None:
        self.process = WarmProcess(*self._command)
        self._lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, args=(self.process, self._lines), daemon=True).start()

    @staticmethod
    def _read(process: WarmProcess, lines: queue.Queue[str]) -> None:
        for line in process.stdout:
            lines.put(line)

    @property
    def lives(self) -> bool:
        return self.process.poll() is None

    def says(self, seconds: float) -> str:
        return self._lines.get(timeout=seconds)

    def ask(self, line: str, seconds: float) -> str:
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return self.says(seconds)

    def end(self) -> None:
        ends(self.process)


class Program(Worker):
    def start(self) -> None:
        super().start()
        assert self.says(120) == "ready\n"

    def check(self, seconds: float) -> None:
        assert int(self.ask("", seconds)) >= 8


class McpServer(Worker):
    def start(self) -> None:
        super().start()
        self._number = 0
        client = {"protocolVersion": "2025-06-18", "capabilities": {}, "clientInfo": {"name": "test", "version": "1"}}
        self._request("initialize", client, 120)
        self.process.stdin.write(json.dumps({"jsonrpc": "2.0", "method": "notifications/initialized"}) + "\n")
        self.process.stdin.flush()

    def _request(self, method: str, params: dict[str, Any], seconds: float) -> dict[str, Any]:
        self._number += 1
        request = {"jsonrpc": "2.0", "id": self._number, "method": method, "params": params}
        answer = json.loads(self.ask(json.dumps(request), seconds))
        while answer.get("id") != self._number:
            answer = json.loads(self.says(seconds))
        return answer

    def check(self, seconds: float) -> None:
        asked = {"name": "search_images", "arguments": {"text": "red", "top_k": 3}}
        answer = self._request("tools/call", asked, seconds)["result"]
        assert not answer.get("isError"), answer


@contextmanager
def workers(*made: Callable[[], Worker]) -> Iterator[list[Worker]]:
    with ExitStack() as stack:
        started = []
        for make in made:
            started.append(make())
            stack.callback(started[-1].end)
        yield started


def command(*arguments: object) -> tuple[object, ...]:
    return ("-m", "mm_retriever.cli", *arguments)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_no_row_is_lost_or_doubled_while_the_owner_of_the_file_is_killed_again_and_again(tmp_path, tried):
    images, db = tmp_path / "images", tmp_path / "a.db"
    colours = list(COLOURS)
    number = IMAGES * EFFORT
    for one in range(number):
        paint(images / f"{one:04d}.png", colours[one % len(colours)], size=(one % 90 + 30, one // 90 + 30))
    model = VisualizedBGEEmbedding("tiny", device="cpu")
    with open_store(db, model) as store:
        ingest_images(sorted(images.iterdir())[:8], store, model, show_progress=False)
    use = ("--db", db, "--model", "tiny")
    made = (
        lambda: McpServer(*command("mcp", *use)),
        lambda: McpServer(*command("mcp", *use)),
        lambda: Program("-c", PROGRAM, db),
        lambda: Worker(*command("index", images, *use, "--batch-size", 4, "--json")),
    )
    with workers(*made) as (first, second, program, indexing):
        for kill in range(KILLS):
            record = read_record(db)
            owners = [one for one in (first, second, program, indexing) if record and one.process.pid == record.pid]
            for owner in owners:
                owner.process.kill()
                owner.process.wait(30)
            for one in (first, second, program):
                if one not in owners:
                    one.check(PATIENCE)
            if not indexing.lives and indexing.process.returncode:
                indexing.end()
                indexing.start()
            for owner in owners:
                if owner is not indexing:
                    owner.end()
                    owner.start()
            tried["kills of the process that serves a Milvus Lite file"] += len(owners)
            if kill % 3 == 0:
                for asked in (("search", "-t", "red", *use, "--json"), ("info", "--db", db)):
                    ran = warm_run(*command(*asked))
                    assert ran.returncode == 0, ran.stderr
        assert indexing.process.wait(600) == 0
    with open_store(db, model) as store:
        paths = sorted(row["file_path"] for page in store.scan(["file_path"]) for row in page)
    assert paths == sorted(str(path) for path in images.iterdir()), "every image exactly once"
