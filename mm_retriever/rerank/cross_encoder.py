"""Cross-encoders for texts, by FlagEmbedding, as a `Scorer`; `TextRerank` ranks by one.

Owns how FlagEmbedding's reranker is loaded and asked; needs the extra ``[hybrid]``. Knows nothing of images.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from mm_retriever.errors import MissingExtraError, QueryError, RerankError
from mm_retriever.forks import ForkLock
from mm_retriever.rebuild import field_arguments, portable_name
from mm_retriever.rerank.published import CROSS_ENCODER
from mm_retriever.rerank.reranker import Reranker, ScorerRerank
from mm_retriever.rerank.scorer import Candidate, Meter, Query, Ranking

logger = logging.getLogger(__name__)

IMAGE_NOT_SEEN = "ranked by the words of the query alone: a text reranker cannot see its image"
MODELS = CROSS_ENCODER
DEFAULT_MODEL = next(iter(MODELS))
_FILES = ("*.json", "*.safetensors", "pytorch_model*.bin", "sentencepiece*")


def recognises(name: str, config: Mapping[str, Any], base_url: str | None) -> bool:
    """Whether a model is a cross-encoder: one score for a pair of texts."""
    kinds = config.get("architectures")
    classifies = isinstance(kinds, list) and any("SequenceClassification" in str(kind) for kind in kinds)
    return base_url is None and (name in MODELS or classifies)


def load(name: str, **options: Any) -> Reranker:
    """Return the reranker; options are those of `TextRerank`."""
    return TextRerank(name, **options)


class CrossEncoder:
    """Logits of a cross-encoder for question and text. They order a list and are not calibrated.

    Raises:
        MissingExtraError: FlagEmbedding is not installed.
        ModelNotFoundError: the hub is out of reach, and the name is no folder.
    """

    calibrated = False

    def __init__(self, name: str, *, revision: str | None, device: str | None, max_length: int) -> None:
        try:
            from FlagEmbedding import FlagReranker
        except ImportError as error:
            raise MissingExtraError('FlagEmbedding is not installed: pip install "mm-retriever[hybrid]"') from error
        from mm_retriever.devices import default_device
        from mm_retriever.embedders.bge_m3 import flag_model_folder

        self.name = name
        folder = flag_model_folder(name, revision, _FILES)
        self._model: Any = FlagReranker(
            str(folder), use_fp16=False, devices=device or default_device(), max_length=max_length
        )
        self._lock = ForkLock()

    def score(self, query: Query, candidates: Sequence[Candidate], meter: Meter) -> list[float | None]:
        """The logit of each text.

        Raises:
            QueryError: the query has no words.
            RerankError: a candidate is an image.
        """
        if not query.text:
            raise QueryError("a text reranker needs a question in words")
        images = sum(candidate.image is not None for candidate in candidates)
        if images:
            raise RerankError(
                f"{images} of {len(candidates)} candidates are images, which a text reranker cannot see: use "
                'Phi3VisionRerank or VisionLLMRerank, or on_error="keep_order"'
            )
        pairs = [(query.text, candidate.node.node.get_content()) for candidate in candidates]
        with self._lock:
            values = self._model.compute_score(pairs, batch_size=len(pairs) + 1)  # or it draws a progress bar
        meter.passes += 1
        return [float(value) for value in (values if isinstance(values, list) else [values])]


class TextRerank(ScorerRerank):
    """Ranks texts by how well they answer a question; images it cannot see, the query's or a candidate's, and says so.

    Args:
        model_name: hub id, or a local folder.
        options: the fields below, and those of `Reranker`.
    """

    revision: str | None = None
    """Of the hub repository."""
    device: str | None = None
    """"cpu", "cuda", ...; default: the fastest there is."""
    max_length: int = 512
    """Tokens of question and text together that count."""

    def __init__(self, model_name: str | os.PathLike[str] = DEFAULT_MODEL, **options: Any) -> None:
        name = os.fspath(model_name)
        chosen = {option: options.get(option) for option in ("revision", "device")}
        scorer = CrossEncoder(name, max_length=options.get("max_length") or 512, **chosen)
        super().__init__(scorer, **options)

    def _made_of(self) -> dict[str, Any]:
        return field_arguments(self) | {"model_name": portable_name(self.model_name)}

    def _rank(self, query: Query, candidates: list[Candidate], meter: Meter) -> Ranking:
        ranking = super()._rank(query, candidates, meter)
        if query.image is None:
            return ranking
        logger.warning("%s: %s", self.model_name, IMAGE_NOT_SEEN)
        return replace(ranking, notes=dict.fromkeys(range(len(candidates)), IMAGE_NOT_SEEN))
