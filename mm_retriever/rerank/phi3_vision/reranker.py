"""`Phi3VisionRerank`: candidates ranked by Phi-3 Vision on this machine.

Owns the options, the loaded model and the memory of captions; `RerankSession` has the dialogue.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar, TypeAlias

from cachetools import LRUCache
from llama_index.core.prompts.mixin import PromptDictType
from pydantic import PrivateAttr

from mm_retriever.images import pixel_digest
from mm_retriever.phi3_vision import prompts
from mm_retriever.phi3_vision.config import DEFAULT_MODEL
from mm_retriever.phi3_vision.llm import Phi3VisionLLM
from mm_retriever.phi3_vision.model import Phi3Vision
from mm_retriever.phi3_vision.processor import Phi3VisionProcessor
from mm_retriever.rebuild import field_arguments, loaded_model_error, portable_name
from mm_retriever.rerank.phi3_vision.dialogue import SharedModel
from mm_retriever.rerank.phi3_vision.session import Options, RerankSession
from mm_retriever.rerank.scorer import Candidate, Meter, Query, Ranking
from mm_retriever.threads import ForkLock

CAPTIONS_KEPT = 256


Model: TypeAlias = str | os.PathLike[str] | Phi3VisionLLM | tuple[Phi3Vision, Phi3VisionProcessor]


class Phi3VisionRerank(Options):
    """Ranks candidates with Phi-3 Vision, each exactly once, and says why the first one fits.

    The model first says what the query image shows and what is wanted. Then, by `mode`:

    - "likelihood": each candidate scores log P(wanted description | candidate). Works with small models.
    - "sheet": the model sees a numbered sheet of the candidates, as published. The cheapest.
    - "pointwise": the model sees each candidate, which scores the odds that it fits.

    A node's new score is the softmax over all candidates of the model's value, fused with the retrieval score if
    `fusion_weight` is given; it is 0 for candidates that could not be judged. The metadata of the new nodes (see
    `mm_retriever.rerank`) have the model's value, ranks, retrieval score, caption, reason and notes.

    Args:
        model: a hub id, a local folder, "tiny" (the small model in this package), a `Phi3VisionLLM` to share its model,
            or a loaded model and its processor.
        options: the fields of `Options`, and those of `Reranker`.
    """

    default_prompts: ClassVar[Mapping[str, str]] = {
        name.lower(): text for name, text in vars(prompts).items() if name.isupper()
    }

    _source: str | os.PathLike[str] | Phi3VisionLLM | None = PrivateAttr(default=None)
    _llm: Phi3VisionLLM = PrivateAttr()
    _shared: SharedModel = PrivateAttr()
    _captions: LRUCache[str, tuple[int, ...]] = PrivateAttr(default_factory=lambda: LRUCache(CAPTIONS_KEPT))
    _lock: ForkLock = PrivateAttr(default_factory=ForkLock)

    def __init__(self, model: Model = DEFAULT_MODEL, **options: Any) -> None:
        super().__init__(**options | {"model_name": _name(model)})
        loading: dict[str, Any] = {"image_policy": self.image_policy}
        if isinstance(model, Phi3VisionLLM):
            self._llm = model
        elif isinstance(model, tuple):
            self._llm = Phi3VisionLLM(self.model_name, model=model[0], processor=model[1], **loading)
        else:
            loading |= {"revision": self.revision, "device": self.device, "dtype": self.dtype}
            self._llm = Phi3VisionLLM(self.model_name, **loading)
        self._source = None if isinstance(model, tuple) else model
        self._shared = SharedModel(self._llm.model, self._llm.processor, self._llm.lock, self.image_memory)

    @property
    def llm(self) -> Phi3VisionLLM:
        """The model as an LLM that answers questions about images."""
        return self._llm

    @property
    def model(self) -> Phi3Vision:
        """The loaded model, for sharing."""
        return self._llm.model

    @property
    def processor(self) -> Phi3VisionProcessor:
        """The processor of the model."""
        return self._llm.processor

    def _made_of(self) -> dict[str, Any]:
        if self._source is None:
            raise loaded_model_error("Phi3VisionRerank")
        shared = isinstance(self._source, Phi3VisionLLM)
        return field_arguments(self) | {"model": self._source if shared else portable_name(self.model_name)}

    def _described(self) -> dict[str, Any]:
        made_of = self._made_of()
        if isinstance(self._source, Phi3VisionLLM):
            shared = self._source._made_of()
            made_of |= {"model": shared["model_name"]}
            made_of |= {name: shared[name] for name in ("revision", "device", "dtype")}
        return made_of

    def _unshare(self) -> None:
        super()._unshare()
        self._lock, self._captions = ForkLock(), LRUCache(CAPTIONS_KEPT)

    def _rank(self, query: Query, candidates: list[Candidate], meter: Meter) -> Ranking:
        session = RerankSession(self._shared, self, self._say, meter, query, candidates)
        self._understand(session, meter)
        ranking = self._settle(candidates, session.judge())
        explained = {"first": 1, "all": self.top_n, "none": 0}[self.reasons]
        reasons = session.reasons(ranking.order[:explained])
        return replace(ranking, caption=session.caption, wanted=session.wanted, reasons=reasons)

    def _understand(self, session: RerankSession, meter: Meter) -> None:
        """Let the session read the query, with a kept caption of its image if there is one."""
        image = session.query.image
        if image is None or not self.caption:
            session.understand()
            return
        digest = pixel_digest(image)
        with self._lock:
            known = self._captions.get(digest)
        caption = session.understand(known)
        if known is None and not meter.out_of_time():
            with self._lock:
                self._captions[digest] = tuple(caption)

    def _update_prompts(self, prompts: PromptDictType) -> None:
        super()._update_prompts(prompts)
        with self._lock:
            self._captions.clear()


def _name(model: Model) -> str:
    if isinstance(model, Phi3VisionLLM):
        return model.model_name
    if isinstance(model, tuple):
        return str(model[0].config.name_or_path or type(model[0]).__name__)
    return os.fspath(model)
