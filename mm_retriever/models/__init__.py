"""The two models, native and strict: plain torch and PIL, nothing of LlamaIndex or Milvus.

Import the file you need (``mm_retriever.models.visualized_bge``); this package itself loads nothing.
"""
