"""How good retrieval is: on one's own images, on published data sets, and by the tasks of mteb.

- `metrics.py`: measures of any ranking, with intervals and paired differences.
- `datasets/`: queries and right answers from local folders.
- `runs.py`: what models retrieve and rerankers make of it, and what it costs: seconds, tokens, memory.
- `comparison.py`: runs side by side, and the fusion weight.  `results.py`: all that an evaluation says, and
  files for the servers of CIRR and CIRCO.  `tables.py`: for the terminal, and as an HTML page.
- `made.py`: an evaluation set drafted by a vision LLM.  `health.py`: what can be said without labels.
- `mteb.py`: embedders, rerankers and the pipeline as models of the Massive Text Embedding Benchmark.
"""
