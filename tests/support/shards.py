"""Shards in a folder: made in small, read as anybody reads Parquet, and checked as a whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet

from mm_retriever.bulk import ShardReport, embed_to_shards
from mm_retriever.bulk.plan import read_plan
from tests.support.colour_embedding import ColourEmbedding

SMALL = {"rows_per_shard": 5, "batch_size": 2, "show_progress": False}


def embed(source: Any, out: Path, model: Any = None, **options: Any) -> ShardReport:
    return embed_to_shards(source, out, model or ColourEmbedding(), **{**SMALL, **options})


def rows_of(out: Path) -> list[dict[str, Any]]:
    """The rows of all shards; what is in the column of metadata is put beside the others."""
    rows = []
    for path in sorted((out / "shards").iterdir()):
        for row in pyarrow.parquet.read_table(path).to_pylist():
            rows.append({**row, **json.loads(row.pop("$meta"))})
            rows[-1].pop("$meta", None)
    return rows


def planned_ids(out: Path) -> list[list[str]]:
    plan = read_plan(out)
    return [[item.id for item in plan.items(number)] for number in range(plan.shards)]


def skips(report: Any) -> list[tuple[str, str]]:
    return sorted((skipped.path, skipped.reason) for skipped in report.skipped)


def check_whole(folder: Path, out: Path) -> None:
    """Every shard is there, each planned image in its own, and nothing else is left."""
    report = embed(folder, out)
    assert report.written == 0
    planned = planned_ids(out)
    paths = {item.id: item.path for number in range(len(planned)) for item in read_plan(out).items(number)}
    skipped = {path for path, _ in skips(report)}
    for number, ids in enumerate(planned):
        stored = pyarrow.parquet.read_table(out / "shards" / f"{number:06d}.parquet", columns=["id"])["id"].to_pylist()
        assert stored == [id_ for id_ in ids if paths[id_] not in skipped]
    assert sorted(path.name for path in out.iterdir()) == ["drafts", "plan", "shards"]
    assert not list((out / "drafts").iterdir())
    assert len(list((out / "shards").iterdir())) == len(planned)
