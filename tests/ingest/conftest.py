"""A store on real Milvus Lite, the colour embedding of the tests as the model, and a folder of three images."""

from __future__ import annotations

from pathlib import Path

import pytest

from mm_retriever.store import open_store
from tests.support.colour_embedding import ColourEmbedding, paint


@pytest.fixture(scope="package")
def shared(tmp_path_factory):
    with open_store(tmp_path_factory.mktemp("ingest") / "shared.db", ColourEmbedding()) as opened:
        yield opened


@pytest.fixture
def store(shared):
    shared.clear()
    return shared


@pytest.fixture
def model():
    return ColourEmbedding()


@pytest.fixture
def folder(tmp_path) -> Path:
    """Three images, in folders; beside them other files."""
    root = tmp_path / "photos"
    paint(root / "cars" / "fast" / "red.png", "red")
    paint(root / "cars" / "blue.jpg", "blue")
    paint(root / "green.JPEG", "green", size=(30, 20))
    (root / "notes.txt").write_text("no image")
    paint(root / ".hidden" / "black.png", "black")
    paint(root / ".black.png", "black")
    return root
