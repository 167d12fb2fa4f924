"""How `Phi3VisionRerank` judges candidates, and how its model is loaded."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from mm_retriever.rebuild import Name
from mm_retriever.rerank.reranker import Reranker


class Options(Reranker):
    """The options of `Phi3VisionRerank` beside those of every reranker."""

    mode: Literal["likelihood", "sheet", "pointwise"] = "likelihood"
    ranking: Literal["single_pass", "generated"] = "single_pass"
    """Of "sheet": "single_pass" reads the order off one step, "generated" lets the model write it, as published."""
    caption: bool = True
    """Whether the model first says what the query image shows; remembered by content."""
    reasons: Literal["first", "all", "none"] = "first"
    """For which of the kept ones the model says why they fit; left out when the time budget is spent."""
    window: int = Field(default=9, ge=2, le=99)
    """Candidates on one sheet. Longer lists are ranked from their end to their beginning by overlapping windows."""
    stride: int = Field(default=4, ge=1)
    """By how much windows differ; at most window - 1."""
    num_crops: int = Field(default=1, ge=1)
    """Most crops of the query image and of separate candidates; more see more and cost more."""
    sheet_crops: int = Field(default=4, ge=1)
    """Most crops of a sheet."""
    max_new_tokens: int = Field(default=60, ge=1)
    """Of each sentence."""
    revision: str | None = None
    """Of a hub repository."""
    device: Name = None
    """"cpu", "cuda", ...; by default the fastest there is."""
    dtype: Name = None
    """"float32", "bfloat16", ...; by default what the weights are stored in."""
    image_memory: int = Field(default=256 * 2**20, ge=0)
    """Bytes of features of images that are kept for the next query."""
