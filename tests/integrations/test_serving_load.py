"""Many users at a server of its own process: `benchmarks/serving.py` in its short form, without its times."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.support.mcp import ENVIRONMENT, ROOT

pytest.importorskip("starlette", reason='needs the extra "web"')


@pytest.mark.slow
def test_many_users_get_right_answers_and_the_memory_stays_flat(tmp_path):
    """Ten users for twenty seconds. Torch and Python keep some of what a load needs; a leak would be MB a second."""
    options = ["--users", "10", "--seconds", "20", "--images", "60", "--commands", "0"]
    command = [sys.executable, ROOT / "benchmarks" / "serving.py", *options, "--json", tmp_path / "serving.json"]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=300)
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "serving.json").read_text())["figures"]
    assert (figures["errors"], figures["wrong"]) == (0, 0), figures["first_errors"]
    assert figures["requests"] > 50
    assert figures["memory_end_mb"] - figures["memory_start_mb"] < 150
