"""What an answer costs: seconds, tokens, and the memory of this process at its height."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_MIB = 2**20


@dataclass
class Cost:
    """The cost of the queries of a run.

    Attributes:
        embedding: seconds of each query that was timed, embedded alone and without a cache.
        searching: seconds of each part's search, divided by its queries.
        reranking: seconds of each query.
        tokens: read and written by a reranker, of each query.
        peak_mib: memory of this process at its height; 0: this system does not tell.
        gpu_peak_mib: of the GPU, likewise.
    """

    embedding: list[float] = field(default_factory=list)
    searching: list[float] = field(default_factory=list)
    reranking: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    peak_mib: int = 0
    gpu_peak_mib: int = 0

    @property
    def seconds(self) -> float:
        """For one query: the medians of its steps together."""
        return sum(median(step) for step in (self.embedding, self.searching, self.reranking) if step)

    @property
    def tokens_a_query(self) -> float:
        """The mean."""
        return sum(self.tokens) / len(self.tokens) if self.tokens else 0.0

    @contextmanager
    def peak(self) -> Iterator[None]:
        """Take note of the memory while a block runs."""
        cuda: Any = getattr(sys.modules.get("torch"), "cuda", None)
        gpu = cuda is not None and cuda.is_available()
        with suppress(OSError):
            _RESET.write_text("5", encoding="ascii")  # the height is what is held now
        if gpu:
            cuda.reset_peak_memory_stats()
        yield
        self.peak_mib = max(self.peak_mib, _peak_mib())
        if gpu:
            self.gpu_peak_mib = max(self.gpu_peak_mib, cuda.max_memory_allocated() // _MIB)


def _peak_mib() -> int:
    """Of this process: since the reset on Linux, elsewhere since its beginning."""
    with suppress(OSError):
        lines = dict(line.split(":", 1) for line in _STATUS.read_text(encoding="ascii").splitlines() if ":" in line)
        if "VmHWM" in lines:
            return int(lines["VmHWM"].split()[0]) // 1024
    try:
        import resource
    except ImportError:  # Windows
        return 0
    height = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return height // _MIB if sys.platform == "darwin" else height // 1024
