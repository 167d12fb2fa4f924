"""`TextRerank`: candidates that are all texts, ranked by a cross-encoder of FlagEmbedding.

Owns how FlagEmbedding's reranker is loaded and asked; needs the extra ``[hybrid]``. Knows nothing of pictures.
"""

from __future__ import annotations

import logging
import math
import os
import threading
from dataclasses import replace
from typing import Any, Literal

from pydantic import PrivateAttr

from mm_retriever.devices import default_device
from mm_retriever.embedders.bge_m3 import flag_model_folder
from mm_retriever.errors import MissingExtraError, QueryError, RerankError
from mm_retriever.rebuild import field_arguments, portable_name
from mm_retriever.rerank.candidates import Candidate, Ranking
from mm_retriever.rerank.order import Fusion
from mm_retriever.rerank.reranker import Meter, Query, Reranker

logger = logging.getLogger(__name__)

IMAGE_NOT_SEEN = "ranked by the words of the query alone: a text reranker cannot see its image"
DEFAULT_MODEL = "BAAI/bge-reranker-v2-m3"
_FILES = ("*.json", "*.safetensors", "pytorch_model*.bin", "sentencepiece*")


class TextRerank(Reranker):
    """Ranks texts by how well they answer a question; images it cannot see, the query's or a candidate's, and says so.

    Scores and metadata of the nodes that come back are those of every reranker of this package.

    Args:
        model_name: hub id, or a local folder.
        top_n: how many are kept.
        revision: of the hub repository.
        device: "cpu", "cuda", ...; default: the fastest there is.
        max_length: tokens of question and text together that count.
        fusion_weight: final value = model's + weight * retrieval score, normalised as `fusion` says; None: the model's
            alone.
        fusion: "zscore", "minmax" or "sum".
        on_error: "keep_order" keeps the order of retrieval where ranking fails, also where a candidate is a picture.

    Raises:
        MissingExtraError: FlagEmbedding is not installed.
        ModelNotFoundError: the hub is out of reach, and the name is no folder.
    """

    max_length: int = 512

    _model: Any = PrivateAttr()
    _turn: Any = PrivateAttr(default_factory=threading.Lock)
    _loading: dict[str, Any] = PrivateAttr(default_factory=dict)

    def __init__(
        self,
        model_name: str | os.PathLike[str] = DEFAULT_MODEL,
        *,
        top_n: int = 9,
        revision: str | None = None,
        device: str | None = None,
        max_length: int = 512,
        fusion_weight: float | None = None,
        fusion: Fusion = "zscore",
        on_error: Literal["raise", "keep_order"] = "raise",
    ) -> None:
        try:
            from FlagEmbedding import FlagReranker
        except ImportError as error:
            raise MissingExtraError('FlagEmbedding is not installed: pip install "mm-retriever[hybrid]"') from error
        given: dict[str, Any] = {
            "model_name": os.fspath(model_name),
            "top_n": top_n,
            "max_length": max_length,
            "fusion_weight": fusion_weight,
            "fusion": fusion,
            "on_error": on_error,
        }
        super().__init__(**given)
        self._loading = {"revision": revision, "device": device}
        folder = flag_model_folder(model_name, revision, _FILES)
        self._model = FlagReranker(
            str(folder), use_fp16=False, devices=device or default_device(), max_length=max_length
        )

    @classmethod
    def class_name(cls) -> str:
        """Return the name under which LlamaIndex serialises the class."""
        return "TextRerank"

    def _made_of(self) -> dict[str, Any]:
        return field_arguments(self) | self._loading | {"model_name": portable_name(self.model_name)}

    def _rank(self, query: Query, candidates: list[Candidate], meter: Meter) -> Ranking:
        if not query.text:
            raise QueryError("a text reranker needs a question in words")
        pictures = sum(candidate.image is not None for candidate in candidates)
        if pictures:
            raise RerankError(
                f"{pictures} of {len(candidates)} candidates are pictures, which a text reranker cannot see: use "
                'Phi3VisionRerank or VisionLLMRerank, or on_error="keep_order"'
            )
        pairs = [(query.text, candidate.node.node.get_content()) for candidate in candidates]
        with self._turn:
            values = self._model.compute_score(pairs, batch_size=len(pairs) + 1)  # or it draws a progress bar
        meter.passes += 1
        scores = [float(value) for value in (values if isinstance(values, list) else [values])]
        if not all(map(math.isfinite, scores)):
            raise RerankError(f"{self.model_name!r} gave NaN or infinity")
        ranking = self._settle(candidates, scores)
        if query.image is None:
            return ranking
        logger.warning("%s: %s", self.model_name, IMAGE_NOT_SEEN)
        return replace(ranking, notes=dict.fromkeys(range(len(candidates)), IMAGE_NOT_SEEN))
