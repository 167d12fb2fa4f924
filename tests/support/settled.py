"""Files that are old enough for their time and inode to tell a change: a new one may change within the same tick."""

from __future__ import annotations

import time
from pathlib import Path

from mm_retriever.ingest.nodes import file_stamp
from mm_retriever.own_keys import FILE_STAMP


def settle(*paths: Path) -> None:
    """Wait until ingestion would believe the stamps of these files, and of those below these folders."""
    files = [path for top in paths for path in ([top] if top.is_file() else top.rglob("*")) if path.is_file()]
    assert files
    while any(FILE_STAMP not in file_stamp(str(path)) for path in files):
        time.sleep(0.05)
