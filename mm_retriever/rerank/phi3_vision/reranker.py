"""`Phi3VisionRerank`: candidates ranked by Phi-3 Vision on this machine.

Owns the options, the loaded model and the memory of captions; `RerankSession` has the conversation.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from dataclasses import replace
from typing import Any, Literal

import torch
from llama_index.core.callbacks import CallbackManager
from llama_index.core.prompts.mixin import PromptDictType
from pydantic import Field, PrivateAttr

from mm_retriever.images import ImagePolicy, pixel_digest
from mm_retriever.phi3_vision import prompts
from mm_retriever.phi3_vision.config import DEFAULT_MODEL
from mm_retriever.phi3_vision.llm import Phi3VisionLLM
from mm_retriever.phi3_vision.load import load_phi3_vision
from mm_retriever.phi3_vision.model import Phi3Vision
from mm_retriever.phi3_vision.processor import Phi3VisionProcessor
from mm_retriever.rebuild import field_arguments, loaded_model_error, portable_name
from mm_retriever.rerank.candidates import Candidate, Ranking
from mm_retriever.rerank.order import Fusion
from mm_retriever.rerank.phi3_vision.conversation import SharedModel
from mm_retriever.rerank.phi3_vision.session import Options, RerankSession
from mm_retriever.rerank.reranker import Meter, Query, Reranker

CAPTIONS_KEPT = 256
PICTURE_MEMORY = 256 * 2**20  # bytes

PROMPTS = {
    "ask_composed": prompts.ASK_COMPOSED,
    "ask_picture": prompts.ASK_PICTURE,
    "ask_text": prompts.ASK_TEXT,
    "answer_picture": prompts.ANSWER_PICTURE,
    "answer_wanted": prompts.ANSWER_WANTED,
    "describe": prompts.DESCRIBE,
    "describe_text": prompts.DESCRIBE_TEXT,
    "ask_fits": prompts.ASK_FITS,
    "ask_reason": prompts.ASK_REASON,
    "rank_sheet": prompts.RANK_SHEET,
    "rank_pictures": prompts.RANK_PICTURES,
    "answer_ranking": prompts.ANSWER_RANKING,
}


class Phi3VisionRerank(Reranker):
    """Ranks candidates with Phi-3 Vision, every one exactly once, and says why the first one fits.

    The model first says what the query picture shows and what is wanted. Then, by `mode`:

    - "likelihood": each candidate scores log P(wanted description | candidate). Works with small models.
    - "sheet": one look at a numbered sheet of the candidates, as published. The cheapest.
    - "pictures": one look at the candidates as separate pictures.
    - "pointwise": one look at each candidate, and the odds that it fits.

    A node's new score is the softmax over all candidates of the model's value (fused with the retrieval score, if
    `fusion_weight` is given): from 0 to 1, together 1; 0 for those that could not be judged. Metadata of the nodes
    that come back (see `mm_retriever.rerank`) has the model's value, ranks, retrieval score, caption, reason and notes.

    Args:
        model: Hub id, local folder, "tiny" (the small model that comes with the package), a `Phi3VisionLLM` to share
            its model, or a loaded model and its processor.
        top_n: How many are kept.
        mode: See above.
        ranking: Of "sheet" and "pictures": "single_pass" reads the order off one step, "generated" lets the model
            write the list, number by number.
        caption: Whether the model first says what the query picture shows; remembered by content.
        reasons: For which of the kept ones the model says why they fit.
        fusion_weight: Final value = model's + weight * retrieval score, normalised as `fusion` says; None: the
            model's alone.
        fusion: "zscore" or "minmax" of both within the list, or "sum" of both as they are.
        window: Candidates in one look of "sheet" and "pictures"; fewer where they do not fit into the model. Longer
            lists are ranked from their end to their beginning by overlapping windows.
        stride: By how much windows differ; at most window - 1.
        passes: Of "sheet" and "pictures": over so many shuffled orders, joined by reciprocal rank fusion.
        seed: Of the shuffled orders.
        time_budget_s: What is not done by then is left out: reasons, then candidates in the order of retrieval.
        on_error: "keep_order" keeps the order of retrieval, with a note and a warning in the log.
        num_crops: Most crops of the query picture and of separate candidates; more see more and cost more.
        sheet_crops: Most crops of a sheet.
        max_new_tokens: Of each sentence.
        revision: Of a hub repository.
        device: "cpu", "cuda", ...; by default the fastest there is.
        dtype: "float32", "bfloat16", ...; by default what the weights are stored in.
        picture_memory: Bytes of features of pictures that are kept for the next query.
        image_policy: Which pictures may be read, and how large.
        callback_manager: LlamaIndex's.
    """

    mode: Literal["likelihood", "sheet", "pictures", "pointwise"] = "likelihood"
    ranking: Literal["single_pass", "generated"] = "single_pass"
    caption: bool = True
    reasons: Literal["first", "all", "none"] = "first"
    window: int = Field(default=9, ge=2, le=99)
    stride: int = Field(default=4, ge=1)
    passes: int = Field(default=1, ge=1)
    seed: int = 0
    num_crops: int = Field(default=1, ge=1)
    sheet_crops: int = Field(default=4, ge=1)
    max_new_tokens: int = Field(default=60, ge=1)

    _shared: SharedModel = PrivateAttr()
    _loading: dict[str, Any] | None = PrivateAttr(default=None)
    _captions: OrderedDict[str, tuple[int, ...]] = PrivateAttr(default_factory=OrderedDict)
    _turn: threading.Lock = PrivateAttr(default_factory=threading.Lock)

    def __init__(
        self,
        model: str | os.PathLike[str] | Phi3VisionLLM | tuple[Phi3Vision, Phi3VisionProcessor] = DEFAULT_MODEL,
        *,
        top_n: int = 9,
        mode: Literal["likelihood", "sheet", "pictures", "pointwise"] = "likelihood",
        ranking: Literal["single_pass", "generated"] = "single_pass",
        caption: bool = True,
        reasons: Literal["first", "all", "none"] = "first",
        fusion_weight: float | None = None,
        fusion: Fusion = "zscore",
        window: int = 9,
        stride: int = 4,
        passes: int = 1,
        seed: int = 0,
        time_budget_s: float | None = None,
        on_error: Literal["raise", "keep_order"] = "raise",
        num_crops: int = 1,
        sheet_crops: int = 4,
        max_new_tokens: int = 60,
        revision: str | None = None,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        picture_memory: int = PICTURE_MEMORY,
        image_policy: ImagePolicy | None = None,
        callback_manager: CallbackManager | None = None,
    ) -> None:
        super().__init__(  # type: ignore[call-arg]
            model_name=_name(model),
            top_n=top_n,
            mode=mode,
            ranking=ranking,
            caption=caption,
            reasons=reasons,
            fusion_weight=fusion_weight,
            fusion=fusion,
            window=window,
            stride=stride,
            passes=passes,
            seed=seed,
            time_budget_s=time_budget_s,
            on_error=on_error,
            num_crops=num_crops,
            sheet_crops=sheet_crops,
            max_new_tokens=max_new_tokens,
            callback_manager=callback_manager or CallbackManager([]),
        )
        lock = None
        if isinstance(model, Phi3VisionLLM):
            loaded, processor, lock = model.model, model.processor, model.lock
        elif isinstance(model, tuple):
            loaded, processor = model
        else:
            loaded, processor = load_phi3_vision(os.fspath(model), revision=revision, device=device, dtype=dtype)
        self._shared = SharedModel(loaded, processor, lock, picture_memory)
        if not isinstance(model, tuple):
            self._loading = {"model": model, "picture_memory": picture_memory}
            self._loading |= {"revision": revision, "device": device, "dtype": dtype}
        self._image_policy = image_policy or ImagePolicy()
        self._set_prompts(PROMPTS)

    @classmethod
    def class_name(cls) -> str:
        """LlamaIndex's name for the class."""
        return "Phi3VisionRerank"

    @property
    def model(self) -> Phi3Vision:
        """The model, to share it."""
        return self._shared.model

    @property
    def processor(self) -> Phi3VisionProcessor:
        """Of the model."""
        return self._shared.processor

    def _made_of(self) -> dict[str, Any]:
        if self._loading is None:
            raise loaded_model_error("Phi3VisionRerank")
        loading = dict(self._loading)
        if not isinstance(loading["model"], Phi3VisionLLM):
            loading["model"] = portable_name(loading["model"])
        for name in ("device", "dtype"):
            loading[name] = None if loading[name] is None else str(loading[name]).removeprefix("torch.")
        return field_arguments(self) | loading | {"image_policy": self._image_policy}

    def _described(self) -> dict[str, Any]:
        made_of = self._made_of()
        if isinstance(llm := made_of["model"], Phi3VisionLLM):
            shared = llm._made_of()
            made_of |= {"model": shared["model_name"]} | {
                name: shared[name] for name in ("revision", "device", "dtype")
            }
        return made_of

    def _unshare(self) -> None:
        super()._unshare()
        self._turn, self._captions = threading.Lock(), OrderedDict()

    def _rank(self, query: Query, candidates: list[Candidate], meter: Meter) -> Ranking:
        options = Options(
            mode=self.mode,
            ranking=self.ranking,
            caption=self.caption,
            window=self.window,
            stride=self.stride,
            passes=self.passes,
            seed=self.seed,
            num_crops=self.num_crops,
            sheet_crops=self.sheet_crops,
            max_new_tokens=self.max_new_tokens,
        )
        session = RerankSession(self._shared, self._say, options, meter, query, candidates)
        self._understand(session, meter)
        ranking = self._settle(candidates, session.judge())
        told = {"first": 1, "all": self.top_n, "none": 0}[self.reasons]
        reasons = session.reasons(ranking.order[:told])
        return replace(ranking, caption=session.caption, wanted=session.wanted, reasons=reasons)

    def _understand(self, session: RerankSession, meter: Meter) -> None:
        """Have the query understood, with the caption of its picture from memory where it is there."""
        image = session.query.image
        if image is None or not self.caption:
            session.understand()
            return
        digest = pixel_digest(image)
        with self._turn:
            known = self._captions.get(digest)
        caption = session.understand(known)
        if known is None and not meter.out_of_time():
            with self._turn:
                self._captions[digest] = tuple(caption)
                while len(self._captions) > CAPTIONS_KEPT:
                    self._captions.popitem(last=False)

    def _update_prompts(self, prompts: PromptDictType) -> None:
        super()._update_prompts(prompts)
        with self._turn:
            self._captions.clear()


def _name(model: str | os.PathLike[str] | Phi3VisionLLM | tuple[Phi3Vision, Phi3VisionProcessor]) -> str:
    if isinstance(model, Phi3VisionLLM):
        return model.model_name
    if isinstance(model, tuple):
        return str(model[0].config.name_or_path or type(model[0]).__name__)
    return os.fspath(model)
