"""Which index the vectors of a collection get, by its size and place, and how each is built and searched.

Source of the parameters: the documentation of Milvus (milvus.io/docs, "Index", "In-memory Index", "On-disk Index").
"""

from __future__ import annotations

from typing import Any

INDEXES = ("FLAT", "HNSW", "HNSW_SQ", "IVF_RABITQ", "DISKANN", "AUTOINDEX")
LITE_INDEXES = ("FLAT", "HNSW", "HNSW_SQ", "AUTOINDEX")
SINCE = {"HNSW_SQ": (2, 5), "IVF_RABITQ": (2, 6)}
"""The first version of Milvus that has an index; the others are older than what this package serves."""

MOST_FLAT_ROWS = 200_000
"""Of a Milvus Lite file: a search compares the query with all of them, in about 0.1 s at 768 numbers each."""
MOST_HNSW_ROWS = 5_000_000
"""At 3.2 kB of memory for 768 numbers, 16 GB."""
MOST_SQ_ROWS = 50_000_000
"""At 0.9 kB, 45 GB; above that, IVF_RABITQ scans what HNSW would keep links for."""

_GRAPH = {"M": 16, "efConstruction": 200}
_NPROBE = 64


def index_for(rows: int | None, *, lite: bool, self_hosted: bool) -> str:
    """The index of a new collection.

    Args:
        rows: that it is made for; None: not known, and taken to be few.
        lite: in a Milvus Lite file.
        self_hosted: on a server that is not Zilliz Cloud, which chooses for itself.
    """
    few = rows or 0
    if lite:
        return "FLAT" if few <= MOST_FLAT_ROWS else "HNSW"
    if not self_hosted:
        return "AUTOINDEX"
    if few <= MOST_HNSW_ROWS:
        return "HNSW"
    return "HNSW_SQ" if few <= MOST_SQ_ROWS else "IVF_RABITQ"


def build_params(index: str, rows: int | None) -> dict[str, Any]:
    """What an index is built with."""
    if index == "HNSW":
        return dict(_GRAPH)
    if index == "HNSW_SQ":
        return _GRAPH | {"sq_type": "SQ8"}
    if index == "IVF_RABITQ":  # 4 sqrt(n) lists, within what Milvus takes
        lists = min(65_536, max(1_024, round(4 * (rows or 0) ** 0.5)))
        return {"nlist": lists, "refine": True, "refine_type": "SQ8"}
    return {}


def search_params(index: str, limit: int) -> dict[str, Any]:
    """What a search for so many rows tells an index."""
    if index in ("HNSW", "HNSW_SQ"):
        return {"ef": min(32_768, max(256, 4 * limit))}
    if index == "IVF_RABITQ":
        return {"nprobe": _NPROBE, "rbq_query_bits": 6, "refine_k": 2}
    if index == "DISKANN":
        return {"search_list": min(65_535, max(100, 2 * limit))}
    return {}
