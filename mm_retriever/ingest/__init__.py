"""Pictures from a folder, a list or LlamaIndex documents into the store; a run may be broken off and repeated at will.

One picture goes through its files in this order:

- `sources.py`, `stable_url.py`: which things there are, and the id that each keeps.
- `ignored.py`: what else a folder holds, counted by type.
- `sidecar.py`: the columns that lie beside them in a JSON or CSV file.
- `reading.py`: read and decoded ahead of the model, in flat memory.
- `vectors.py`: what the model makes of it, and what happens when it fails.
- `nodes.py`: the node that is stored of it.
- `pipeline.py`: `ingest_images`, which embeds and stores what is new or changed.
- `known.py`: vectors that the store has already of the same file contents.
- `gone.py`, `removal.py`: which files are provably gone, and rows out of the store.
- `report.py`: what was done.
"""

from mm_retriever.ingest.ignored import IgnoredFiles
from mm_retriever.ingest.pipeline import ingest_images
from mm_retriever.ingest.removal import PruneReport, prune_images, remove_images
from mm_retriever.ingest.report import IngestReport, SkippedImage
from mm_retriever.ingest.sidecar import Sidecar, read_sidecar

__all__ = [
    "IgnoredFiles",
    "IngestReport",
    "PruneReport",
    "Sidecar",
    "SkippedImage",
    "ingest_images",
    "prune_images",
    "read_sidecar",
    "remove_images",
]
