from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_oreal.algorithm.pass_at_k import pass_at_k


@pytest.mark.parametrize(
    ("samples", "correct", "k", "expected"),
    [
        (4, 1, 1, 0.25),
        (4, 1, 2, 0.5),  # 1 - C(3, 2)/C(4, 2) = 1 - 3/6
        (4, 2, 2, 5 / 6),  # 1 - 1/6
        (8, 0, 8, 0.0),
        (8, 1, 8, 1.0),
        (8, 8, 1, 1.0),
    ],
)
def test_by_hand(samples, correct, k, expected):
    assert pass_at_k(samples, correct, k) == pytest.approx(expected, abs=1e-15)


@given(st.integers(1, 8), st.data())
def test_it_is_the_share_of_subsets_that_hold_a_correct_one(samples, data):
    correct = data.draw(st.integers(0, samples))
    k = data.draw(st.integers(1, samples))
    subsets = list(combinations([i < correct for i in range(samples)], k))
    share = sum(any(subset) for subset in subsets) / len(subsets)
    assert pass_at_k(samples, correct, k) == pytest.approx(share, abs=1e-12)


def test_large_numbers_stay_finite():
    # 9/10 wrong, drawn 10 of a million: nearly 1 - 0.9^10
    assert pass_at_k(1_000_000, 100_000, 10) == pytest.approx(1 - 0.9**10, abs=1e-5)


@pytest.mark.parametrize(("samples", "correct", "k"), [(4, 5, 1), (4, -1, 1), (4, 1, 5), (4, 1, 0)])
def test_what_is_not_defined(samples, correct, k):
    with pytest.raises(ValueError, match="not defined"):
        pass_at_k(samples, correct, k)
