"""Images from a folder, a list or LlamaIndex documents into the store; a run may be broken off and repeated at will.

One image goes through the files in this order:

- `sources.py`, `folder.py`, `remote.py`: what there is, and the id that it keeps; what else a folder holds, by type.
- `sidecar.py`, `sidecar_columns.py`, `sidecar_match.py`: metadata from a file beside the images.
- `reading.py`, `exif.py`: read and decoded ahead of the model, in flat memory.
- `vectors.py`: embedded; what happens when the model fails; vectors that the store has of the same file contents.
- `nodes.py`: the node that is stored, and what tells that it changed.
- `pipeline.py`: `ingest_images`, which embeds and stores what is new or changed.
- `removal.py`: which files are provably gone, and rows out of the store.
- `reindexing.py`: the rows of a collection under another model.
- `report.py`: how far it is, whether it goes on, and what was done.
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
