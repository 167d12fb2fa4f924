"""A store of drawn products, and an image to ask with."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from mm_retriever.embedding import VisualizedBGEEmbedding
from mm_retriever.rerank import Phi3VisionRerank
from tests.support.drawn_store import drawn_store
from tests.support.query_image import (
    TOP_K,
    UPLOADS,
    World,
)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("query")
    model = VisualizedBGEEmbedding("tiny", device="cpu")
    store = drawn_store(folder, model)
    path = folder / "images" / "phone case" / "natural leopard.jpg"
    yield World(store, model, path, Phi3VisionRerank("tiny", top_n=TOP_K, caption=False, reasons="none"))
    store.close()
    for file in UPLOADS:
        file.close()
