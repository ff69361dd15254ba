"""Numbers a person can add up, and each fault a reader may fear with the test that names it."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_oreal.algorithm.objectives import (
    count_tokens,
    policy_fields,
    policy_loss_terms,
    policy_objective,
    sft_objective,
    token_rm_objective,
)
from megatron_oreal.config.schema import OrealConfig
from megatron_oreal.config.schema_importance import ImportanceConfig
from tests.unit.algorithm.groups import make_trajectory

CFG = OrealConfig()
# Two tokens of a correct answer, one of an incorrect one. The reference agrees with the policy on
# the first and third token, and gives the second twice its probability.
LOGPROBS = [-1.0, -2.0, -3.0]
FIELDS = {
    "reward": [1.0, 1.0, -1.0],
    "advantage": [1.5, 1.5, -0.5],
    "token_weight": [0.5, 1.0, 0.25],
    "reference_logprobs": [-1.0, -2.0 + math.log(2), -3.0],
}


def tensors(values=LOGPROBS, fields=None):
    logp = torch.tensor(values, dtype=torch.float64, requires_grad=True)
    named = {
        name: torch.tensor(numbers, dtype=torch.float64)
        for name, numbers in (fields or FIELDS).items()
    }
    return logp, named


def terms(cfg=CFG, positive=2, negative=1):
    logp, fields = tensors()
    found = policy_loss_terms(cfg, positive, negative, logp, fields)
    return {name: term.tolist() for name, term in found.items()}


def gradient(cfg=CFG, positive=2, negative=1):
    logp, fields = tensors()
    loss = policy_objective(cfg, positive, negative)(logp, fields)
    return torch.autograd.grad(loss.sum(), logp)[0].tolist()


def test_terms_by_hand():
    found = terms()
    # 1 * 0.5 * 1.5 / 2 and 2 * 1 * 1.5 / 2
    assert found["positive"] == pytest.approx([0.375, 1.5, 0])
    # negative: half of A = -0.5 times w = 0.25, turned round
    assert found["negative"] == pytest.approx([0, 0, 0.0625])
    # (2 - log 2 - 1) / 3 * 0.01
    assert found["kl"] == pytest.approx([0, (1 - math.log(2)) / 300, 0])


def test_gradient_by_hand():
    # Positives have -w times A over N+, negatives half of that over N-; k3 adds 1 minus exp(d).
    assert gradient() == pytest.approx([-0.375, -0.75 + (1 - 2) / 300, 0.0625])


def test_an_incorrect_token_is_pushed_down_and_a_correct_one_up():
    up_1, up_2, down = gradient(replace(CFG, kl_coefficient=0.0))
    assert up_1 < 0
    assert up_2 < 0
    assert down > 0


def test_cloning_without_the_advantage():
    found = terms(replace(CFG, positive_times_advantage=False))
    assert found["positive"] == pytest.approx([0.25, 1, 0])
    assert found["negative"] == terms()["negative"]


def test_importance_weighs_both_sides_and_not_the_divergence():
    cfg = replace(CFG, importance=ImportanceConfig(level="token"))
    logp, fields = tensors(fields={**FIELDS, "importance_weight": [0.5, 2.0, 0.75]})
    found, plain = policy_loss_terms(cfg, 2, 1, logp, fields), terms()
    assert found["positive"].tolist() == pytest.approx([0.375 * 0.5, 1.5 * 2, 0])
    assert found["negative"].tolist() == pytest.approx([0, 0, 0.0625 * 0.75])
    assert found["kl"].tolist() == plain["kl"]
    loss = policy_objective(cfg, 2, 1)(logp, fields).sum()
    expected = [-0.375 * 0.5, -0.75 * 2 + (1 - 2) / 300, 0.0625 * 0.75]
    assert torch.autograd.grad(loss, logp)[0].tolist() == pytest.approx(expected)


def test_factors_scale_their_own_term_alone():
    found = terms(replace(CFG, positive_factor=3.0, negative_factor=5.0, kl_coefficient=7.0))
    plain = terms(replace(CFG, positive_factor=1.0, negative_factor=1.0, kl_coefficient=1.0))
    for name, factor in (("positive", 3), ("negative", 5), ("kl", 7)):
        assert found[name] == pytest.approx([factor * value for value in plain[name]])


def test_each_side_is_divided_by_its_own_tokens_and_kl_by_all():
    found, plain = terms(positive=20, negative=80), terms(positive=1, negative=1)
    for name, tokens in (("positive", 20), ("negative", 80), ("kl", 50)):  # kl: 100 against 2
        assert found[name] == pytest.approx([value / tokens for value in plain[name]])


@pytest.mark.parametrize(("kl", "value"), [("k1", -math.log(2)), ("k2", math.log(2) ** 2 / 2)])
def test_the_other_estimators(kl, value):
    assert terms(replace(CFG, kl=kl))["kl"] == pytest.approx([0, 0.01 * value / 3, 0])


def test_without_a_token_on_a_side_nothing_is_divided_by_zero():
    logp, fields = tensors([-1.0], {name: values[:1] for name, values in FIELDS.items()})
    loss = policy_objective(CFG, 1, 0)(logp, fields)
    assert loss.tolist() == pytest.approx([0.75])
    empty, none = tensors([], {name: [] for name in FIELDS})
    loss = policy_objective(CFG, 0, 0)(empty, none)
    assert loss.shape == (0,)
    assert torch.autograd.grad(loss.sum(), empty)[0].shape == (0,)


def test_padding_has_no_loss_and_no_gradient():
    logp, fields = tensors([-3.0], {name: [0.0] for name in FIELDS} | {"token_weight": [1.0]})
    loss = policy_objective(CFG, 2, 1)(logp, fields)
    assert loss.item() == 0
    assert torch.autograd.grad(loss.sum(), logp)[0].item() == 0


def test_zero_advantage_of_a_trivial_question():
    # Under `selection: all` only the KL term sees it, unless cloning ignores the advantage.
    logp, fields = tensors(
        [-1.0],
        {**FIELDS, "advantage": [0.0], "reward": [1.0]}
        | {"token_weight": [1.0], "reference_logprobs": [-1.0]},
    )
    assert policy_objective(CFG, 1, 0)(logp, fields).item() == 0
    plain = replace(CFG, positive_times_advantage=False)
    assert policy_objective(plain, 1, 0)(logp, fields).item() == 1


@given(st.lists(st.tuples(st.floats(-9, -0.1), st.sampled_from([1.0, -1.0])), min_size=2))
def test_chunks_add_up_to_the_whole(tokens):
    values, rewards = zip(*tokens, strict=True)
    fields = {
        "reward": list(rewards),
        "advantage": [0.7 * r for r in rewards],
        "token_weight": [0.3] * len(tokens),
        "reference_logprobs": [v / 2 for v in values],
    }
    logp, named = tensors(list(values), fields)
    objective = policy_objective(CFG, 5, 6)
    whole = objective(logp, named)
    cut = len(tokens) // 2
    parts = [
        objective(logp[s], {name: field[s] for name, field in named.items()})
        for s in (slice(cut), slice(cut, None))
    ]
    assert torch.equal(torch.cat(parts), whole)


def test_token_rm_by_hand():
    scores = torch.tensor([0.0, math.log(3)], dtype=torch.float64, requires_grad=True)
    rewards = torch.tensor([1.0, -1.0], dtype=torch.float64)
    loss = token_rm_objective(2)(scores, rewards)
    # sigmoid = 1/2, 3/4: -log(1/2)/2 and -log(1/4)/2; gradient (sigmoid - label)/2
    assert loss.tolist() == pytest.approx([math.log(2) / 2, math.log(4) / 2])
    assert torch.autograd.grad(loss.sum(), scores)[0].tolist() == pytest.approx([-0.25, 0.375])


def test_token_rm_of_nothing_and_of_extremes():
    assert token_rm_objective(0)(torch.zeros(0), torch.zeros(0)).shape == (0,)
    loss = token_rm_objective(2)(torch.tensor([1e4, -1e4]), torch.tensor([-1.0, 1.0]))
    assert loss.tolist() == [5000, 5000]


def test_fine_tuning_is_the_mean_negative_log_probability():
    loss = sft_objective(4)(torch.tensor([-1.0, -3.0]), {})
    assert loss.tolist() == [0.25, 0.75]
    assert sft_objective(0)(torch.zeros(0), {}).shape == (0,)


def test_counts_and_fields_of_an_update():
    trajectories = [make_trajectory(1, 2, 0.5), make_trajectory(-1, 3, -2), make_trajectory(1, 4)]
    assert count_tokens(trajectories) == (6, 3)
    assert count_tokens([]) == (0, 0)
    weights = [torch.ones(2), torch.ones(3), torch.ones(4)]
    fields = policy_fields(trajectories, weights, weights)
    assert sorted(fields) == sorted(FIELDS)
    assert [x.tolist() for x in fields["reward"]] == [[1] * 2, [-1] * 3, [1] * 4]
    assert [x.tolist() for x in fields["advantage"]] == [[0.5] * 2, [-2] * 3, [0] * 4]
    assert all(x.dtype == torch.float32 for values in fields.values() for x in values)
