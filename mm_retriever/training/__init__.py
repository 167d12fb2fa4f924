"""Fine-tuning of any torch embedder on a user's own queries, and distillation of a reranker into it.

- `examples.py`: queries and images, checked, the split whose images are not trained on, and their vectors.
- `negatives.py`: what a query is trained on beside its right image; what a reranker says of its candidates.
- `trainer.py`: sentence-transformers' trainer around our embedders, and its loss.
- `card.py`: how it is trained, and the model card.
- `run.py`: `train`, which takes these steps.
"""

from mm_retriever.training.card import Recipe, Training
from mm_retriever.training.run import train

__all__ = ["Recipe", "Training", "train"]
