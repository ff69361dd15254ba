"""Sums and gathers that overlap with the passes change no number, whatever the head bypasses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from megatron_oreal.algorithm import objectives
from megatron_oreal.config.schema import OptimizerConfig
from tests.ranks import RankPools
from tests.toy_models import (
    ROOMY,
    TIGHT,
    make_config,
    make_policy,
    make_token_rm,
    make_trajectories,
    open_models,
    pack,
    whole_weights,
    write_toy,
)

pytestmark = pytest.mark.parallel

LEARNING_RATE = 1e-3
# The first step counts which gradients come; overlap begins with the second. Steps have as many
# micro-batches as their responses need: Megatron counts in the last alone, if it is told which.
BUDGETS = (TIGHT, ROOMY, TIGHT)
STEPS = len(BUDGETS)
ONE_PARAMETER = 1  # every bucket is full with its first


class Case(NamedTuple):
    """A layout of the model."""

    size: int = 2
    tp: int = 1
    pp: int = 1
    cp: int = 1
    vpp: int = 1
    tied: bool = False
    distributed_optimizer: bool = True


CASES = {
    "dp2, tied": Case(tied=True),
    "dp2, plain optimizer, tied": Case(tied=True, distributed_optimizer=False),
    "tp2 dp2": Case(4, tp=2),
    "pp2 dp2, tied": Case(4, pp=2, tied=True),
    "pp2 vpp2 cp2, tied": Case(4, pp=2, vpp=2, cp=2, tied=True),
}


class Run(NamedTuple):
    """What a rank saw of some steps; `early` are the token_rm's weights before it settled."""

    policy: list[tuple[float, float]]
    logprobs: list[torch.Tensor]
    token_rm: list[tuple[float, float]]
    policy_weights: dict[str, torch.Tensor]
    early: list[torch.Tensor]
    token_rm_weights: dict[str, torch.Tensor]


def train(folder: Path, case: Case, *, overlap: bool) -> Run:
    """Steps policy and token_rm over several micro-batches; collective over the world."""
    optimizer = OptimizerConfig(lr=LEARNING_RATE, eps=1e-5)  # above the rounding of a gradient
    config = make_config(
        folder, distributed_optimizer=case.distributed_optimizer, optimizer=optimizer
    )
    late = overlap and case.distributed_optimizer
    parallel = replace(
        config.parallel,
        overlap_grad_reduce=overlap,
        overlap_param_gather=late,
        bucket_parameters=ONE_PARAMETER,
    )
    source = open_models(replace(config, parallel=parallel))
    trajectories = make_trajectories()
    batches = [pack(trajectories, budget) for budget in BUDGETS]
    policy, token_rm = make_policy(source), make_token_rm(source)
    tokens = sum(trajectory.response_length for trajectory in trajectories)
    objective = objectives.sft_objective(tokens)
    score_objective = objectives.token_rm_objective(len(trajectories))
    steps = [
        policy.step(batch, objective, LEARNING_RATE, settle=batch is batches[-1])
        for batch in batches
    ]
    scored = [token_rm.step(batch, score_objective, LEARNING_RATE) for batch in batches]
    early = [weight.clone() for weight in token_rm.model.parameters().values()]
    token_rm.model.settle()
    return Run(
        policy=[(step.loss, step.grad_norm) for step in steps],
        logprobs=policy.logprobs(batches[0]).logprobs,
        token_rm=[(step.loss, step.grad_norm) for step in scored],
        policy_weights=whole_weights(source, policy),
        early=early,
        token_rm_weights=whole_weights(source, token_rm),
    )


def both(folder: Path, case: Case) -> tuple[Run, Run]:
    """Trains without and with overlap."""
    return train(folder, case, overlap=False), train(folder, case, overlap=True)


@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_overlap_changes_no_number(ranks: RankPools, tmp_path: Path, case: Case) -> None:
    folder = write_toy(tmp_path / "hf", "qwen2_tied" if case.tied else "qwen2", num_hidden_layers=4)
    layout = {"tp": case.tp, "pp": case.pp, "cp": case.cp, "vpp": case.vpp}
    for plain, late in ranks(case.size).run(both, folder, case, **layout):
        for got, want in ((late.policy, plain.policy), (late.token_rm, plain.token_rm)):
            for step, expected in zip(got, want, strict=True):
                assert step == pytest.approx(expected, rel=1e-6)
            assert got[-1][0] < got[0][0]
        torch.testing.assert_close(late.logprobs, plain.logprobs, rtol=0, atol=1e-5)
        for mine, others in (
            (late.policy_weights, plain.policy_weights),
            (late.token_rm_weights, plain.token_rm_weights),
        ):
            torch.testing.assert_close(mine, others, rtol=0, atol=0.02 * LEARNING_RATE * STEPS)
        # The others' share is left to the next pass: else nothing had to be waited for.
        behind = [float((a - b).abs().max()) for a, b in zip(late.early, plain.early, strict=True)]
        assert (max(behind) > 0.5 * LEARNING_RATE) == case.distributed_optimizer
