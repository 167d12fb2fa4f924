"""How good retrieval is: `metrics` of any ranking; `mteb`, by the tasks of the Massive Text Embedding Benchmark."""
