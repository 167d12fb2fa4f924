"""What was tried against the package and what was lost: runs every test that counts what it throws at the code.

    python benchmarks/hostile.py                # as much as continuous integration
    python benchmarks/hostile.py --effort 20    # twenty times as much where input is random

Hostile images, filters, URLs, weights and model answers; ingestion killed at random points; servers killed and
restarted; queries under load. Each test fails at the first thing that is lost, let in, or answered wrongly, so a line
is printed only for what was tried without any. The tests are those with the marker `hostile`.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--effort", type=int, default=1, help="how many times as much random input")
    parser.add_argument("--select", default="", help="pytest's -k: only some of the tests")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-m", "hostile", "--timeout", "0", f"--junitxml={results}"]
        command += ["-k", options.select] if options.select else []
        environment = {**os.environ, "EFFORT": str(options.effort)}
        status = subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode
        print(table(ET.parse(results).getroot()))  # noqa: S314 - pytest's own file
    sys.exit(status)


def table(results: ET.Element) -> str:
    """Return, for each thing that was tried, how often, in how many tests, and how many of these failed."""
    tried: Counter[str] = Counter()
    tests: Counter[str] = Counter()
    failed: Counter[str] = Counter()
    for case in results.iter("testcase"):
        broken = case.find("failure") is not None or case.find("error") is not None
        for item in case.iter("property"):
            name = item.attrib["name"]
            tried[name] += int(item.attrib["value"])
            tests[name] += 1
            failed[name] += broken
    lines = [f"{'tried':<44} {'how many':>10} {'tests':>6} {'failed':>7}"]
    lines += [f"{name:<44} {number:>10,} {tests[name]:>6} {failed[name]:>7}" for name, number in sorted(tried.items())]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
