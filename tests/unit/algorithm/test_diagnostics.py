from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_oreal.algorithm.diagnostics import (
    calibration_error,
    iteration_metrics,
    policy_metrics,
    rank_auc,
    step_metrics,
    token_rm_metrics,
    token_weight_metrics,
)
from megatron_oreal.algorithm.objectives import policy_fields
from megatron_oreal.algorithm.rollout_diagnostics import group_metrics, mismatch_metrics
from megatron_oreal.config.schema import OrealConfig, ScheduleConfig
from tests.unit.algorithm.groups import make_group, make_trajectory

CFG = OrealConfig()


def test_policy_metrics_by_hand():
    trajectories = [make_trajectory(1, 2, 1.5), make_trajectory(-1, 1, -0.5)]
    logprobs = [torch.tensor([-1.0, -2.0]), torch.tensor([-3.0])]
    reference = [torch.tensor([-1.0, -2.0]), torch.tensor([-2.0])]
    weights = [torch.tensor([0.5, 1.0]), torch.tensor([0.25])]
    entropies = [torch.tensor([1.0, 0.0]), torch.tensor([0.5])]
    fields = policy_fields(trajectories, weights, reference)
    found = policy_metrics(CFG, logprobs, fields, entropies)
    kl = math.e - 2  # d = 1 on one of three tokens
    assert found == pytest.approx(
        {
            "oreal/loss": 1.875 + 0.0625 + 0.01 * kl / 3,
            "oreal/positive_loss": 1.875,
            "oreal/negative_loss": 0.0625,
            "oreal/kl_loss": 0.01 * kl / 3,
            "oreal/kl_k1": -1 / 3,
            "oreal/kl_k3": kl / 3,
            "oreal/reference_difference_max": 1,
            "oreal/logprob": -2,
            "oreal/entropy": 0.5,
            "oreal/positive_tokens": 2,
            "oreal/negative_tokens": 1,
        }
    )


def test_policy_metrics_of_an_untouched_policy_are_exactly_zero():
    trajectories = [make_trajectory(1, 100, 1.5), make_trajectory(-1, 100, -0.5)]
    logprobs = [-torch.rand(100), -torch.rand(100)]
    fields = policy_fields(trajectories, [torch.ones(100)] * 2, [x.clone() for x in logprobs])
    found = policy_metrics(CFG, logprobs, fields)
    for name in ("kl_loss", "kl_k1", "kl_k3", "reference_difference_max"):
        assert found[f"oreal/{name}"] == 0
    assert "oreal/entropy" not in found


def test_nothing_to_measure_gives_no_numbers():
    assert policy_metrics(CFG, [], policy_fields([], [], [])) == {}
    assert token_weight_metrics([], []) == {}
    assert token_rm_metrics(torch.zeros(0), torch.zeros(0)) == {}
    assert group_metrics([]) == {}
    assert mismatch_metrics([], []) == {}


def test_token_weights_by_sign():
    weights = [torch.tensor([0.0, 0.5]), torch.tensor([0.25]), torch.linspace(0.5, 1, 9)]
    found = token_weight_metrics(weights, [1.0, -1.0, 1.0])
    # positives in order: 0, 0.5, 0.5, 0.5625, ..., 1: eleven values, ranks 1, 5 and 9
    assert found == pytest.approx(
        {
            "token_weight/positive_mean": (0.5 + 6.75) / 11,
            "token_weight/positive_zero_share": 1 / 11,
            "token_weight/positive_p10": 0.5,
            "token_weight/positive_p50": 0.6875,
            "token_weight/positive_p90": 0.9375,
            "token_weight/negative_mean": 0.25,
            "token_weight/negative_zero_share": 0,
            "token_weight/negative_p10": 0.25,
            "token_weight/negative_p50": 0.25,
            "token_weight/negative_p90": 0.25,
        }
    )
    assert all(
        name.startswith("token_weight/pos") for name in token_weight_metrics(weights[:1], [1])
    )


def test_token_rm_metrics_by_hand():
    scores = torch.tensor([math.log(3), -math.log(3), math.log(3), -1.0])
    rewards = torch.tensor([1.0, 1.0, -1.0, -1.0])
    found = token_rm_metrics(scores, rewards)
    e = math.exp(-1)
    assert found == pytest.approx(
        {
            # -log of 3/4, 1/4, 1/4 and sigmoid(1)
            "token_rm/loss": (math.log(4 / 3) + 2 * math.log(4) + math.log(1 + e)) / 4,
            "token_rm/accuracy": 0.5,
            # pairs: (0, 2) tie, (0, 3) won, (1, 2) lost, (1, 3) lost by -1.10 against -1
            "token_rm/auc": 1.5 / 4,
            # [0.2, 0.3) holds 1/4 and sigmoid(-1), [0.7, 0.8) 3/4 twice; one of each is correct
            "token_rm/calibration_error": (abs(0.25 + e / (1 + e) - 1) + abs(1.5 - 1)) / 4,
            "token_rm/score_positive": 0,
            "token_rm/score_negative": (math.log(3) - 1) / 2,
        },
        abs=1e-6,
    )


def test_token_rm_of_one_class_has_no_auc():
    found = token_rm_metrics(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 1.0]))
    assert "token_rm/auc" not in found
    assert "token_rm/score_negative" not in found
    assert found["token_rm/accuracy"] == 1


@given(
    st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=2).filter(
        lambda items: {label for _, label in items} == {True, False}
    )
)
def test_auc_is_the_share_of_pairs_won(items):
    positives = [score for score, label in items if label]
    negatives = [score for score, label in items if not label]
    won = sum((p > n) + (p == n) / 2 for p in positives for n in negatives)
    scores = torch.tensor([float(score) for score, _ in items])
    found = rank_auc(scores, torch.tensor([label for _, label in items]))
    assert found == pytest.approx(won / (len(positives) * len(negatives)), abs=1e-12)


def test_steps_by_model():
    assert step_metrics("oreal", 2.0, 1e-6) == {"oreal/grad_norm": 2, "oreal/learning_rate": 1e-6}
    assert set(step_metrics("token_rm", 2.0, 1e-6)) == {
        "token_rm/grad_norm",
        "token_rm/learning_rate",
    }


@pytest.mark.parametrize(
    ("iteration", "updates", "skipped"),
    [(0, 0, 0), (9, 0, 0), (10, 1, 0), (10, 0, 1), (19, 7, 3)],
)
def test_iterations_without_a_step_are_counted_from_the_end_of_the_freeze(
    iteration, updates, skipped
):
    schedule = ScheduleConfig(iterations=20, freeze_iterations=10)
    found = iteration_metrics(
        schedule, iteration, trajectories=4, dropped=1, updates=updates, refused=2
    )
    assert found == {
        "rollout/dropped_groups": 1,
        "oreal/trajectories": 4,
        "oreal/skipped_iterations": skipped,
        "oreal/skipped_steps": 2,
    }


def test_calibration_of_the_ends():
    correct = torch.tensor([True, False])
    assert calibration_error(torch.tensor([1.0, 0.0]), correct) == 0
    assert calibration_error(torch.tensor([0.0, 1.0]), correct) == 1


def test_group_metrics_by_hand():
    groups = [
        make_group("++-?", lengths=[1, 3, 4, 10], truncated=[3]),
        make_group("++", lengths=[2, 2]),
        make_group("--", lengths=[6, 2], truncated=[0]),
        make_group("??", lengths=[1, 1]),
        make_group("+?", lengths=[2, 6]),
    ]
    assert group_metrics(groups) == pytest.approx(
        {
            "rollout/pass_rate": (2 / 3 + 1 + 0 + 1) / 4,
            "rollout/pass_rate_0_20_share": 1 / 4,
            "rollout/pass_rate_20_40_share": 0,
            "rollout/pass_rate_40_60_share": 0,
            "rollout/pass_rate_60_80_share": 1 / 4,
            "rollout/pass_rate_80_100_share": 2 / 4,
            "rollout/nontrivial_share": 0.2,
            "rollout/all_correct_share": 0.2,
            "rollout/all_incorrect_share": 0.2,
            "rollout/undecided_share": 0.4,
            "rollout/unverified_share": 4 / 12,
            "rollout/truncated_share": 2 / 12,
            "rollout/response_length_mean": 40 / 12,
            "rollout/response_length_max": 10,
            "rollout/response_length_correct": (1 + 3 + 2 + 2 + 2) / 5,
            "rollout/response_length_incorrect": (4 + 6 + 2) / 3,
            "rollout/response_length_unverified": (10 + 1 + 1 + 6) / 4,
        }
    )


def test_group_metrics_leave_out_what_is_not_there():
    found = group_metrics([make_group("??")])
    assert "rollout/pass_rate" not in found
    assert "rollout/response_length_correct" not in found
    assert found["rollout/undecided_share"] == 1


def test_mismatch_by_hand():
    policy = [torch.tensor([-1.0, -2.0]), torch.tensor([-3.0])]
    rollout = [torch.tensor([-1.0, -3.0]), torch.tensor([-1.0])]
    # policy minus rollout is 0, 1 and -2
    assert mismatch_metrics(policy, rollout) == pytest.approx(
        {
            "rollout/mismatch_mean": 1,
            "rollout/mismatch_p99": 1,  # of 0, 1, 2 that of rank floor(1.98)
            "rollout/mismatch_max": 2,
            "rollout/ess_token": (1 + math.e + math.exp(-2)) ** 2
            / (3 * (1 + math.exp(2) + math.exp(-4))),
            "rollout/ess_sequence": (math.e + math.exp(-2)) ** 2
            / (2 * (math.exp(2) + math.exp(-4))),
            "rollout/mismatch_k3": ((math.e - 1 - 1) + (math.exp(-2) + 2 - 1)) / 3,
        }
    )


def test_mismatch_refuses_other_tokens():
    with pytest.raises(RuntimeError, match="size"):
        mismatch_metrics([torch.zeros(2)], [torch.zeros(3)])
