"""Pictures and their vectors in Milvus: a local file, a server or Zilliz Cloud.

Owns every request that this package sends to Milvus. Knows nothing of models beyond a name and a dimension, and nothing
of picture files. Its files:

- `rows.py`: a LlamaIndex node to a row, and back; what may be stored. `values.py`: values of metadata as JSON.
- `pixels.py`: image nodes that come with vectors of their words.
- `filters.py`: metadata filters to expressions that a value cannot break out of.
- `identity.py`: whose vectors a collection holds, and which other models' may be compared with them.
- `conditions.py`: conditions as people and language models write them, to metadata filters.
- `columns.py`: which metadata columns there are, and what filters say that they do not bear out.
- `words.py`: what hybrid search indexes beside the vectors.
- `segments.py`: text cut so that words of any script are found.
- `channel.py`: requests to a server that end by their deadline, and are sent again until then.
- `lite_files.py`: where Milvus Lite files are.
- `lite_durability.py`: what keeps them through a power cut, and shows bit rot.
- `lite_repair.py`: what a killed process, a power cut or bit rot left there, put right before Milvus Lite sees it.
- `lite_wire.py`, `lite_server.py`, `lite_channel.py`: how the processes of one user share a Milvus Lite file.
- `connection.py`: where Milvus is, and what its failures mean.
- `collection.py`: a collection's schema and index; its rows written, read and searched.
- `image_store.py`: `open_store` and `ImageStore`, LlamaIndex's side of a collection.
- `parquet.py`, `bulk_import.py`: rows in files that a server imports by itself, each exactly once.
- `checksums.py`, `verification.py`: whether a store still holds what was stored.
- `description.py`: what a store holds, for people.
"""

from mm_retriever.store.bulk_import import ImportReport
from mm_retriever.store.connection import check_exists
from mm_retriever.store.description import describe_store
from mm_retriever.store.filters import filter_expression
from mm_retriever.store.identity import StoredIdentity, same_model
from mm_retriever.store.image_store import MAX_TOP_K, ImageStore, open_store, open_stored
from mm_retriever.store.rows import bytes_as_text, has_control_characters, metadata_columns, storable_node
from mm_retriever.store.verification import Verification, verify_store
from mm_retriever.store.words import SparseEmbedding

__all__ = [
    "MAX_TOP_K",
    "ImageStore",
    "ImportReport",
    "SparseEmbedding",
    "StoredIdentity",
    "Verification",
    "bytes_as_text",
    "check_exists",
    "describe_store",
    "filter_expression",
    "has_control_characters",
    "metadata_columns",
    "open_store",
    "open_stored",
    "same_model",
    "storable_node",
    "verify_store",
]
