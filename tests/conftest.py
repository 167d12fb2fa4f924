"""Shared by all tests: nothing here may reach the network."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator

import pytest

from tests.milvus_server import MilvusServer, ServerUnavailable

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(scope="session")
def milvus_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MilvusServer]:
    """A real Milvus server; give each test a collection of its own. Whoever stops it starts it again."""
    folder = tmp_path_factory.mktemp("milvus")
    server = None
    try:
        server = MilvusServer(folder)
        server.start()
        yield server
    except ServerUnavailable as error:
        pytest.skip(f"no Milvus server: {error}")
    finally:
        if server is not None:
            server.kill()
        shutil.rmtree(folder)
