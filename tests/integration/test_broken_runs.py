"""A run that breaks again and again, and goes on, leaves what one leaves that never broke.

`kill_matrix.py` breaks it at every phase.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.integration import breaking
from tests.integration.broken_program import FAULT, SAVE_BEFORE, Break
from tests.integration.commands import Finished
from tests.integration.conftest import FineTuning

pytestmark = pytest.mark.vllm

# With saves after every second iteration, in the order in which they come.
ENGINE_FAULT = Break("generate", iteration=1, rank=1, responses=9)
KILLED_POLICY = Break("policy", iteration=2, delay_s=0.01, rank=1)
KILLED_SAVE = Break(SAVE_BEFORE, iteration=3, delay_s=0.005)
KILLED_VERIFY = Break("verify", iteration=4)
BREAKS = (ENGINE_FAULT, KILLED_POLICY, KILLED_SAVE, KILLED_VERIFY)


@dataclass(frozen=True)
class BrokenRun:
    """What each start said, and what is left; beside that of an unbroken run."""

    folder: Path
    unbroken: Path
    broken: dict[Break, Finished]
    resumed: dict[Break, Finished]
    """The start after a break."""


@pytest.fixture(scope="module")
def run(root: Path, fine_tuning: FineTuning, unbroken: Path) -> BrokenRun:
    folder = root / "broken-again"
    line = breaking.settings(root, folder.name, fine_tuning.model)
    starts = [breaking.break_run(line, plan) for plan in BREAKS]
    starts.append(breaking.finish_run(line))
    return BrokenRun(
        folder,
        unbroken,
        dict(zip(BREAKS, starts, strict=False)),
        dict(zip(BREAKS, starts[1:], strict=True)),
    )


def test_metrics_and_final_weights_are_those_of_a_run_that_never_broke(run: BrokenRun) -> None:
    breaking.assert_same_run(run.folder, run.unbroken)


def test_so_are_the_evaluations(run: BrokenRun) -> None:
    ours, theirs = (
        json.loads((folder / "summary.json").read_text()) for folder in (run.folder, run.unbroken)
    )
    for key in ("pass_at_1", "pass_at_8", "greedy"):
        assert ours[key] == theirs[key]
        assert ours[key].keys() == {"before", "after"}


def test_an_error_of_the_engine_ends_the_run_with_it_shown_once(run: BrokenRun) -> None:
    finished = run.broken[ENGINE_FAULT]
    assert finished.status == 1
    assert finished.stderr.count(f"\n{FAULT}\n") == 1
    (line,) = (line for line in finished.lines() if "failed in" in line)
    assert f"rank 1 failed in generate of 1: {FAULT}" in line


def banked(finished: Finished, iteration: int) -> tuple[int, int]:
    """How many responses and verdicts a start found in the bank for an iteration."""
    said = rf"iteration {iteration}: (\d+) of 64 responses and (\d+) verdicts are in the bank"
    match = re.search(said, finished.stdout)
    assert match, finished.stdout
    return int(match[1]), int(match[2])


def test_only_what_is_missing_is_sampled_and_judged_again(run: BrokenRun) -> None:
    responses, verdicts = banked(run.resumed[ENGINE_FAULT], 1)
    assert ENGINE_FAULT.responses <= responses < 64
    assert verdicts <= responses
    assert banked(run.resumed[KILLED_POLICY], 2) == (64, 64)
    assert banked(run.resumed[KILLED_VERIFY], 4) > (0, 0)


def test_a_save_that_was_killed_counts_for_nothing(run: BrokenRun) -> None:
    said = run.resumed[KILLED_SAVE].stdout
    assert "checkpoints/iteration_000002" in said
    assert re.search(r"iteration_000004\S* was never finished, passed over", said)


def test_banks_go_with_the_checkpoints_past_them(run: BrokenRun) -> None:
    assert list((run.folder / "bank").iterdir()) == []


def test_no_bank_is_opened_by_another_policy(run: BrokenRun) -> None:
    """Every message of a bank is of an iteration that the start before it had begun."""
    said: dict[str, Any] = {}
    for plan, finished in run.resumed.items():
        said[plan.phase] = [int(n) for n in re.findall(r"iteration (\d+): \d+ of", finished.stdout)]
    # A checkpoint has its name once the iteration after it is over.
    assert said == {
        "generate": [0, 1],
        "policy": [0, 1, 2],
        SAVE_BEFORE: [2, 3],
        "verify": [2, 3, 4],
    }
