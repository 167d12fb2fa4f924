"""A search over twelve drawn products."""

from __future__ import annotations

from pathlib import Path

import pytest

from mm_retriever.embedding import VisualizedBGEEmbedding
from mm_retriever.search_tools import Conversation, ImageSearch
from tests.support.drawn_store import draw_leopard, drawn_store


@pytest.fixture(scope="module")
def embed_model() -> VisualizedBGEEmbedding:
    return VisualizedBGEEmbedding("tiny", device="cpu")


@pytest.fixture(scope="module")
def store(tmp_path_factory, embed_model):
    store = drawn_store(tmp_path_factory.mktemp("store"), embed_model)
    yield store
    store.close()


@pytest.fixture(scope="module")
def leopard(tmp_path_factory) -> Path:
    return draw_leopard(tmp_path_factory.mktemp("query") / "leopard.png")


@pytest.fixture
def search(store, embed_model) -> ImageSearch:
    return ImageSearch(store, embed_model)


@pytest.fixture
def talk(leopard) -> Conversation:
    conversation = Conversation()
    conversation.attach("photo.png", leopard)
    return conversation
