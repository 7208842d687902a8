"""Softmax and order of small batches, against values worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from server.ranking import rank


def test_rank_when_logits_are_logarithms_then_probabilities_are_their_shares() -> None:
    # exp(ln 1), exp(ln 2), exp(ln 5): 1, 2 and 5 of 8
    found = rank(np.log(np.array([[1, 5, 2], [5, 2, 1]], np.float32)))
    assert found.classes.tolist() == [[1, 2, 0], [0, 1, 2]]
    np.testing.assert_allclose(found.probabilities, [[5 / 8, 2 / 8, 1 / 8]] * 2, rtol=1e-6)
    assert found.is_finite == [True, True]


def test_rank_when_logits_are_equal_then_the_lower_index_comes_first() -> None:
    assert rank(np.array([[3, 7, 7, 3]], np.float32)).classes.tolist() == [[1, 2, 0, 3]]


def test_rank_when_logits_are_huge_then_nothing_overflows() -> None:
    found = rank(np.array([[3e38, -3e38]], np.float32))
    assert found.probabilities.tolist() == [[1.0, 0.0]]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_rank_when_one_image_is_not_finite_then_the_others_are_as_without_it(bad: float) -> None:
    logits = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)
    alone = rank(logits[[0, 2]])
    logits[1, 3] = bad
    found = rank(logits)
    assert found.is_finite == [True, False, True]
    assert (found.classes[[0, 2]] == alone.classes).all()
    assert (found.probabilities[[0, 2]] == alone.probabilities).all()
