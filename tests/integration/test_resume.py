"""Runs that are killed or stopped and started again leave what a run that never stopped leaves."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
from safetensors.torch import load_file

from megatron_oreal.monitor.metrics import MEASURED, read_metrics
from tests.integration import toy
from tests.integration.commands import COMMAND, Finished, run, started, torchrun
from tests.integration.conftest import FineTuning

DEADLINE_S = 200.0
STOPPED_EXIT = 75


def command(ranks: int, *arguments: str) -> list[str]:
    return torchrun(ranks, *arguments) if ranks > 1 else [sys.executable, *COMMAND, *arguments]


def interrupt(
    line: Sequence[str], folder: Path, lines: int, number: signal.Signals
) -> tuple[int, str]:
    """Starts a command, signals it once it has written so many lines, and waits for its end."""
    metrics = folder / "metrics.jsonl"
    with started(line) as process:
        wait_for_lines(process, metrics, lines)
        if number == signal.SIGKILL:
            return -signal.SIGKILL, ""  # leaving the block kills the whole group
        process.send_signal(number)
        stdout, _ = process.communicate(timeout=DEADLINE_S)
    return process.returncode, stdout


def wait_for_lines(process: subprocess.Popen[str], metrics: Path, lines: int) -> None:
    """Waits until a run has written so many lines."""
    deadline = time.monotonic() + DEADLINE_S
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < lines:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def exact_metrics(folder: Path) -> list[dict[str, Any]]:
    """All lines as they stand, without what a clock says."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert lines == read_metrics(folder / "metrics.jsonl")
    return [
        {name: value for name, value in line.items() if not name.startswith(MEASURED)}
        for line in lines
    ]


def assert_same_run(got: Path, want: Path) -> None:
    assert exact_metrics(got) == exact_metrics(want)
    ours, theirs = (load_file(f / "hf" / "final" / "model.safetensors") for f in (got, want))
    assert ours.keys() == theirs.keys()
    assert all(ours[name].equal(theirs[name]) for name in ours)


def finish(line: Sequence[str]) -> Finished:
    finished = run(line)
    assert finished.status == 0, finished.stderr
    return finished


def summary(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text())


@pytest.fixture(scope="module")
def resumed_sft(root: Path, fine_tuning: FineTuning) -> list[str]:
    """Killed before its first checkpoint, then stopped, then resumed to its end."""
    settings = {"monitor__wandb": "disabled", "engine__tokens_per_micro_batch": 1024}
    broken = root / "sft-broken"
    line = command(1, "sft", *toy.settings(root, broken.name, **settings))
    interrupt(line, broken, 2, signal.SIGKILL)
    status, said = interrupt(line, broken, 9, signal.SIGTERM)
    assert status == STOPPED_EXIT
    assert "stopped by a signal after" in said
    assert "resumed from" in finish(line).stdout
    return line


def test_fine_tuning_goes_on(root: Path, fine_tuning: FineTuning, resumed_sft: list[str]) -> None:
    assert_same_run(root / "sft-broken", fine_tuning.folder)


@pytest.mark.slow
def test_a_finished_run_ends_the_same_way_again(
    root: Path, fine_tuning: FineTuning, resumed_sft: list[str]
) -> None:
    finish(resumed_sft)
    assert_same_run(root / "sft-broken", fine_tuning.folder)


def training_settings(root: Path, name: str, model: Path, **more: Any) -> list[str]:
    return toy.settings(
        root,
        name,
        model,
        run__seed=7,
        monitor__wandb="disabled",
        schedule__iterations=5,
        schedule__freeze_iterations=1,
        evaluation__at_start="true",
        evaluation__at_end="true",
        evaluation__every=2,
        checkpoint__every=2,
        **more,
    )


def check_training(root: Path, model: Path, ranks: int, **more: Any) -> None:
    """Killed in the fourth iteration and resumed to the end, against a run that never stopped."""
    whole, broken = root / f"whole-{ranks}", root / f"broken-{ranks}"
    finish(command(ranks, "train", *training_settings(root, whole.name, model, **more)))
    line = command(ranks, "train", *training_settings(root, broken.name, model, **more))
    # Lines: the evaluation at the start, two iterations, an evaluation, the third iteration.
    interrupt(line, broken, 5, signal.SIGKILL)
    # The third iteration's line is cut off and comes again.
    assert "checkpoints/iteration_000002" in finish(line).stdout
    assert_same_run(broken, whole)
    for key in ("pass_at_1", "pass_at_8", "greedy"):
        assert summary(broken)[key] == summary(whole)[key]
        assert summary(broken)[key].keys() == {"before", "after"}


@pytest.mark.vllm
def test_a_killed_training_goes_on(root: Path, fine_tuning: FineTuning) -> None:
    check_training(root, fine_tuning.model, 1)


@pytest.fixture(scope="module")
def whole_on_two(root: Path, fine_tuning: FineTuning) -> Path:
    line = training_settings(root, "whole-on-two", fine_tuning.model, parallel__tensor=2)
    finish(command(2, "train", *line))
    return root / "whole-on-two"


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.parametrize("lines", [1, 3, 7], ids=["evaluated", "two iterations", "all iterations"])
def test_two_ranks_go_on_wherever_they_were_killed(
    root: Path, fine_tuning: FineTuning, whole_on_two: Path, lines: int
) -> None:
    broken = root / f"broken-on-two-{lines}"
    settings = training_settings(root, broken.name, fine_tuning.model, parallel__tensor=2)
    line = command(2, "train", *settings)
    interrupt(line, broken, lines, signal.SIGKILL)
    finish(line)
    assert_same_run(broken, whole_on_two)


@pytest.mark.vllm
@pytest.mark.slow
def test_one_rank_asked_to_stop_stops_all(
    root: Path, fine_tuning: FineTuning, whole_on_two: Path
) -> None:
    """Then damage: the checkpoint of the stop is passed over for the one before."""
    broken = root / "stopped-on-two"
    settings = training_settings(root, broken.name, fine_tuning.model, parallel__tensor=2)
    line = command(2, "train", *settings)
    metrics = broken / "metrics.jsonl"
    with started(line) as process:
        # Line 5 is the third iteration's: it is saved after every second, and when asked to.
        wait_for_lines(process, metrics, 4)
        ranks = {
            int(child.environ()["RANK"]): child for child in psutil.Process(process.pid).children()
        }
        ranks[1].send_signal(signal.SIGUSR1)
        stdout, _ = process.communicate(timeout=DEADLINE_S)
    assert "stopped by a signal after 3 iterations" in stdout
    damaged = broken / "checkpoints" / "iteration_000003" / "policy.rank_00001.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    said = finish(line).stdout
    assert "iteration_000003 is damaged, passed over: policy.rank_00001.safetensors has" in said
    assert "resumed from" in said
    assert_same_run(broken, whole_on_two)
