from __future__ import annotations

import json
import re
import runpy
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from mm_retriever.demo.catalogue import draw_product, draw_theme

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = sorted(path.name for path in (ROOT / "examples").glob("[0-9]*.py"))
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"<!-- test: ([\w-]+) -->\n```python\n(.*?)```", README, flags=re.DOTALL)


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


@pytest.mark.parametrize(("name", "code"), BLOCKS, ids=[name for name, _ in BLOCKS])
def test_the_python_of_the_readme_runs(name, code, capsys, monkeypatch, tmp_path):
    """The blocks that a reader copies, with the bundled models in place of the published ones."""
    monkeypatch.chdir(tmp_path)
    for number, kind in enumerate(("phone case", "mug", "umbrella", "cap")):
        path = tmp_path / "photos" / kind / f"{number}.jpg"
        path.parent.mkdir(parents=True)
        draw_product(kind, "leopard", "natural", seed=number, size=128).save(path)
    draw_theme("leopard", "natural", seed=9, size=128).save(tmp_path / "leopard.jpg")
    offline = code.replace("VisualizedBGEEmbedding()", 'VisualizedBGEEmbedding("tiny")')
    offline = re.sub(r"Phi3VisionRerank\((?=top_n)", 'Phi3VisionRerank("tiny", ', offline)
    exec(compile(offline, f"README.md#{name}", "exec"), {"__name__": "__main__"})
    assert "photos/phone case/0.jpg" in capsys.readouterr().out.splitlines()[0]


def test_the_readme_has_python_to_run():
    """A README whose blocks were renamed must not pass by testing nothing."""
    assert [name for name, _ in BLOCKS][:1] == ["quickstart"]
