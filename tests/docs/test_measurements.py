"""The tables of figures are what `benchmarks/report.py` makes of the results beside it."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
import report

RECORDS = report.read_records(report.RESULTS)


@pytest.mark.parametrize("page", report.PAGES, ids=lambda page: page.name)
def test_the_table_of_a_page_is_made_from_the_results(page) -> None:
    """Our promise: no figure in these tables was typed. A page without the markers has no such table."""
    text = page.read_text(encoding="utf-8")
    assert report.with_table(text, RECORDS, short=report.PAGES[page]) == text
    assert text.count(report.BEGIN) == text.count(report.END) == int(not report.PAGES[page] or report.BEGIN in text)


def test_every_result_says_what_gave_it() -> None:
    """Our promise: processor, versions, commit and command stand beside a figure."""
    for record in RECORDS:
        assert list(report.rows(record)), record["benchmark"]
        assert record["machine"]["processor"], record["benchmark"]
        assert {"python", "torch"} <= set(record["versions"]), record["benchmark"]
        assert re.fullmatch(r"[0-9a-f]{10}", record["commit"]), record["benchmark"]
        assert record["command"].startswith(f"python benchmarks/{record['benchmark']}.py")


@pytest.mark.slow
def test_a_benchmark_writes_what_the_report_reads(tmp_path) -> None:
    """By the smallest real run."""
    place = tmp_path / "latency.json"
    script = report.ROOT / "benchmarks" / "query_latency.py"
    command = [sys.executable, script, "--sizes", "300", "--readers", "1", "--json", place]
    done = subprocess.run(command, capture_output=True, text=True, cwd=report.ROOT)
    assert done.returncode == 0, done.stderr
    assert json.loads(place.read_text())["command"] == "python benchmarks/query_latency.py --sizes 300 --readers 1"
    table = "".join(report.whole_table(report.read_records(tmp_path)))
    assert "300 vectors, index auto: ms without / with a filter" in table


ONLY = """
import sys
for name in ("llama_index", "pymilvus", "rich", "psutil", "cachetools", "typer"):
    sys.modules[name] = None
import runpy
sys.path.insert(0, "benchmarks")
sys.argv = ["benchmarks/gpu.py", "--device", "cpu", "--dtype", "float32", "--small", "--json", sys.argv[1]]
runpy.run_path("benchmarks/gpu.py", run_name="__main__")
"""


@pytest.mark.slow
def test_the_benchmark_for_gpus_runs_its_steps_on_a_cpu_without_most_dependencies(tmp_path) -> None:
    """Its own words: torch, transformers, tokenizers, safetensors and Pillow are all that it needs."""
    done = subprocess.run(
        [sys.executable, "-c", ONLY, tmp_path / "gpu.json"], capture_output=True, text=True, cwd=report.ROOT
    )
    assert done.returncode == 0, done.stderr
    assert "a training step of 4 pairs" in "".join(report.whole_table(report.read_records(tmp_path)))
    for name in ("times_original", "training", "reranking", "product_gflop_per_second"):
        assert f"\n{name}: " in done.stdout
