"""Fine-tuning of any torch embedder on a user's own queries, and distillation of a reranker into it.

- `recipe.py`: how it is trained.
- `examples.py`: queries and images, checked, and the split whose images are not trained on.
- `negatives.py`: what a query is trained on beside its right image; what a reranker says of its candidates.
- `losses.py`, `trainer.py`: sentence-transformers' trainer around our embedders.
- `card.py`: the model card.
- `run.py`: `train`, which takes these steps.
"""

from mm_retriever.training.card import Training
from mm_retriever.training.recipe import Recipe
from mm_retriever.training.run import train

__all__ = ["Recipe", "Training", "train"]
