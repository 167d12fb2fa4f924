"""Query vectors against numbers worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from mm_retriever.refinement import avoiding, balanced, mean, rocchio

X, Y, Z = np.eye(3, dtype=np.float32)


def test_rocchio_is_the_formula_of_the_textbook():
    """q = x; liked y and z; disliked -z: x + 0.75 (0, .5, .5) - 0.15 (0, 0, -1) = (1, 0.375, 0.525), then length 1."""
    moved = rocchio(X, np.stack([Y, Z]), -Z[None])
    expected = np.array([1, 0.375, 0.525])
    np.testing.assert_allclose(moved, expected / np.sqrt(1 + 0.375**2 + 0.525**2), atol=1e-7)


def test_rocchio_without_feedback_is_the_query():
    none = np.empty((0, 3), np.float32)
    np.testing.assert_array_equal(rocchio(X, none, none), X)


@pytest.mark.parametrize(
    ("balance", "expected"),
    [
        (0, (1, 0, 0)),
        (0.25, (0.5, 0.5, 0)),
        (0.5, (0, 1, 0)),
        (0.75, (0, 0.5, 0.5)),
        (1, (0, 0, 1)),
    ],
)
def test_balance_goes_from_the_image_over_both_to_the_words(balance, expected):
    direction = np.array(expected) / np.linalg.norm(expected)
    np.testing.assert_allclose(balanced(X, Y, Z, balance), direction, atol=1e-7)


def test_words_to_avoid_take_away_half_of_their_mean():
    """x - 0.5 y has the length 1.118."""
    np.testing.assert_allclose(avoiding(X, Y[None]), np.array([1, -0.5, 0]) / np.sqrt(1.25), atol=1e-7)


def test_a_mean_has_length_one():
    np.testing.assert_allclose(mean(np.stack([X, Y])), [np.sqrt(0.5), np.sqrt(0.5), 0], atol=1e-7)
