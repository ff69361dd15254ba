from __future__ import annotations

import math

import pytest

from megatron_oreal.algorithm.statistics import bootstrap_interval, paired_difference


def test_what_does_not_vary_is_sure() -> None:
    interval = bootstrap_interval([0.25] * 7)
    assert (interval.low, interval.high) == (0.25, 0.25)


def test_the_interval_is_that_of_a_binomial() -> None:
    # 100 questions, 40 right: the mean's standard error is sqrt(0.4 * 0.6 / 100) = 0.049.
    values = [1.0] * 40 + [0.0] * 60
    interval = bootstrap_interval(values)
    assert interval.low == pytest.approx(0.4 - 1.96 * 0.049, abs=0.015)
    assert interval.high == pytest.approx(0.4 + 1.96 * 0.049, abs=0.015)
    assert bootstrap_interval(values) == interval
    narrow = bootstrap_interval(values, level=0.5)
    assert interval.low < narrow.low < narrow.high < interval.high


def test_few_pairs_are_tested_exactly() -> None:
    # b is better on three questions of four, as on none: of 8 patterns of signs all plus and all
    # minus are as far from 0.
    difference = paired_difference([0, 0, 0, 1], [1, 1, 1, 1])
    assert (difference.mean, difference.p_value) == (0.75, 2 / 8)
    # 1, 1, 1 and -1: |sum| 2 or more in 10 of 16.
    difference = paired_difference([0, 0, 0, 1], [1, 1, 1, 0])
    assert (difference.mean, difference.p_value) == (0.5, 10 / 16)


def test_the_same_is_no_difference() -> None:
    difference = paired_difference([0.5, 1.0], [0.5, 1.0])
    assert (difference.mean, difference.p_value) == (0, 1)
    assert (difference.interval.low, difference.interval.high) == (0, 0)


def test_many_pairs_are_drawn() -> None:
    # 30 questions better, 10 worse: the binomial's two tails of 40 fair signs.
    a, b = [0.0] * 30 + [1.0] * 10, [1.0] * 30 + [0.0] * 10
    tail = sum(math.comb(40, k) for k in range(30, 41)) / 2**40
    difference = paired_difference(a, b)
    assert difference.mean == 0.5
    assert difference.p_value == pytest.approx(2 * tail, abs=1e-3)
    assert paired_difference(b, a).mean == -0.5
    assert paired_difference([0.0] * 40, [1.0] * 40).p_value == 1 / 10_001
