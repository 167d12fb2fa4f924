"""Ingestion of images from a folder, a list or LlamaIndex documents; a run may be interrupted and repeated at will.

One image goes through the files in this order:

- `sources.py`, `folder.py`, `remote.py`: the items of a source and their ids; counts of the other files in a folder.
- `sidecar.py`, `sidecar_columns.py`, `sidecar_match.py`: metadata from a file beside the images.
- `reading.py`, `exif.py`: reading and decoding ahead of the model, in bounded memory.
- `vectors.py`: embedding, failures of the model, and reuse of stored vectors of the same file contents.
- `nodes.py`: the node that is stored, and whether it changed.
- `pipeline.py`: `ingest_images`, which embeds and stores new and changed images.
- `removal.py`: removal of rows, and of those whose files are provably gone.
- `reindexing.py`: the rows of a collection under another model.
- `report.py`: progress, stopping, and the report of a run.
"""

from mm_retriever.ingest.folder import IgnoredFiles
from mm_retriever.ingest.pipeline import ingest_images
from mm_retriever.ingest.reindexing import reindex
from mm_retriever.ingest.removal import PruneReport, prune_images, remove_images
from mm_retriever.ingest.report import IngestReport, ReindexReport, SkippedImage
from mm_retriever.ingest.sidecar import Sidecar, read_sidecar

__all__ = [
    "IgnoredFiles",
    "IngestReport",
    "PruneReport",
    "ReindexReport",
    "Sidecar",
    "SkippedImage",
    "ingest_images",
    "prune_images",
    "read_sidecar",
    "reindex",
    "remove_images",
]
