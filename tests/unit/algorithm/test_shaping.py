from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_oreal.algorithm.shaping import (
    bare_advantages,
    drop_unverified,
    grpo_advantages,
    rloo_advantages,
    shape_rewards,
)
from megatron_oreal.config.schema import OrealConfig
from megatron_oreal.types import Outcome
from tests.unit.algorithm.groups import make_group

RLOO, GRPO = OrealConfig(shaping="rloo"), OrealConfig(shaping="grpo")
NONE = OrealConfig(shaping="none")


def test_rloo_by_hand():
    # 1 - (-1 - 1 + 1)/3 = 4/3; -1 - (1 - 1 + 1)/3 = -4/3
    assert rloo_advantages([1, -1, -1, 1]) == pytest.approx([4 / 3, -4 / 3, -4 / 3, 4 / 3])
    assert rloo_advantages([1, -1]) == [2, -2]


def test_grpo_by_hand():
    # mean -1/2, deviations 3/2 and -1/2 (x3): unbiased variance (9/4 + 3/4)/3 = 1
    assert grpo_advantages([1, -1, -1, -1]) == pytest.approx([1.5, -0.5, -0.5, -0.5], abs=1e-7)


@pytest.mark.parametrize("cfg", [RLOO, GRPO])
def test_trivial_groups_have_zero_advantages(cfg):
    right, wrong = shape_rewards([make_group("+++"), make_group("---")], cfg)
    assert right.advantages == wrong.advantages == (0, 0, 0)
    assert (right.pass_rate, wrong.pass_rate) == (1, 0)


def test_without_shaping_the_reward_is_the_advantage_of_trivial_and_lonely_answers_too():
    assert bare_advantages([1, -1, -1]) == [1, -1, -1]
    groups = shape_rewards([make_group("+-?-"), make_group("++"), make_group("?-")], NONE)
    assert [g.advantages for g in groups] == [(1, -1, None, -1), (1, 1), (None, -1)]
    assert groups[0].pass_rate == pytest.approx(1 / 3)


def test_unverified_answers_leave_the_statistics():
    (group,) = shape_rewards([make_group("+?-?+")], RLOO)
    assert group.rewards == (1, None, -1, None, 1)
    assert group.pass_rate == pytest.approx(2 / 3)
    # of the three verified: 1 - (-1 + 1)/2 = 1; -1 - (1 + 1)/2 = -2
    assert group.advantages == (1, None, -2, None, 1)


@pytest.mark.parametrize("cfg", [RLOO, GRPO])
@pytest.mark.parametrize(
    ("outcomes", "pass_rate", "advantages"),
    [("???", None, (None, None, None)), ("?+?", 1, (None, 0, None)), ("-", 0, (0,))],
)
def test_fewer_than_two_verified(cfg, outcomes, pass_rate, advantages):
    (group,) = shape_rewards([make_group(outcomes)], cfg)
    assert group.pass_rate == pass_rate
    assert group.advantages == advantages


@pytest.mark.parametrize("cfg", [RLOO, GRPO])
@given(outcomes=st.text(alphabet="+-?", min_size=1, max_size=16))
def test_advantages_sum_to_zero_and_keep_the_sign_of_the_reward(cfg, outcomes):
    (group,) = shape_rewards([make_group(outcomes)], cfg)
    pairs = [
        (r, a)
        for r, a in zip(group.rewards, group.advantages, strict=True)
        if r is not None and a is not None
    ]
    assert sum(a for _, a in pairs) == pytest.approx(0, abs=1e-9)
    assert all(a * r >= -1e-12 for r, a in pairs)
    assert [r is None for r in group.rewards] == [o == "?" for o in outcomes]


def test_groups_with_too_many_unverified_are_dropped_whole():
    groups = [make_group("+-+-+-+-+?"), make_group("+-+-+-+-??"), make_group("+-")]
    kept, dropped = drop_unverified(groups, 0.1, unverified_is_incorrect=False)
    assert kept == [groups[0], groups[2]]  # a share of exactly 0.1 stays
    assert dropped == 1


def test_unverified_as_incorrect_drops_nothing():
    kept, dropped = drop_unverified([make_group("+??")], 0.1, unverified_is_incorrect=True)
    assert dropped == 0
    assert [v.outcome for v in kept[0].verdicts] == [
        Outcome.CORRECT,
        Outcome.INCORRECT,
        Outcome.INCORRECT,
    ]


def test_a_group_must_be_judged_first():
    group = replace(make_group("+-"), verdicts=())
    with pytest.raises(ValueError, match="'q' has 0 verdicts for 2 rollouts"):
        shape_rewards([group], RLOO)
    with pytest.raises(ValueError, match="verdicts"):
        drop_unverified([group], 0.1, unverified_is_incorrect=False)
