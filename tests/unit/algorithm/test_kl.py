from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_oreal.algorithm.kl import ESTIMATORS, k1, k2, k3


@pytest.mark.parametrize(
    ("name", "value", "gradient"),
    # d = reference - policy = log 2; the gradient is with respect to the policy's logp
    [
        ("k1", -math.log(2), 1.0),
        ("k2", math.log(2) ** 2 / 2, -math.log(2)),
        ("k3", 2 - math.log(2) - 1, 1 - 2),
    ],
)
def test_by_hand(name, value, gradient):
    logp = torch.tensor([-1.0 - math.log(2)], dtype=torch.float64, requires_grad=True)
    estimate = ESTIMATORS[name](logp, torch.tensor([-1.0], dtype=torch.float64))
    (grad,) = torch.autograd.grad(estimate.sum(), logp)
    assert estimate.item() == pytest.approx(value, abs=1e-12)
    assert grad.item() == pytest.approx(gradient, abs=1e-12)


@pytest.mark.parametrize("name", ["k1", "k2", "k3"])
def test_equal_models_have_exactly_no_divergence(name):
    logp = -torch.rand(1000) * 20
    assert ESTIMATORS[name](logp, logp.clone()).abs().max() == 0


def test_equal_models_have_exactly_no_gradient_of_k2_and_k3():
    logp = (-torch.rand(1000) * 20).requires_grad_()
    loss = (k2(logp, logp.detach()) + k3(logp, logp.detach())).sum()
    assert torch.autograd.grad(loss, logp)[0].abs().max() == 0


@given(st.lists(st.floats(-30, 0, width=32), min_size=2, max_size=2))
def test_k3_is_never_negative_in_single_precision(pair):
    policy, reference = torch.tensor(pair[:1]), torch.tensor(pair[1:])
    assert k3(policy, reference).item() >= -1e-6 * abs(pair[0] - pair[1])


def test_all_three_estimate_the_divergence():
    policy = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)
    reference = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    exact = (policy * (policy / reference).log()).sum()
    for estimator in (k1, k3):  # unbiased: the mean over the policy's own tokens is exact
        mean = (policy * estimator(policy.log(), reference.log())).sum()
        assert mean.item() == pytest.approx(exact.item(), abs=1e-12)
    assert (policy * k2(policy.log(), reference.log())).sum().item() == pytest.approx(
        exact.item(), rel=0.2
    )
