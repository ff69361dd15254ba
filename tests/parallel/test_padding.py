"""What FP8, sequence and context parallelism pad a micro-batch with changes no number."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from megatron_oreal.algorithm import objectives
from megatron_oreal.config.schema import OptimizerConfig
from megatron_oreal.config.schema_precision import TOKEN_MULTIPLE
from megatron_oreal.engine.micro_batch import lay_out
from tests.ranks import RankPools
from tests.toy_models import (
    TIGHT,
    make_config,
    make_policy,
    make_token_rm,
    make_trajectories,
    open_models,
    pack,
    write_toy,
)

pytestmark = pytest.mark.parallel

LEARNING_RATE = 1e-3


class Run(NamedTuple):
    """Two steps, what was scored in each, and the tokens of the first micro-batch on this rank."""

    policy: list[tuple[float, float]]
    logprobs: list[torch.Tensor]
    token_rm: list[tuple[float, float]]
    scores: list[torch.Tensor]
    tokens: int


def train(folder: Path, multiples: tuple[int, ...]) -> list[Run]:
    """Two steps of policy and token_rm for each multiple; collective over the world."""
    optimizer = OptimizerConfig(lr=LEARNING_RATE, eps=1e-5)
    source = open_models(make_config(folder, optimizer=optimizer))
    trajectories = make_trajectories()
    batch = pack(trajectories, TIGHT)
    objective = objectives.sft_objective(sum(t.response_length for t in trajectories))
    score_objective = objectives.token_rm_objective(len(trajectories))
    runs = []
    for multiple in multiples:
        policy, token_rm = make_policy(source), make_token_rm(source)
        for model in (policy.model, token_rm.model):
            model.cut = replace(model.cut, token_multiple=multiple)
        steps = [policy.step(batch, objective, LEARNING_RATE) for _ in range(2)]
        scored = [token_rm.step(batch, score_objective, LEARNING_RATE) for _ in range(2)]
        mine = batch.micro_batches[source.topology.dp_rank][0]
        run = Run(
            policy=[(step.loss, step.grad_norm) for step in steps],
            logprobs=[values for step in steps for values in step.logprobs],
            token_rm=[(step.loss, step.grad_norm) for step in scored],
            scores=[values for step in scored for values in step.scores],
            tokens=len(lay_out(batch, mine, policy.model.cut).tokens),
        )
        runs.append(run)
    return runs


def score_twice(folder: Path) -> list[list[torch.Tensor]]:
    """Scores and steps without and with the pass before it that delayed scaling asks for."""
    source = open_models(make_config(folder, optimizer=OptimizerConfig(lr=LEARNING_RATE)))
    trajectories = make_trajectories()
    batch = pack(trajectories, TIGHT)
    objective = objectives.sft_objective(sum(t.response_length for t in trajectories))
    found = []
    for lacks_scales in (False, True):
        policy = make_policy(source)
        policy.model.lacks_scales = lacks_scales
        step = policy.step(batch, objective, LEARNING_RATE)
        policy.model.lacks_scales = lacks_scales
        found.append([*step.logprobs, *policy.logprobs(batch).logprobs])
        assert not policy.model.lacks_scales
    return found


def test_a_pass_for_scales_changes_nothing_else(ranks: RankPools, tmp_path: Path) -> None:
    folder = write_toy(tmp_path / "hf", "qwen2")
    for plain, scaled in ranks(2).run(score_twice, folder, pp=2):
        assert all(torch.equal(*pair) for pair in zip(plain, scaled, strict=True))


def test_padding_changes_no_number(ranks: RankPools, tmp_path: Path) -> None:
    folder = write_toy(tmp_path / "hf", "qwen2")
    multiples = (1, TOKEN_MULTIPLE["mxfp8"])
    for plain, *padded in ranks(4).run(train, folder, multiples, tp=2, cp=2):
        for run, multiple in zip(padded, multiples[1:], strict=True):
            each = 2 * multiple  # a tensor-parallel rank has its half of these
            assert run.tokens % each == 0 < run.tokens - plain.tokens
            for got, want in ((run.policy, plain.policy), (run.token_rm, plain.token_rm)):
                for step, expected in zip(got, want, strict=True):
                    assert step == pytest.approx(expected, rel=1e-5)
            torch.testing.assert_close(run.logprobs, plain.logprobs, rtol=0, atol=1e-5)
            torch.testing.assert_close(run.scores, plain.scores, rtol=0, atol=1e-5)
