"""Shared by all tests: nothing here may reach the network."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator

import pytest

from tests.support.milvus_server import MilvusServer, ServerUnavailable

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture
def tried(record_property: Callable[[str, object], None]) -> Iterator[Counter[str]]:
    """Counts what a test throws at the code, for the table that `benchmarks/hostile.py` prints."""
    counts: Counter[str] = Counter()
    yield counts
    for name, number in counts.items():
        record_property(name, number)


@pytest.hookimpl(tryfirst=True)  # before `-m` selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        fixtures = getattr(item, "fixturenames", ())
        if "tried" in fixtures:
            item.add_marker("hostile")
        # a worker takes a whole module, and one worker all that needs the server: two servers would starve each other
        module = item.nodeid.split("::")[0]
        item.add_marker(pytest.mark.xdist_group("server" if "milvus_server" in fixtures else module))


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


@pytest.fixture(autouse=True)
def server_is_up(request: pytest.FixtureRequest) -> None:
    """A server that died in the test before is there again."""
    if "milvus_server" in request.fixturenames:
        request.getfixturevalue("milvus_server").revive()
