"""Killing one rank of a running training ends them all, with whatever they had started.

The console says which it was, and nothing of what that does to the others.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.integration import toy
from tests.integration.commands import started, torchrun

pytestmark = pytest.mark.vllm

START_DEADLINE_S = 200.0
END_DEADLINE_S = 60.0


def wait_for(condition: Callable[[], bool], deadline_s: float) -> bool:
    """Whether the condition came true in time."""
    deadline = time.monotonic() + deadline_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True


def ranks_of(launcher: psutil.Process) -> dict[int, psutil.Process]:
    return {int(process.environ()["RANK"]): process for process in launcher.children()}


def test_a_killed_rank_ends_the_run(root: Path) -> None:
    """The untrained policy goes through trivial batches, far more of them than there is time."""
    settings = toy.settings(
        root,
        "killed",
        parallel__tensor=2,
        schedule__iterations=100_000,
        monitor__wandb="disabled",
        monitor__transcripts_per_iteration=0,
    )
    metrics = root / "killed" / "metrics.jsonl"
    with started(torchrun(2, "train", *settings)) as command:
        runs = wait_for(
            lambda: command.poll() is not None or (metrics.exists() and metrics.stat().st_size > 0),
            START_DEADLINE_S,
        )
        assert runs
        assert command.poll() is None, command.communicate()[1]
        launcher = psutil.Process(command.pid)
        ranks = ranks_of(launcher)
        everything = launcher.children(recursive=True)
        workers = [p for p in everything if "megatron_oreal.verify.worker" in p.cmdline()]
        assert sorted(ranks) == [0, 1]
        assert {worker.ppid() for worker in workers} == {rank.pid for rank in ranks.values()}

        ranks[1].send_signal(signal.SIGKILL)
        assert wait_for(lambda: command.poll() is not None, END_DEADLINE_S)
        assert command.returncode != 0
        _, alive = psutil.wait_procs(everything, timeout=5.0)
        assert not alive
        _, console = command.communicate()
    said = [line for line in console.splitlines() if line.startswith("megatron-oreal: ")]
    # torchrun may ask the other rank to stop before that has seen what happened.
    said = [line for line in said if "asked to stop" not in line]
    assert len(said) == 2, console
    assert f"rank 1 (pid {ranks[1].pid} on " in said[0]
    assert "is gone without a word" in said[0]
    assert "Connection closed" not in console
