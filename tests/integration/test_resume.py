"""Runs that are stopped, or die early, and go on leave what a run that never stopped leaves."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest

from tests.integration import toy
from tests.integration.breaking import RANKS, assert_same_run, settings
from tests.integration.commands import COMMAND, Finished, run, started, torchrun
from tests.integration.conftest import FineTuning

DEADLINE_S = 200.0
INTERRUPTED_EXIT, STOPPED_EXIT = 130, 75


def interrupt(
    line: Sequence[str], folder: Path, lines: int, number: signal.Signals
) -> tuple[int, str]:
    """Starts a command, signals it once it has written so many lines, and waits for its end."""
    metrics = folder / "metrics.jsonl"
    with started(line) as process:
        wait_for_lines(process, metrics, lines)
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


def finish(line: Sequence[str]) -> Finished:
    finished = run(line)
    assert finished.status == 0, finished.stderr
    return finished


@pytest.fixture(scope="module")
def resumed_sft(root: Path, fine_tuning: FineTuning) -> list[str]:
    """Interrupted before its first checkpoint, then stopped, then resumed to its end."""
    chosen = {"monitor__wandb": "disabled", "engine__tokens_per_micro_batch": 1024}
    broken = root / "sft-broken"
    line = [sys.executable, *COMMAND, "sft", *toy.settings(root, broken.name, **chosen)]
    status, _ = interrupt(line, broken, 2, signal.SIGINT)
    assert status == INTERRUPTED_EXIT
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


@pytest.mark.vllm
@pytest.mark.slow
def test_one_rank_asked_to_stop_stops_all(
    root: Path, fine_tuning: FineTuning, unbroken: Path
) -> None:
    """Then damage: the checkpoint of the stop is passed over for the one before."""
    broken = root / "stopped"
    line = torchrun(RANKS, "train", *settings(root, broken.name, fine_tuning.model))
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
    assert_same_run(broken, unbroken)
