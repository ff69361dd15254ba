"""Runs that are killed or stopped and started again leave what a run that never stopped leaves."""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from megatron_oreal.monitor.metrics import read_metrics
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
        deadline = time.monotonic() + DEADLINE_S
        while not metrics.exists() or metrics.read_bytes().count(b"\n") < lines:
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.02)
        if number == signal.SIGKILL:
            return -signal.SIGKILL, ""  # leaving the block kills the whole group
        process.send_signal(number)
        stdout, _ = process.communicate(timeout=DEADLINE_S)
    return process.returncode, stdout


def exact_metrics(folder: Path) -> list[dict[str, Any]]:
    """All lines as they stand, without what a clock says."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert lines == read_metrics(folder / "metrics.jsonl")
    clocks = ("time/", "throughput/")
    return [
        {name: value for name, value in line.items() if not name.startswith(clocks)}
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
def sft_settings(root: Path) -> dict[str, Any]:
    return {
        "monitor__wandb": "disabled",
        "engine__tokens_per_micro_batch": 1024,
        "checkpoint__every": 4,
    }


def test_fine_tuning_goes_on(root: Path, sft_settings: dict[str, Any]) -> None:
    """Killed before its first checkpoint, then stopped, against a run that never stopped."""
    whole, broken = root / "sft-whole", root / "sft-broken"
    finish(command(1, "sft", *toy.settings(root, whole.name, **sft_settings)))
    line = command(1, "sft", *toy.settings(root, broken.name, **sft_settings))
    interrupt(line, broken, 2, signal.SIGKILL)
    status, said = interrupt(line, broken, 9, signal.SIGTERM)
    assert status == STOPPED_EXIT
    assert "stopped by a signal after" in said
    assert "resumed from" in finish(line).stdout
    assert_same_run(broken, whole)


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
    """Killed in the fourth iteration, resumed and asked to stop, then resumed to the end."""
    whole, broken = root / f"whole-{ranks}", root / f"broken-{ranks}"
    finish(command(ranks, "train", *training_settings(root, whole.name, model, **more)))
    line = command(ranks, "train", *training_settings(root, broken.name, model, **more))
    # Lines: the evaluation at the start, two iterations, an evaluation, the third iteration.
    interrupt(line, broken, 5, signal.SIGKILL)
    if ranks == 1:
        # The third iteration's line is cut off and comes again.
        finished = finish(line)
        assert "iteration_000002" in finished.stdout
    else:
        assert "iteration_000002" in finish(line).stdout
    assert_same_run(broken, whole)
    for key in ("pass_at_1", "pass_at_8", "greedy"):
        assert summary(broken)[key] == summary(whole)[key]
        assert summary(broken)[key].keys() == {"before", "after"}


@pytest.mark.vllm
def test_a_killed_training_goes_on(root: Path, fine_tuning: FineTuning) -> None:
    check_training(root, fine_tuning.model, 1)
