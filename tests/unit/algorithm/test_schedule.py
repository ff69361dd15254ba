from __future__ import annotations

import pytest

from megatron_oreal.algorithm.schedule import learning_rate, policy_is_frozen, schedule_index
from megatron_oreal.config.schema import ScheduleConfig

REFERENCE = ScheduleConfig()


@pytest.mark.parametrize(
    ("i", "rate"),
    [
        (0, 0.5e-7),  # a tenth of the peak
        (4, 2.5e-7),
        (9, 5e-7),
        (10, 5e-7),  # the policy's first step is at its peak
        (50, 3e-7),  # half of the cosine: the mean of peak and minimum
        (30, 1e-7 + 4e-7 * (1 + 2**-0.5) / 2),  # cos(pi / 4)
        (90, 1e-7),
        (1000, 1e-7),
    ],
)
def test_the_policy_rate_of_the_reference(i, rate):
    assert learning_rate(i, 5e-7, 1e-7, REFERENCE) == pytest.approx(rate, rel=1e-12)


def test_the_last_iteration_is_just_above_the_minimum():
    rates = [learning_rate(i, 2e-6, 4e-7, REFERENCE) for i in range(90)]
    assert 4e-7 < rates[89] < 4.01e-7
    assert rates[10:] == sorted(rates[10:], reverse=True)


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        (ScheduleConfig(iterations=2, freeze_iterations=0, warmup_iterations=0), [1.0, 0.5, 0.0]),
        (ScheduleConfig(iterations=1, freeze_iterations=0, warmup_iterations=0), [1.0, 0.0]),
        (ScheduleConfig(iterations=3, freeze_iterations=0, warmup_iterations=1), [1, 1, 0.5, 0]),
    ],
)
def test_short_runs(schedule, rates):
    found = [learning_rate(i, 1.0, 0.0, schedule) for i in range(len(rates))]
    assert found == pytest.approx(rates, abs=1e-12)


def test_the_policy_is_frozen_at_first():
    assert [i for i in range(90) if policy_is_frozen(i, REFERENCE)] == list(range(10))
    assert not policy_is_frozen(0, ScheduleConfig(freeze_iterations=0))


def test_what_counts():
    assert schedule_index(12, 2, REFERENCE) == 12
    assert schedule_index(12, 2, ScheduleConfig(count="updates")) == 2
