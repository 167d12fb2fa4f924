"""Data sets for evaluation and training, from local folders; nothing is downloaded.

- `queries.py`: a user's own `queries.jsonl`, the web page's ratings, MegaPairs' triplets.
- `jsonfiles.py`: annotation files, checked key by key.
"""

from mm_retriever.evaluation.datasets.queries import LabelledQuery, read_queries

__all__ = ["LabelledQuery", "read_queries"]
