from __future__ import annotations

import json
import runpy
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
EXAMPLES = sorted(path.name for path in (ROOT / "examples").glob("[0-9]*.py"))


# what LlamaIndex's agents do to themselves
@pytest.mark.filterwarnings("ignore::pydantic.warnings.PydanticDeprecatedSince20")
@pytest.mark.filterwarnings("ignore::pydantic.warnings.PydanticDeprecatedSince211")
@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.slow
def test_an_example_runs_and_says_something(name, capfd, monkeypatch, tmp_path):
    """Every numbered example, as a user starts it."""
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")
    assert capfd.readouterr().out.strip()


class Ranks(BaseHTTPRequestHandler):
    """Answers every chat completion of OpenAI's protocol with one ranking."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        message = {"role": "assistant", "content": '{"ranking": [2, 1, 3, 4]}'}
        choices = [{"index": 0, "finish_reason": "stop", "message": message}]
        body = json.dumps({"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": choices})
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.slow
def test_the_remote_example_ranks_as_the_server_says(capsys, monkeypatch):
    """The last example with a server there: what was second comes first."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Ranks)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    monkeypatch.setenv("VISION_URL", f"http://127.0.0.1:{server.server_port}/v1")
    try:
        runpy.run_path(str(ROOT / "examples" / "08_remote_vlm.py"), run_name="__main__")
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
    assert capsys.readouterr().out.splitlines()[0].startswith("2 -> 1")


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])
def test_a_notebook_runs_and_shows_images(path: Path, tmp_path: Path) -> None:
    """Offline, in a fresh kernel, from the first cell to the last; the outputs that are kept show images too."""
    notebook = nbformat.read(path, as_version=4)
    kept = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert any("image/jpeg" in output.get("data", {}) for output in kept)
    ran = NotebookClient(notebook, timeout=300, kernel_name="python3").execute(cwd=str(tmp_path))
    outputs = [output for cell in ran.cells for output in cell.get("outputs", ())]
    assert any("image/jpeg" in output.get("data", {}) for output in outputs)


def test_notebooks_are_small() -> None:
    """Thumbnails, so that a clone stays small."""
    assert sum(path.stat().st_size for path in NOTEBOOKS) < 1_000_000
