"""Verdicts on two ranks: each answer judged once, on the rank that was told it or else on any."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from megatron_oreal.config.schema import VerifierConfig
from megatron_oreal.parallel.collectives import world_rank
from megatron_oreal.trainer.judging import Judging
from megatron_oreal.types import Prompt, Rollout, RolloutGroup
from megatron_oreal.verify.cascade import Verifier

if TYPE_CHECKING:
    from tests.ranks import RankPools

pytestmark = pytest.mark.parallel

STREAMED = {0: [0, 3, 4], 1: [1]}  # by rank; 2 and 5 by no engine


def judge() -> tuple[list[list[str]], int, float]:
    prompts = [Prompt(str(i), "", str(i), (1,)) for i in range(3)]
    texts = [(rf"\boxed{{{i}}}", rf"\boxed{{{i - 1}}}") for i in range(3)]
    groups = [
        RolloutGroup(prompt, tuple(Rollout((2,), (0.0,), text, stopped=True) for text in pair))
        for prompt, pair in zip(prompts, texts, strict=True)
    ]
    with Verifier(VerifierConfig(default="exact", wall_deadline_s=60.0)) as verifier:
        judging = Judging(verifier, prompts, 2)
        for index in STREAMED[world_rank()]:
            judging.take(index, groups[index // 2].rollouts[index % 2])
        advanced: list[int] = []
        judged = judging.judge(groups, advanced.append)
    outcomes = [[verdict.outcome.value for verdict in group.verdicts] for group in judged]
    return outcomes, sum(advanced), judging.metrics["time/last_verdict_wait_s"]


def test_both_ranks_hold_the_same_verdicts_and_the_longest_wait(ranks: RankPools) -> None:
    first, second = ranks(2).run(judge)
    assert first == second
    assert first[:2] == ([["correct", "incorrect"]] * 3, 6)
