"""Debian's Chromium, driven by Playwright; tests that import this skip where one of them is missing."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

playwright = pytest.importorskip("playwright.sync_api", reason="the browser's driver is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
SHOTS = os.environ.get("MM_RETRIEVER_SCREENSHOTS", "")
"""Where screenshots go; "": none are made."""
expect = playwright.expect
expect.set_options(timeout=30_000)


def in_browser(group: str) -> list[pytest.MarkDecorator]:
    """The marks of a module of tests in the browser.

    Args:
        group: of the tests that one worker runs, with one server and one browser.
    """
    return [
        pytest.mark.slow,
        pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine"),
        pytest.mark.xdist_group(group),
    ]


@contextmanager
def launched() -> Iterator[Any]:
    """A browser without a window."""
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()
