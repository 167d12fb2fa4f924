"""A model hub on this machine that serves folders, as far as huggingface_hub asks a hub for files."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def scripted_hub(repos: dict[str, Path], released: threading.Event | None = None) -> Iterator[tuple[str, list[str]]]:
    """Its address, and the files that were fetched from it.

    Args:
        repos: folders by the id of their repository.
        released: before it is set, weights are sent up to their middle.
    """
    fetched: list[str] = []

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.answer(body=True)

        def do_HEAD(self) -> None:
            self.answer(body=False)

        def answer(self, *, body: bool) -> None:
            path = unquote(self.path.partition("?")[0]).strip("/")
            for repo, folder in repos.items():
                files = [str(file.relative_to(folder)) for file in sorted(folder.rglob("*")) if file.is_file()]
                if path.startswith(f"api/models/{repo}/tree"):
                    return self.send(json.dumps([entry(folder, file) for file in files]).encode(), body=body)
                if path.startswith(f"api/models/{repo}"):
                    siblings = [{"rfilename": file} for file in files]
                    return self.send(json.dumps({"id": repo, "sha": COMMIT, "siblings": siblings}).encode(), body=body)
                wanted = path.removeprefix(f"{repo}/resolve/").partition("/")[2]
                if path.startswith(f"{repo}/resolve/") and wanted in files:
                    content = (folder / wanted).read_bytes()
                    fetched.append(wanted) if body else None
                    holds = released if wanted.endswith(".safetensors") else None
                    return self.send(content, holds, body=body, ETag=f'"{hashlib.sha256(content).hexdigest()}"')
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return None

        def send(self, content: bytes, holds: threading.Event | None = None, *, body: bool, **headers: str) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("X-Repo-Commit", COMMIT)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            if not body:
                return
            if holds is not None:
                self.wfile.write(content[: len(content) // 2])
                content = content[len(content) // 2 :]
                holds.wait()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", fetched
    finally:
        server.shutdown()
        server.server_close()


def entry(folder: Path, file: str) -> dict[str, object]:
    return {"type": "file", "path": file, "size": (folder / file).stat().st_size, "oid": COMMIT}
