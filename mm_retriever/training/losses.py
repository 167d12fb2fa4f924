"""What training makes smaller: a right image beside wrong ones, and the difference to a reranker's judgement.

Source: `CachedMultipleNegativesRankingLoss` of sentence-transformers (GradCache, arXiv:2101.06983) at a temperature of
0.02. An image that is right for a query is no wrong one, wherever else in the batch it stands.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss
from sentence_transformers.util import all_gather, all_gather_with_grad, get_rank, get_world_size
from torch import Tensor

from mm_retriever.evaluation.datasets import LabelledQuery
from mm_retriever.training.negatives import Row
from mm_retriever.training.recipe import TEMPERATURE


class RetrievalLoss(CachedMultipleNegativesRankingLoss):
    """Cross-entropy of the right image over all images of the batch; with shares of a teacher, its own candidates too.

    Args:
        model: around an embedder whose vectors have length 1.
        rows: what is trained on; labels are their numbers.
        queries: that the rows are of.
        pass_size: contents that go through the model together.
    """

    def __init__(
        self, model: SentenceTransformer, rows: Sequence[Row], queries: Sequence[LabelledQuery], *, pass_size: int
    ) -> None:
        super().__init__(model, scale=1 / TEMPERATURE, mini_batch_size=pass_size, gather_across_devices=True)
        numbers: dict[Path, int] = {}
        table = [[numbers.setdefault(image, len(numbers)) for image in row.images] for row in rows]
        self.images = torch.tensor(table)  # (N, 1 + n)
        self.shares = torch.tensor([row.shares for row in rows]) if rows[0].shares else None  # (N, 1 + n)
        self.right = [[numbers[one] for one in queries[row.query].targets if one in numbers] for row in rows]

    def forward(self, sentence_features: Iterable[dict[str, Any]], labels: Tensor) -> Tensor:
        """The mean over the batch."""
        loss: Tensor = self.forward_cached(list(sentence_features), labels)
        return loss

    def calculate_loss(
        self, reps: list[list[Tensor]], labels: Tensor | None = None, *, with_backward: bool = False
    ) -> Tensor:
        """The mean over this process's queries, from the vectors of a batch: first those of queries, then of images."""
        assert labels is not None
        queries, own = torch.cat(reps[0]), [torch.cat(column) for column in reps[1:]]
        loss = self._contrast(queries, own, labels) if self.shares is None else self._distance(queries, own, labels)
        if with_backward:
            loss.backward()
            loss = loss.detach()
        return loss

    def _contrast(self, queries: Tensor, own: Sequence[Tensor], labels: Tensor) -> Tensor:
        is_alone = get_world_size() == 1
        every = labels if is_alone else all_gather(labels)
        candidates = torch.cat([column if is_alone else all_gather_with_grad(column) for column in own])
        images = self.images[every.cpu()].T.flatten()  # of each candidate, in their order
        places = torch.arange(len(labels)) + get_rank() * len(labels)
        masked = torch.stack([torch.isin(images, torch.tensor(self.right[row])) for row in labels.tolist()])
        masked[torch.arange(len(labels)), places] = False
        logits = (queries @ candidates.T * self.scale).masked_fill(masked.to(queries.device), -torch.inf)
        return F.cross_entropy(logits, places.to(queries.device))

    def _distance(self, queries: Tensor, own: Sequence[Tensor], labels: Tensor) -> Tensor:
        """Kullback-Leibler divergence of the model's shares of a query's candidates from the teacher's."""
        assert self.shares is not None
        logits = torch.stack([(queries * column).sum(-1) for column in own], dim=1) * self.scale  # (B, 1 + n)
        shares = self.shares[labels.cpu()].to(logits)
        return F.kl_div(logits.log_softmax(-1), shares, reduction="batchmean")
