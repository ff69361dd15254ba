"""The alarm of a run in which too many answers stay undecided."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path

import pytest

from megatron_oreal.config.schema import Config, MonitorConfig, RunConfig, VerifierConfig
from megatron_oreal.trainer.journal import Journal
from megatron_oreal.types import Outcome, Prompt, Rollout, RolloutGroup, Verdict


def group(*outcomes: Outcome) -> RolloutGroup:
    return RolloutGroup(
        Prompt("q", "", "5", (1,)),
        tuple(Rollout((2,), (0.0,), "5", stopped=True) for _ in outcomes),
        tuple(Verdict(outcome, "rule", "", "5", 0.0) for outcome in outcomes),
    )


@pytest.mark.usefixtures("world_of_one")
@pytest.mark.parametrize(("threshold", "alarmed"), [(0.2, True), (0.25, False)])
def test_more_undecided_answers_than_allowed_raise_the_alarm(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], threshold: float, alarmed: bool
) -> None:
    config = Config(
        run=RunConfig(folder=str(tmp_path / "run")),
        monitor=MonitorConfig(wandb="disabled"),
        verifier=VerifierConfig(unverified_alarm_share=threshold),
    )
    with closing(Journal(config, 1)) as journal:
        with journal.phase("generate"):
            pass
        journal.groups([group(*[Outcome.CORRECT] * 3, Outcome.UNVERIFIED)])
        journal.write(0)
    line = json.loads((tmp_path / "run" / "metrics.jsonl").read_text())
    assert line["rollout/unverified_share"] == 0.25
    assert line["rollout/unverified_alarm"] == alarmed
    told = "alarm: nobody could decide 25.0% of the answers" in capsys.readouterr().out
    assert told == alarmed
