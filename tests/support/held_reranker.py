"""A reranker that turns the order round, when its test lets it, and says why; or fails."""

from __future__ import annotations

import threading

from pydantic import PrivateAttr

from mm_retriever.rerank.reranker import Reranker
from mm_retriever.rerank.scorer import Candidate, Meter, Query, Ranking


class HeldRerank(Reranker):
    model_name: str = "held"
    fails: bool = False

    _released: threading.Event = PrivateAttr(default_factory=threading.Event)
    _began: threading.Event = PrivateAttr(default_factory=threading.Event)
    _ended: threading.Event = PrivateAttr(default_factory=threading.Event)

    @property
    def released(self) -> threading.Event:
        """It works until this is set, or its meter says that the time is up."""
        return self._released

    @property
    def began(self) -> threading.Event:
        """Set when a ranking is at work."""
        return self._began

    @property
    def ended(self) -> threading.Event:
        """Set after each ranking."""
        return self._ended

    def _rank(self, query: Query, candidates: list[Candidate], meter: Meter) -> Ranking:
        meter.passes += 1
        self._began.set()
        try:
            while not self._released.wait(0.01) and not meter.out_of_time():
                pass
            if self.fails:
                raise RuntimeError("out of memory")
            order = list(range(len(candidates)))[::-1]
            reasons = {position: f"reason {position + 1}" for position in order}
            return Ranking(order, [0.01 * position for position in order], reasons=reasons)
        finally:
            self._ended.set()
