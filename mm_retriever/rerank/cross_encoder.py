"""Cross-encoders of sentence-transformers as a `Scorer`: for texts, or for texts and images; needs its extra.

Owns the library's inputs for a query and a candidate, and the meaning of its scores. A model that reads only texts
ranks images by their captions.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from llama_index.core.schema import MetadataMode
from PIL import Image

from mm_retriever.errors import CheckpointError, QueryError
from mm_retriever.rebuild import Name, field_arguments, portable_name
from mm_retriever.rerank.published import CROSS_ENCODER
from mm_retriever.rerank.reranker import NO_TIME, Reranker, ScorerRerank
from mm_retriever.rerank.scorer import Candidate, Meter, Query, Ranking
from mm_retriever.threads import ForkLock, check_forked

logger = logging.getLogger(__name__)

IMAGE_NOT_SEEN = "ranked by the words of the query alone: a text reranker cannot see its image"
CAPTION_SEEN = "ranked by its caption: a text reranker cannot see its image"
NO_CAPTION = "not judged: a text reranker cannot see its image, and it has no caption"
MODELS = CROSS_ENCODER
DEFAULT_MODEL = next(iter(MODELS))
PASS_ROWS = {"cpu": 4, "other": 16}
"""The most pairs with images in one pass of the model, by device; of pairs of texts four times as many."""


def recognises(name: str, config: Mapping[str, Any], base_url: str | None) -> bool:
    """Whether a model is a cross-encoder: one score for a pair."""
    kinds = config.get("architectures")
    classifies = isinstance(kinds, list) and any("SequenceClassification" in str(kind) for kind in kinds)
    saved_as_one = config.get("sentence_transformers_class") == "CrossEncoder"
    return base_url is None and (name in MODELS or classifies or saved_as_one)


def load(name: str, **options: Any) -> Reranker:
    """Return the reranker; options are those of `CrossEncoderRerank`."""
    return CrossEncoderRerank(name, **options)


class CrossEncoder:
    """Scores how well each candidate answers the query, from 0 to 1: the sigmoid of the model's logit.

    Args:
        name: hub id, or a local folder.
        revision: of the hub repository.
        device: "cpu", "cuda", ...; default: the fastest there is.
        dtype: of the computation; default: that of the stored weights, but float32 for float16 on a CPU.
        max_length: tokens after which a pair of texts is cut off; None: as many as the model takes.
        instruction: for a model that takes instructions; default: its own.
        trust_remote_code: run the Python files of the model's repository.

    Raises:
        MissingExtraError: sentence-transformers is not installed.
        ModelNotFoundError: the hub is out of reach, and the name is no folder.
        CheckpointError: the files are damaged, unsafe, of another kind of model, or need code that is not trusted.
    """

    calibrated = True

    def __init__(
        self,
        name: str,
        *,
        revision: str | None = None,
        device: str | None = None,
        dtype: str | None = None,
        max_length: int | None = None,
        instruction: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        from mm_retriever.checkpoint import locate
        from mm_retriever.devices import as_device, as_dtype, stored_dtype
        from mm_retriever.embedders.sentence_files import load_model, model_tensors

        self.name, self._instruction = name, instruction
        files = locate(name, {}, revision=revision)
        stored = next((tensor.dtype for tensor in model_tensors(files).values() if tensor.is_floating_point()), None)
        place = as_device(device)
        self._model: Any = load_model(
            "CrossEncoder",
            files,
            device=place,
            dtype=as_dtype(dtype, default=stored_dtype(stored, place)),
            trust_remote_code=trust_remote_code is True,
        )
        if self._model.num_labels != 1:
            raise CheckpointError(f"{name!r} gives {self._model.num_labels} numbers for a pair; a reranker gives one")
        if max_length is not None and not self.sees_images:
            self._model.max_seq_length = min(max_length, self._model.max_seq_length or max_length)
        self._is_probability = _ends_in_sigmoid(self._model)
        self._lock = ForkLock()
        self._loaded_in = os.getpid()

    @property
    def sees_images(self) -> bool:
        """Whether the model takes images."""
        return bool(self._model.supports("image"))

    def score(self, query: Query, candidates: Sequence[Candidate], meter: Meter) -> list[float | None]:
        """Return a score from 0 to 1 for each candidate; None where the model cannot see it, or the time was up.

        Raises:
            QueryError: the query has no words, and the model reads only texts.
        """
        check_forked(self._loaded_in, self._model.device.type)
        if not self.sees_images and not query.text:
            raise QueryError("a text reranker needs a question in words")
        query_input = self._input(query.text, query.image)
        scores: list[float | None] = [None] * len(candidates)
        shown = {
            row: self._input("", candidate.image)
            if candidate.image is not None and self.sees_images
            else self._input(_words(candidate))
            for row, candidate in enumerate(candidates)
        }
        for rows in self._passes([row for row, given in shown.items() if given], candidates):
            if meter.out_of_time():
                break
            with self._lock:
                values = self._model.predict(
                    [(query_input, shown[row]) for row in rows],
                    prompt=self._instruction,
                    batch_size=len(rows),
                    show_progress_bar=False,
                    activation_fn=_identity,
                )
            meter.passes += 1
            meter.images += sum(self.sees_images and candidates[row].image is not None for row in rows)
            for row, value in zip(rows, values, strict=True):
                scores[row] = float(value) if self._is_probability else _sigmoid(float(value))
        return scores

    def _input(self, text: str, image: Image.Image | None = None) -> Any:
        """The library's input: the image before the text, in a form in which a text is never read as a path or URL.

        None if there is nothing that this model can see.
        """
        from mm_retriever.embedders.sentence_encoder import bounded
        from mm_retriever.embedders.sentence_files import plain_text
        from mm_retriever.tokenizer import valid_unicode

        words, chat = valid_unicode(text), "message" in self._model.modalities
        if chat:
            words = plain_text(words, self._model.tokenizer)
        if not self.sees_images and not (chat and self._model[0].input_formatter.message_format == "structured"):
            return words or None
        given: dict[str, Any] = {"image": bounded(image)} if image is not None and self.sees_images else {}
        return given | ({"text": words} if words else {}) or None

    def _passes(self, rows: Sequence[int], candidates: Sequence[Candidate]) -> Iterator[list[int]]:
        most = PASS_ROWS["cpu" if self._model.device.type == "cpu" else "other"]
        for images in (True, False):
            kind = [row for row in rows if (candidates[row].image is not None and self.sees_images) == images]
            step = most if images else 4 * most
            for start in range(0, len(kind), step):
                yield kind[start : start + step]


class CrossEncoderRerank(ScorerRerank):
    """Ranks by a cross-encoder; scores go from 0 to 1 and mean the same in every list.

    A model that reads only texts ranks images by their captions and ignores the query's image; the notes say so. Images
    without a caption are not judged and come last, with a note.

    Args:
        model_name: hub id, or a local folder.
        options: the fields below, and those of `Reranker`.
    """

    revision: str | None = None
    """Of the hub repository."""
    device: Name = None
    """"cpu", "cuda", ...; default: the fastest there is."""
    dtype: Name = None
    """Default: that of the stored weights, but float32 for float16 on a CPU."""
    max_length: int = 512
    """Tokens after which question and text together are cut off, in models that read only texts."""
    instruction: str | None = None
    """For a model that takes instructions; default: its own."""
    trust_remote_code: bool = False
    """Run the Python files of the model's repository."""

    def __init__(self, model_name: str | os.PathLike[str] = DEFAULT_MODEL, **options: Any) -> None:
        name = os.fspath(model_name)
        chosen = {option: options.get(option) for option in ("revision", "device", "dtype", "instruction")}
        scorer = CrossEncoder(
            name,
            max_length=options.get("max_length") or 512,
            trust_remote_code=options.get("trust_remote_code") is True,
            **chosen,
        )
        super().__init__(scorer, **options)

    def _made_of(self) -> dict[str, Any]:
        return field_arguments(self) | {"model_name": portable_name(self.model_name)}

    def _rank(self, query: Query, candidates: list[Candidate], meter: Meter) -> Ranking:
        ranking = super()._rank(query, candidates, meter)
        scorer = self._scorer
        if not isinstance(scorer, CrossEncoder) or scorer.sees_images:
            return ranking
        notes = dict(ranking.notes)
        for row, candidate in enumerate(candidates):
            facts = [IMAGE_NOT_SEEN] if query.image is not None and row in ranking.model_scores else []
            if candidate.image is not None and row in ranking.model_scores:
                facts.append(CAPTION_SEEN)
            if candidate.image is not None and not _words(candidate) and notes.get(row) != NO_TIME:
                facts.append(NO_CAPTION)
            notes |= {row: "; ".join(facts)} if facts else {}
        if query.image is not None:
            logger.warning("%s: %s", self.model_name, IMAGE_NOT_SEEN)
        return replace(ranking, notes=notes)


TextRerank = CrossEncoderRerank  # its earlier name


def _words(candidate: Candidate) -> str:
    """The whole text of a candidate; for an image, its caption."""
    return str(candidate.node.node.get_content(MetadataMode.NONE)).strip()


def _identity(scores: Any) -> Any:
    return scores


def _sigmoid(logit: float) -> float:
    """The sigmoid in double precision, so that scores near 1 still differ."""
    return 1 / (1 + math.exp(-logit)) if logit >= 0 else math.exp(logit) / (1 + math.exp(logit))


def _ends_in_sigmoid(model: Any) -> bool:
    """Whether the model's last module returns probabilities already."""
    activation = getattr(list(model)[-1], "activation_function", None)
    return type(activation).__name__ == "Sigmoid"
