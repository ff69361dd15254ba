from __future__ import annotations

import pytest
import torch

from megatron_oreal.config.errors import UserError
from megatron_oreal.engine.megatron_model import not_finite
from megatron_oreal.engine.roles import PolicyStep
from megatron_oreal.trainer.skipped_steps import SkippedSteps

NAN, INF = float("nan"), float("inf")


def step(refused: str = "") -> PolicyStep:
    return PolicyStep([], [], loss=0.0, grad_norm=0.0, refused=refused)


def iterate(skipped: SkippedSteps, iteration: int, *steps: PolicyStep) -> None:
    for model, one in zip(("token_rm", "policy"), steps, strict=False):
        assert skipped.took(model, one) == (not one.refused)
    skipped.end_iteration(iteration)


def test_only_refusals_in_a_row_end_a_run() -> None:
    skipped = SkippedSteps(most=3)
    iterate(skipped, 0, step("scores not finite"), step("loss not finite"))
    iterate(skipped, 1, step(), step("gradient norm not finite"))
    iterate(skipped, 2, step(), step())
    assert skipped.in_a_row == 0
    iterate(skipped, 3, step("loss not finite"))
    iterate(skipped, 4)  # nothing to train on: neither a refusal nor a step
    iterate(skipped, 5, step("loss not finite"))
    with pytest.raises(UserError) as error:
        iterate(skipped, 6, step("scores not finite"), step("loss not finite"))
    text = str(error.value)
    assert text.startswith("engine.max_skipped_steps=3: 3 iterations in a row")
    assert "the last is 6 (token_rm: scores not finite and policy: loss not finite)" in text
    assert "\n" not in text


def test_the_first_refusal_may_end_a_run() -> None:
    with pytest.raises(UserError):
        iterate(SkippedSteps(most=1), 0, step("loss not finite"))


@pytest.mark.parametrize(
    ("scores", "loss", "grad_norm", "named"),
    [
        ([1.0, -2.0], 0.5, 0.0, ""),
        ([], 0.0, 0.0, ""),
        ([1.0, INF], 0.5, 1.0, "scores"),  # right of an infinite score the loss itself is 0
        ([1.0, NAN], NAN, NAN, "scores"),
        ([1.0], -INF, NAN, "loss"),
        ([1.0], 0.5, INF, "gradient norm"),
        ([1.0], 0.5, NAN, "gradient norm"),
    ],
)
def test_what_is_not_finite_is_named(
    scores: list[float], loss: float, grad_norm: float, named: str
) -> None:
    values = {"scores": [torch.zeros(0), torch.tensor(scores)]}
    assert not_finite(values, loss, grad_norm) == named
