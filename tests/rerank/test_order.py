"""Windows, rank fusion and scores: plain arithmetic."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mm_retriever.rerank.order import best_first, fuse, rank_scores, shares, windows


@given(st.integers(0, 60), st.integers(2, 20), st.integers(1, 19))
def test_windows_cover_a_list_and_bring_the_best_to_the_front(count: int, size: int, stride: int) -> None:
    """Truth: a perfect judge; as many of the best arrive at the front as two windows share (RankGPT)."""
    stride = min(stride, size - 1)
    order = list(range(count))
    random.Random(count * 31 + size).shuffle(order)
    seen: set[int] = set()
    for start, end in windows(count, size, stride):
        assert 0 <= start <= end <= count
        assert end - start <= size
        order[start:end] = sorted(order[start:end])
        seen |= set(range(start, end))
    assert seen == set(range(count))
    assert sorted(order) == list(range(count))
    assert order[: size - stride] == list(range(count))[: size - stride]


def test_orders_and_scores_by_hand() -> None:
    """Truth: worked out by hand; reciprocal ranks as in Cormack et al. 2009."""
    assert rank_scores([2, 0, 3]) == pytest.approx({2: np.log(1 / 61), 0: np.log(1 / 62), 3: np.log(1 / 63)})
    assert best_first([1.0, None, 3.0, 1.0, 9.0], [False, False, False, False, True]) == [2, 0, 3, 1, 4]
    assert shares([0.0, None, np.log(3), 5.0], [False, False, False, True]) == pytest.approx([0.25, 0, 0.75, 0])
    assert fuse([1, 3], [None, 0.5], 2) == [-1, 1]  # None counts as the least, so both scores are equal
    assert fuse([1, 3], [0.1, 0.5], 2) == pytest.approx([-3, 3])
    assert fuse([1, 3, 5], [0.1, float("nan"), 0.7], 0) == pytest.approx([-(1.5**0.5), 0, 1.5**0.5])
    assert fuse([], [], 2) == []
