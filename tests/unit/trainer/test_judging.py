from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from megatron_oreal.config.schema import VerifierConfig
from megatron_oreal.trainer.judging import Judging
from megatron_oreal.types import Prompt, Rollout, RolloutGroup
from megatron_oreal.verify.cascade import Verifier

CONFIG = VerifierConfig(default="exact", cpu_deadline_s=20.0, wall_deadline_s=60.0)


@pytest.fixture(scope="module")
def verifier() -> Iterator[Verifier]:
    with Verifier(CONFIG) as made:
        yield made


def group(gold: str, *texts: str, stopped: bool = True) -> RolloutGroup:
    prompt = Prompt("q", "", gold, (1,))
    return RolloutGroup(prompt, tuple(Rollout((2,), (0.0,), text, stopped) for text in texts))


def groups() -> list[RolloutGroup]:
    return [
        group("4", r"\boxed{4}", r"\boxed{5}"),
        group("5", r"\boxed{4}", "no box"),
        group("5", r"\boxed{5}", r"\boxed{6}", stopped=False),
    ]


@pytest.mark.usefixtures("world_of_one")
@pytest.mark.parametrize("streamed", [(), (0, 1, 2, 3, 4, 5), (4, 1)])
def test_each_answer_keeps_its_place_and_meets_its_own_gold(
    verifier: Verifier, streamed: tuple[int, ...]
) -> None:
    asked = groups()
    rollouts = [rollout for one in asked for rollout in one.rollouts]
    judging = Judging(verifier, [one.prompt for one in asked], 2)
    for index in streamed:
        judging.take(index, rollouts[index])
    told: list[int] = []
    judged = judging.judge(asked, told.append)
    assert [[(str(v.outcome), v.by, v.extracted) for v in g.verdicts] for g in judged] == [
        [("correct", "rule", "4"), ("incorrect", "rule", "5")],
        [("incorrect", "rule", "4"), ("incorrect", "format", None)],
        [("incorrect", "format", None), ("incorrect", "format", None)],
    ]
    assert [(g.prompt, g.rollouts) for g in judged] == [(g.prompt, g.rollouts) for g in asked]
    assert sum(told) == 6


@pytest.mark.usefixtures("world_of_one")
def test_what_is_judged_before_the_last_response_is_told(verifier: Verifier) -> None:
    asked = groups()
    judging = Judging(verifier, [one.prompt for one in asked], 2)
    assert judging.longest_wait_s == 6 * CONFIG.wall_deadline_s
    for index, rollout in enumerate(asked[0].rollouts):
        judging.take(index, rollout)
    end = time.monotonic() + 60.0
    while judging.longest_wait_s > 4 * CONFIG.wall_deadline_s:
        assert time.monotonic() < end
        time.sleep(0.01)
    judging.judge(asked)
    assert judging.metrics["throughput/judged_early_share"] == pytest.approx(2 / 6)
    assert 0.0 < judging.metrics["time/last_verdict_wait_s"] < 60.0


@pytest.mark.usefixtures("world_of_one")
def test_nothing_to_judge(verifier: Verifier) -> None:
    assert Judging(verifier, [], 2).judge([]) == []
