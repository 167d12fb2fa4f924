"""A search over drawn products as the MCP server has it, and a store for its command."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from mm_retriever.cli import main
from mm_retriever.embedding import VisualizedBGEEmbedding
from mm_retriever.search_tools import ImageSearch
from tests.support.drawn_store import draw_images, draw_leopard, drawn_store


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
