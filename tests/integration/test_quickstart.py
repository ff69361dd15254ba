"""The quickstart, shrunk: Ctrl-C in each of its stages changes nothing of what it ends with."""

from __future__ import annotations

from pathlib import Path

import pytest

from examples.quickstart import problems
from tests.integration import interrupted_quickstart as quickstart

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

SETTINGS = [
    "sft.epochs=1",
    "sft.sequences_per_step=32",
    "sft.warmup_steps=2",
    "schedule.iterations=4",
    "schedule.freeze_iterations=1",
    "schedule.warmup_iterations=1",
    "data.questions_per_iteration=8",
    "checkpoint.every=3",
]
TIMEOUT_S = 400.0


def make_data(runs: Path) -> Path:
    """What the quickstart finds made already, it takes."""
    sizes = {"held_out": 16, "training": 64, "demonstrations": 320}
    problems.write(runs / "seed_0" / "data", 0, **sizes)
    return runs


@pytest.mark.timeout(1800)
def test_ctrl_c_in_fine_tuning_and_in_training_leaves_the_same_table(tmp_path: Path) -> None:
    alone, broken = make_data(tmp_path / "alone"), make_data(tmp_path / "broken")
    first = quickstart.table(quickstart.finish(alone, 0, SETTINGS, TIMEOUT_S))
    for stage, after_s in (("sft", 0.2), ("oreal", 0.5)):
        quickstart.interrupt(broken, 0, SETTINGS, stage=stage, after_s=after_s, timeout_s=TIMEOUT_S)
    second = quickstart.table(quickstart.finish(broken, 0, SETTINGS, TIMEOUT_S))
    quickstart.compare(alone, broken, 0, (first, second))
