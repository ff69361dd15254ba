"""Weights of two responses, four tokens in all, that a person can work out."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_oreal.algorithm.importance import (
    effective_share,
    importance_metrics,
    importance_weights,
    log_ratios,
)
from megatron_oreal.config.errors import UserError
from megatron_oreal.config.schema_importance import ImportanceConfig

LOG2 = math.log(2)
# The policy gives three tokens of the first response 1/2, 4 and 1 times the engine's probability,
# and the one of the second 8 times.
RATIOS = [torch.tensor([-1, 2, 0]).double() * LOG2, torch.tensor([3]).double() * LOG2]


def weights(**settings) -> list[float]:
    found = importance_weights(ImportanceConfig(**settings), RATIOS)
    assert [weight.shape for weight in found] == [(3,), (1,)]
    assert all(weight.dtype == torch.float32 for weight in found)
    return torch.cat(found).tolist()


def test_each_token_by_itself():
    assert weights(level="token", cap=100) == pytest.approx([0.5, 4, 1, 8])
    assert weights(level="token", cap=3) == pytest.approx([0.5, 3, 1, 3])
    assert weights(level="token", cap=5, above_cap="mask") == pytest.approx([0.5, 4, 1, 0])


def test_a_response_has_the_product_of_its_tokens():
    assert weights(level="sequence", cap=100) == pytest.approx([2, 2, 2, 8])
    assert weights(level="sequence", cap=1.5) == pytest.approx([1.5] * 4)
    assert weights(level="sequence", cap=3, above_cap="mask") == pytest.approx([2, 2, 2, 0])


def test_where_engine_and_policy_agree_every_weight_is_exactly_one():
    logprobs = [-torch.rand(5), -torch.rand(3)]
    ratios = log_ratios(logprobs, [values.clone() for values in logprobs])
    for level in ("token", "sequence"):
        for weight in importance_weights(ImportanceConfig(level=level, cap=1), ratios):
            assert (weight == 1).all()


def test_ratios_have_no_gradient():
    logprobs = torch.tensor([-1.0, -2.0], requires_grad=True)
    (ratio,) = log_ratios([logprobs], [torch.tensor([-1.5, -2.0])])
    assert not ratio.requires_grad
    assert ratio.tolist() == pytest.approx([0.5, 0])


def test_an_engine_that_gave_no_chance_counts_as_the_cap():
    (ratio,) = log_ratios([torch.tensor([-1.0])], [torch.tensor([-math.inf])])
    cfg = ImportanceConfig(level="token", cap=4)
    assert importance_weights(cfg, [ratio])[0].tolist() == [4]


def test_metrics_by_hand():
    assert importance_metrics(ImportanceConfig(), RATIOS) == {}
    assert importance_metrics(ImportanceConfig(level="token"), []) == {}
    assert importance_metrics(ImportanceConfig(level="token", cap=3), RATIOS) == pytest.approx(
        {"oreal/importance_mean": 7.5 / 4, "oreal/importance_above_cap_share": 2 / 4}
    )
    assert importance_metrics(ImportanceConfig(level="sequence", cap=3), RATIOS) == pytest.approx(
        {"oreal/importance_mean": (3 * 2 + 3) / 4, "oreal/importance_above_cap_share": 1 / 4}
    )


def share(*log_weights: float) -> float:
    return effective_share(torch.tensor(log_weights, dtype=torch.float64))


def test_effective_share_by_hand():
    assert share(*[0.0] * 7) == 1
    assert share(0, math.log(3)) == pytest.approx((1 + 3) ** 2 / (2 * (1 + 9)))
    # A common factor, even one beyond what a float holds, changes nothing.
    assert share(5000, 5000 + math.log(3)) == pytest.approx(0.8)
    assert share(0, 1000, 0, 0) == 0.25


def test_a_cap_below_one_is_refused():
    with pytest.raises(UserError, match=r"cap=0.5: set 1 or more"):
        ImportanceConfig(cap=0.5)
