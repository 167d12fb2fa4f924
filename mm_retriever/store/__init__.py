"""Images and their vectors in Milvus: a local file, a server or Zilliz Cloud.

Owns every request that this package sends to Milvus. Of models it knows a name and a dimension, of image files nothing.
Its files, from LlamaIndex down to Milvus:

- `image_store.py`: `open_store` and `ImageStore`, LlamaIndex's side of a collection. `pixels.py`: image nodes that come
  with vectors of their text. `queries.py`: query modes and their answers.
- `conditions.py`: conditions as people and language models write them. `columns.py`: conditions that no row can meet.
- `bulk_import.py`, `parquet.py`: files of rows that a server imports by itself, each row exactly once.
- `inspection.py`: what a store holds, whether it is damaged, and the recall of its index.
- `collection.py`, `schema.py`: one collection, its columns and index, and the model whose vectors it holds.
  `words.py`: its full-text index.
- `succession.py`: copying a collection's rows under another model. `switching.py`: giving the copy its name.
- `connection.py`: where Milvus is, and what its failures mean. `channel.py`: requests that end by their deadline.
- `lite_channel.py`, `lite_server.py`, `lite_wire.py`: sharing a Milvus Lite file between processes of one user.
- `lite_search.py`: searches of such a file that reuse what the last one computed.
- `lite_repair.py`, `lite_logs.py`, `lite_durability.py`: protection of such a file from power cuts and bit rot.
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
from mm_retriever.store.schema import model_facts, same_model
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
    "model_facts",
    "open_store",
    "open_stored",
    "recall_store",
    "same_model",
    "storable_node",
    "store_columns",
    "verify_store",
]
