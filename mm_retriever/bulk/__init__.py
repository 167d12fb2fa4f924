"""Files of vectors that a Milvus server imports by itself: for collections of millions.

- `plan.py`: which image is in which file, fixed once.
- `shards.py`: `embed_to_shards`, which makes the files, and `import_shards`, which has them imported.
- `ray_data.py`: `embed_to_shards_on_ray`, which has them made by the workers of a Ray cluster.
"""

from mm_retriever.bulk.ray_data import embed_to_shards_on_ray
from mm_retriever.bulk.shards import ShardReport, embed_to_shards, import_shards
from mm_retriever.store import ImportReport

__all__ = ["ImportReport", "ShardReport", "embed_to_shards", "embed_to_shards_on_ray", "import_shards"]
