"""How good retrieval is: `mteb`, by the tasks of the Massive Text Embedding Benchmark."""
