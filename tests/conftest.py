"""Shared by all tests: nothing here may reach the network."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator

import pytest

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
        if "tried" in getattr(item, "fixturenames", ()):
            item.add_marker("hostile")
