from __future__ import annotations

import pytest

from megatron_oreal.config.schema import VerifierConfig
from megatron_oreal.trainer.judging import judge_groups
from megatron_oreal.types import Prompt, Rollout, RolloutGroup
from megatron_oreal.verify.cascade import Verifier


def group(gold: str, *texts: str, stopped: bool = True) -> RolloutGroup:
    prompt = Prompt("q", "", gold, (1,))
    return RolloutGroup(prompt, tuple(Rollout((2,), (0.0,), text, stopped) for text in texts))


@pytest.mark.usefixtures("world_of_one")
def test_each_answer_keeps_its_place_and_meets_its_own_gold():
    groups = [
        group("4", r"\boxed{4}", r"\boxed{5}", "no box"),
        group("5", r"\boxed{4}", r"\boxed{5}"),
        group("5", r"\boxed{5}", stopped=False),
    ]
    told: list[int] = []
    with Verifier(VerifierConfig(cpu_deadline_s=20.0, wall_deadline_s=60.0)) as verifier:
        judged = judge_groups(verifier, groups, told.append)
        assert judge_groups(verifier, []) == []
    assert [[str(v.outcome) for v in g.verdicts] for g in judged] == [
        ["correct", "incorrect", "incorrect"],
        ["incorrect", "correct"],
        ["incorrect"],
    ]
    assert [[v.by for v in g.verdicts] for g in judged] == [
        ["rule", "rule", "format"],
        ["rule", "rule"],
        ["format"],
    ]
    assert [[v.extracted for v in g.verdicts] for g in judged] == [
        ["4", "5", None],
        ["4", "5"],
        [None],
    ]
    assert [(g.prompt, g.rollouts) for g in judged] == [(g.prompt, g.rollouts) for g in groups]
    assert told[-1] == 6
