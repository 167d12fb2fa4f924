"""Passes of a torch model where the device is out of memory."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mm_retriever.embedders.embedder import Content
from mm_retriever.embedders.registry import load_embedder
from tests.support.small_models import MAKERS


@pytest.mark.parametrize("family", ["visualized_bge", "bge_vl"])
def test_a_pass_that_there_is_no_memory_for_is_computed_in_halves(tmp_path, caplog, family):
    """Our promise: no batch is too large, and the vectors are the same; a single row that does not fit is an error."""
    with MAKERS[family](tmp_path, 3) as model:
        embedder = load_embedder(model.name, device="cpu", **model.options)
    contents = [Content(text) for text in ("a mug", "red", "a red mug with stars", "green", "dress")]
    expected = embedder.encode(contents)
    part, room, rows = embedder.parts["text"], 2, []

    def with_little_memory(*inputs: torch.Tensor) -> torch.Tensor:
        if len(inputs[0]) > room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        rows.append(len(inputs[0]))
        return part(*inputs)

    embedder.parts["text"] = with_little_memory
    np.testing.assert_allclose(embedder.encode(contents), expected, atol=1e-6)
    assert sum(rows) == 5 and max(rows) == 2
    assert "no memory for 5 inputs at once" in caplog.text
    room = 0
    with pytest.raises(torch.OutOfMemoryError):
        embedder.encode(contents[:1])
