"""What a benchmark's `--json` writes: its figures, and the command, machine, versions and commit that gave them."""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "transformers", "openvino", "nncf", "milvus-lite", "pymilvus", "llama-index-core", "pillow")
_ARITHMETIC = (
    "avx2",
    "avx512f",
    "avx512_vnni",
    "avx_vnni",
    "avx512_bf16",
    "amx_bf16",
    "amx_int8",
    "asimd",
    "i8mm",
    "bf16",
)


def write(path: Path | None, figures: Any, *, threads: int, note: str = "") -> None:
    """Write what was measured, if a path was given.

    Args:
        path: of the JSON file.
        figures: whatever the benchmark measured.
        threads: that computed the model, or the queries.
        note: what a reader of the figures must know besides.
    """
    if path is None:
        return
    record = {"benchmark": Path(sys.argv[0]).stem, "command": command(), "machine": machine(threads)}
    record |= {"versions": versions(), "commit": commit(), "note": note, "figures": figures}
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def command() -> str:
    """How this process was started, without what only says where the figures go."""
    words = shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    return re.sub(r" --json(=| )\S+", "", words)


def machine(threads: int) -> dict[str, Any]:
    """The processor by name, what it can compute in, its cores and memory."""
    from mm_retriever.devices import processor_name  # loads torch, whose memory is not that of what is measured

    text = cpu_facts()
    family = re.findall(r"^(?:cpu family|model)\s*: (\d+)$", text, re.MULTILINE)[:2]
    return {
        "processor": processor_name() + (f" (family {family[0]}, model {family[1]})" if len(family) == 2 else ""),
        "arithmetic": arithmetic(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": threads,
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9),
        "system": f"{platform.system()} {platform.machine()}",
    }


def arithmetic() -> list[str]:
    """What kinds of wide arithmetic the processor has, as the system calls them."""
    flags = set((re.findall(r"^(?:flags|Features)\s*: (.*)$", cpu_facts(), re.MULTILINE) or [""])[0].split())
    return [name for name in _ARITHMETIC if name in flags]


def cpu_facts() -> str:
    """What the system says of the processor; "" where it has no such file."""
    facts = Path("/proc/cpuinfo")
    return facts.read_text(encoding="utf-8", errors="replace") if facts.exists() else ""


def versions() -> dict[str, str]:
    """Of Python and of what computes; a package that is not installed is left out."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """The commit that was measured, with a "+" if the code differs from it; "" outside a clone."""

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", ROOT, *words], check=True, capture_output=True, text=True).stdout.strip()  # noqa: S607 - the git of whoever measures

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "mm_retriever", "benchmarks/*.py")
        return git("rev-parse", "--short=10", "HEAD") + "+" * bool(changed)
    except (OSError, subprocess.CalledProcessError):
        return ""


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and most of repeated measurements."""
    return {"median": statistics.median(values), "least": min(values), "most": max(values), "of": len(values)}
