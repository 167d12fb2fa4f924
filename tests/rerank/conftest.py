"""A scripted server of a vision LLM, and images for it to rank."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.llm_server import ScriptedServer, draw_noise, ranking


@pytest.fixture(scope="module")
def running() -> Iterator[ScriptedServer]:
    with ScriptedServer() as script:
        yield script


@pytest.fixture
def server(running: ScriptedServer) -> ScriptedServer:
    running.requests.clear()
    running.reply = lambda _: ranking(1)
    return running


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_noise(tmp_path_factory.mktemp("images"))
