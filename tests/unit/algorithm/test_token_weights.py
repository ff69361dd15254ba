from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_oreal.algorithm.token_weights import (
    running_means,
    token_weights,
    topk_weights,
    uniform_weights,
)
from megatron_oreal.config.schema import TokenWeightsConfig

THRESHOLD = TokenWeightsConfig(kind="threshold")
LOGIT_3_4 = math.log(3)  # sigmoid(log 3) = 3/4


def test_running_means_by_hand():
    assert running_means(torch.tensor([4.0, 0.0, -1.0, 1.0])).tolist() == [4, 2, 1, 1]


def test_threshold_of_one_half_is_twice_q_minus_one():
    # means: log 3, 0, -log 3; q = 3/4, 1/2, 1/4
    scores = torch.tensor([LOGIT_3_4, -LOGIT_3_4, -3 * LOGIT_3_4], dtype=torch.float64)
    positive, negative = token_weights([scores, scores], [1.0, -1.0], THRESHOLD)
    assert positive.tolist() == pytest.approx([0.5, 0, 0])
    assert negative.tolist() == pytest.approx([0, 0, 0.5])


def test_each_sign_has_its_own_threshold():
    cfg = TokenWeightsConfig(kind="threshold", c_pos=0.0, c_neg=0.2)
    scores = torch.tensor([LOGIT_3_4], dtype=torch.float64)
    positive, negative = token_weights([scores, scores], [1.0, -1.0], cfg)
    assert positive.item() == pytest.approx(0.75)
    assert negative.item() == pytest.approx((0.25 - 0.2) / 0.8)


def test_topk_rescales_the_largest_to_zero_and_one():
    values = torch.tensor([0.1, 0.5, 0.9, 0.7, 0.3, 0.2])
    # k = int(6 * 0.5) = 3: 0.9, 0.7, 0.5 -> 1, 1/2, 0
    assert topk_weights(values, 0.5).tolist() == pytest.approx([0, 0, 1, 0.5, 0, 0])


@pytest.mark.parametrize(
    ("values", "ratio", "weights"),
    [
        ([0.2, 0.8, 0.4], 0.1, [0, 1, 0]),  # int(0.3) = 0, yet one token is kept
        ([0.6, 0.6, 0.6, 0.6], 0.5, [1, 1, 0, 0]),  # all equal: ones, the earlier tokens first
        ([0.3], 1.0, [1]),
        ([0.0, 1.0], 1.0, [0, 1]),
    ],
)
def test_topk_edges(values, ratio, weights):
    assert topk_weights(torch.tensor(values), ratio).tolist() == weights


def test_topk_of_a_negative_takes_the_least_likely_correct():
    cfg = TokenWeightsConfig(kind="topk", ratio_pos=0.25, ratio_neg=0.75)
    # means 2, 1, -1, -1/2: the negative's three least likely correct are tokens 3, 4 and 2
    scores = torch.tensor([2.0, 0.0, -5.0, 1.0])
    positive, negative = token_weights([scores, scores], [1.0, -1.0], cfg)
    assert positive.tolist() == [1, 0, 0, 0]
    wrong = [1 / (1 + math.exp(mean)) for mean in (2, 1, -1, -0.5)]
    middle = (wrong[3] - wrong[1]) / (wrong[2] - wrong[1])
    assert negative.tolist() == pytest.approx([0, 0, 1, middle])


def test_no_token_rm_means_ones():
    cfg = TokenWeightsConfig(kind="none")
    assert token_weights([torch.tensor([9.0, -9.0])], [-1.0], cfg)[0].tolist() == [1, 1]
    assert [w.tolist() for w in uniform_weights([2, 1])] == [[1, 1], [1]]


@pytest.mark.parametrize("kind", ["threshold", "topk", "none"])
def test_weights_carry_no_gradient_and_keep_the_dtype(kind):
    scores = torch.tensor([1.0, 2.0, -1.0], requires_grad=True)
    (weights,) = token_weights([scores], [1.0], TokenWeightsConfig(kind=kind))
    assert not weights.requires_grad
    assert weights.dtype == torch.float32


@pytest.mark.parametrize("kind", ["threshold", "topk"])
def test_a_saturated_score_gives_a_finite_weight(kind):
    scores = torch.tensor([1e30, -1e30, 88.0])
    for reward in (1.0, -1.0):
        (weights,) = token_weights([scores], [reward], TokenWeightsConfig(kind=kind))
        assert torch.isfinite(weights).all()


@given(
    st.lists(st.floats(-20, 20), min_size=1, max_size=40),
    st.sampled_from([1.0, -1.0]),
    st.sampled_from(["threshold", "topk"]),
    st.floats(0.01, 0.99),
)
def test_weights_lie_in_the_unit_interval(scores, reward, kind, number):
    cfg = TokenWeightsConfig(kind, number, number, number, number)
    (weights,) = token_weights([torch.tensor(scores)], [reward], cfg)
    assert weights.shape == (len(scores),)
    assert weights.min() >= 0
    assert weights.max() <= 1
    if kind == "topk":
        assert weights.max() == 1
        assert int((weights > 0).sum()) <= max(1, int(len(scores) * number))


@given(st.lists(st.floats(-20, 20), min_size=1, max_size=40))
def test_a_negative_weighs_as_a_positive_of_opposite_scores(scores):
    tensor = torch.tensor(scores, dtype=torch.float64)
    negative, positive = token_weights([tensor, -tensor], [-1.0, 1.0], THRESHOLD)
    assert torch.equal(negative, positive)


def test_a_trajectory_without_reward_is_refused():
    with pytest.raises(ValueError, match="zip"):
        token_weights([torch.zeros(1), torch.zeros(1)], [1.0], THRESHOLD)
