from __future__ import annotations

import pytest

from megatron_oreal.config.schema import Config, ScheduleConfig
from megatron_oreal.trainer.rates import Rates


@pytest.mark.parametrize(
    ("iteration", "policy", "token_rm"),
    [
        (0, 0.0, 2e-7),  # frozen; the first of ten steps of warm-up
        (9, 0.0, 2e-6),
        (10, 5e-7, 2e-6),  # the policy starts at its peak
        (50, 3e-7, 1.2e-6),  # half way down the cosine
        (90, 1e-7, 4e-7),
    ],
)
def test_by_iterations_as_the_reference_has_it(iteration, policy, token_rm):
    rates = Rates(Config(), policy_updates=7, token_rm_updates=7)  # counts of no account here
    assert rates.policy(iteration) == pytest.approx(policy, rel=1e-12)
    assert rates.token_rm(iteration) == pytest.approx(token_rm, rel=1e-12)


def test_by_updates_each_model_counts_its_own():
    rates = Rates(Config(schedule=ScheduleConfig(count="updates")))
    rates.token_rm_updates = 4
    assert rates.policy(9) == 0.0  # frozen by the iteration, whatever counts
    assert rates.policy(30) == pytest.approx(5e-8)
    assert rates.token_rm(30) == pytest.approx(1e-6)
    rates.policy_updates = 50
    assert rates.policy(30) == pytest.approx(3e-7)
