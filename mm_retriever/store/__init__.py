"""Images and their vectors in Milvus: a local file, a server or Zilliz Cloud.

Owns every request that this package sends to Milvus. Knows nothing of models beyond a name and a dimension, and nothing
of image files. Its files, from LlamaIndex down to Milvus:

- `image_store.py`: `open_store` and `ImageStore`, LlamaIndex's side of a collection. `pixels.py`: image nodes that come
  with vectors of their text. `queries.py`: the queries it takes.
- `conditions.py`: conditions as people and language models write them. `columns.py`: conditions that no row can meet.
- `bulk_import.py`, `parquet.py`: rows in files that a server imports by itself, each exactly once.
- `inspection.py`: what a store holds, whether that is what was stored, and how much its index finds.
- `collection.py`, `schema.py`: one collection, its columns and index, and the model whose vectors it holds.
  `words.py`: its full-text index.
- `succession.py`: a collection's rows beside it under another model. `switching.py`: how they take its name.
- `connection.py`: where Milvus is, and what its failures mean. `channel.py`: requests that end by their deadline.
- `lite_channel.py`, `lite_server.py`, `lite_wire.py`: how the processes of one user share a Milvus Lite file.
- `lite_search.py`: what such a file keeps between searches.
- `lite_repair.py`, `lite_logs.py`, `lite_durability.py`: what protects such a file from power cuts and bit rot.
- `rows.py`, `values.py`: a LlamaIndex node as a row.
- `filters.py`: metadata filters as expressions that a value cannot break out of.
"""

from mm_retriever.store.bulk_import import ImportReport
from mm_retriever.store.connection import check_exists
from mm_retriever.store.filters import filter_expression
from mm_retriever.store.image_store import ImageStore, open_store, open_stored
from mm_retriever.store.inspection import Verification, describe_store, recall_store, store_columns, verify_store
from mm_retriever.store.queries import MAX_TOP_K
from mm_retriever.store.rows import bytes_as_text, has_control_characters, metadata_columns, storable_node
from mm_retriever.store.schema import same_model
from mm_retriever.store.words import SparseEmbedding

__all__ = [
    "MAX_TOP_K",
    "ImageStore",
    "ImportReport",
    "SparseEmbedding",
    "Verification",
    "bytes_as_text",
    "check_exists",
    "describe_store",
    "filter_expression",
    "has_control_characters",
    "metadata_columns",
    "open_store",
    "open_stored",
    "recall_store",
    "same_model",
    "storable_node",
    "store_columns",
    "verify_store",
]
