"""A search over drawn products as the MCP server has it, and a store for its command."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from mm_retriever.cli import main
from mm_retriever.embedding import VisualizedBGEEmbedding
from mm_retriever.search_tools import ImageSearch
from tests.support.drawn_store import draw_images, draw_leopard, drawn_store
from tests.support.web import HOME


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("mcp")


@pytest.fixture(scope="module")
def search(folder) -> Iterator[ImageSearch]:
    from mcp_server_mm_retriever import image_search  # needs the extra "mcp"

    embed_model = VisualizedBGEEmbedding("tiny", device="cpu")
    store = drawn_store(folder, embed_model)
    yield image_search(store, embed_model, roots=[folder])
    store.close()


@pytest.fixture(scope="module")
def leopard(folder) -> Path:
    return draw_leopard(folder / "leopard.png")


@pytest.fixture(scope="module")
def db(tmp_path_factory) -> Path:
    """A store in a file that this process does not hold open."""
    folder = tmp_path_factory.mktemp("served")
    with pytest.raises(SystemExit):
        main(["index", str(draw_images(folder / "images")), "--db", str(folder / "drawn.db"), "--model", "tiny"])
    return folder / "drawn.db"


# ------------------------------------------------------------------------------------------ the web app


@pytest.fixture(scope="module")
def embed_model() -> VisualizedBGEEmbedding:
    return VisualizedBGEEmbedding("tiny", device="cpu")


@pytest.fixture(scope="module")
def store(folder, embed_model):
    with drawn_store(folder, embed_model) as store:
        yield store


@pytest.fixture(scope="module")
def make_app(store, embed_model, folder):
    from web_mm_retriever import web_app  # needs the extra "web"

    def make(**options):
        return web_app(store, embed_model, thumbnails=folder / "thumbnails", **options)

    return make


@pytest.fixture(scope="module")
def app(make_app):
    return make_app()


@pytest.fixture(scope="module")
def client(app):
    from starlette.testclient import TestClient

    with TestClient(app, base_url=HOME) as client:
        yield client


@pytest.fixture(scope="module")
def axe(tmp_path_factory) -> str:
    """The accessibility checker, from npm."""
    if shutil.which("npm") is None:
        pytest.skip("no npm on this machine")
    folder = tmp_path_factory.mktemp("axe")
    command = ["npm", "pack", "--silent", "axe-core@4"]
    packed = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
    if packed.returncode:
        pytest.skip(f"npm gave no axe-core: {packed.stderr[-200:]}")
    shutil.unpack_archive(next(folder.glob("*.tgz")), folder, "gztar", filter="data")
    return (folder / "package" / "axe.min.js").read_text(encoding="utf-8")
