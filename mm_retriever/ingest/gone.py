"""Whether a stored file is gone, or can only not be seen at the moment. When in doubt it is not gone.

Proof is that the file system knows no such file, or that there is something else in its place. A file that cannot be
looked at (no permission, a stale mount, a bad disk, too few descriptors) is no proof, and neither is an empty folder on
another device than the file was on: a mount that is missing leaves one. Knows nothing of stores.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias

from mm_retriever.own_keys import FILE_STAMP, own_value

Fate: TypeAlias = Literal["there", "gone", "unknown"]


def fate(path: str, stored: Mapping[str, Any]) -> Fate:
    """Return what has become of a file, given the row that was made of it."""
    try:
        status = os.stat(path)  # noqa: PTH116 - ten times Path's speed
    except (FileNotFoundError, NotADirectoryError):
        return "unknown" if _may_be_unmounted(path, str(own_value(stored, FILE_STAMP) or "")) else "gone"
    except (OSError, ValueError):
        return "unknown"
    return "there" if stat.S_ISREG(status.st_mode) else "gone"


def _may_be_unmounted(path: str, stamp: str) -> bool:
    """A link that leads nowhere, or the nearest folder that is there: empty, and on another device."""
    device = stamp.rpartition("-")[2]
    try:
        for place in (Path(path), *Path(path).parents):
            try:
                status = place.stat()
            except (FileNotFoundError, NotADirectoryError):
                if place.is_symlink():
                    return True
                continue
            if not device or str(status.st_dev) == device or not stat.S_ISDIR(status.st_mode):
                return False
            with os.scandir(place) as listing:
                return next(listing, None) is None
    except OSError:
        return True
    return False
