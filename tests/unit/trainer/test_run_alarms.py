"""What a run does about its alarms: refuse a step, end, say and write."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest
import torch

from megatron_oreal.config.errors import UserError
from megatron_oreal.config.schema import Config, MonitorConfig, RunConfig, VerifierConfig
from megatron_oreal.config.schema_health import AlarmsConfig
from megatron_oreal.engine.roles import PolicyStep
from megatron_oreal.trainer.journal import Journal
from megatron_oreal.trainer.run_alarms import RunAlarms
from megatron_oreal.trainer.skipped_steps import SkippedSteps
from megatron_oreal.types import (
    Outcome,
    PackedBatch,
    Prompt,
    Rollout,
    RolloutGroup,
    Trajectory,
    Verdict,
)

NAN = float("nan")
Open = Callable[..., RunAlarms]


@pytest.fixture
def opened(world_of_one: None, tmp_path: Path) -> Iterator[Open]:
    with ExitStack() as stack:

        def open_alarms(unverified: float = 1.0, **alarms: object) -> RunAlarms:
            config = Config(
                run=RunConfig(folder=str(tmp_path / "run")),
                monitor=MonitorConfig(wandb="disabled"),
                verifier=VerifierConfig(unverified_alarm_share=unverified),
                alarms=AlarmsConfig(**alarms),
            )
            return RunAlarms(stack.enter_context(closing(Journal(config, 1))))

        yield open_alarms


def group(*logprobs: float, outcome: Outcome = Outcome.CORRECT) -> RolloutGroup:
    return RolloutGroup(
        Prompt("q", "", "5", (1,)),
        tuple(Rollout((2,), (value,), "5", stopped=True) for value in logprobs),
        tuple(Verdict(outcome, "rule", "", "5", 0.0) for _ in logprobs),
    )


def lines(alarms: RunAlarms) -> list[tuple[int, str, str]]:
    path = alarms._journal.folder.alarms
    read = map(json.loads, path.read_text().splitlines()) if path.exists() else ()
    return [(line["iteration"], line["event"], line["kind"]) for line in read]


def test_an_engine_without_log_probabilities_is_not_trained_on(opened: Open) -> None:
    alarms = opened()
    alarms.sampled([group(-0.5, -0.25), group(-0.5, NAN)])
    assert alarms.refuse() == "alarm engine_logprobs"
    assert alarms.end_iteration(0)
    alarms.stop(0)
    alarms.sampled([group(-0.5, -0.25)])
    assert alarms.refuse() == ""
    assert not alarms.end_iteration(1)
    assert lines(alarms) == [(0, "began", "engine_logprobs"), (1, "ended", "engine_logprobs")]


def test_a_refusal_for_an_alarm_is_no_number_that_is_not_finite(opened: Open) -> None:
    alarms = opened()
    skipped = SkippedSteps(most=9)
    alarms.sampled([group(NAN)])
    skipped.took("token_rm", PolicyStep([], [], 0.0, 0.0, alarms.refuse()))
    assert alarms.end_iteration(0, skipped)
    skipped.end_iteration(0)
    alarms.sampled([group(-1.0)])
    skipped.took("policy", PolicyStep([], [], 0.0, 0.0, "loss not finite"))
    assert alarms.end_iteration(1, skipped)
    assert lines(alarms) == [
        (0, "began", "engine_logprobs"),
        (1, "ended", "engine_logprobs"),
        (1, "began", "not_finite"),
    ]


def test_a_policy_beyond_its_bounds_is_not_stepped(opened: Open) -> None:
    alarms = opened(iterations=1, on_mismatch="skip", on_entropy="skip", max_mismatch=0.25)
    trajectory = Trajectory(
        prompt_id="q",
        tokens=(1, 2, 3),
        prompt_length=1,
        reward=1.0,
        advantage=1.0,
        rollout_logprobs=(-0.5, -0.5),
    )
    refuse = alarms.refuse_policy(PackedBatch((trajectory,), ()))
    for logprob, entropy, why in (
        (-0.75, 0.5, ""),
        (-1.0, 0.5, "alarm mismatch"),
        (-0.5, 0.001, "alarm entropy"),
        (-1.0, 0.0, "alarm entropy and mismatch"),
    ):
        two = torch.ones(2)
        assert refuse({"logprobs": [logprob * two], "entropy": [entropy * two]}) == why


def test_a_collapse_ends_the_run_once_it_lasted(opened: Open) -> None:
    alarms = opened(iterations=2, on_pass_rate="stop", min_pass_rate=0.5)
    for iteration in range(2):
        alarms._journal.groups([group(-1.0, outcome=Outcome.INCORRECT)])
        alarms.end_iteration(iteration)
        if iteration == 0:
            alarms.stop(iteration)
    with pytest.raises(UserError) as error:
        alarms.stop(1)
    told = str(error.value)
    assert "iteration 1 ends the run: pass_rate 0, bound 0.5 (alarms.min_pass_rate)" in told
    assert "\n" not in told


@pytest.mark.parametrize(("threshold", "alarmed"), [(0.2, True), (0.25, False)])
def test_more_undecided_answers_than_allowed_raise_the_alarm(
    opened: Open, capsys: pytest.CaptureFixture[str], threshold: float, alarmed: bool
) -> None:
    alarms = opened(unverified=threshold)
    unknown = group(-1.0, outcome=Outcome.UNVERIFIED)
    alarms._journal.groups([group(-1.0, -1.0, -1.0), unknown])
    assert alarms.end_iteration(0) == alarmed
    assert alarms._journal.metrics["rollout/unverified_share"] == 0.25
    assert alarms._journal.metrics["rollout/unverified_alarm"] == alarmed
    told = "alarm at iteration 0: unverified 0.25 above 0.2 (verifier.unverified_alarm_share)"
    assert (told in capsys.readouterr().out) == alarmed
