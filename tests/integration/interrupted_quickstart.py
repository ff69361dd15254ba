"""The quickstart, left alone and interrupted by Ctrl-C at random moments, ends with the same table.

`python -m tests.integration.interrupted_quickstart [SEED]` does so with the whole of it, which
takes twice as long as `make quickstart`, into a folder of its own.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from tests.integration.breaking import assert_same_run
from tests.integration.commands import started

INTERRUPTED_EXIT = 130
SCRIPT = "examples/quickstart/run.sh"


def command(runs: Path, seed: int, settings: Sequence[str]) -> list[str]:
    """The quickstart, which says what it says into `runs/said.txt`."""
    # Whatever started this may have had SIGINT ignored, which a shell cannot undo for itself.
    shell = ["env", "--default-signal=INT", "bash", "-c", 'exec bash "${@:2}" > "$1" 2>&1', "-"]
    return [*shell, str(runs / "said.txt"), SCRIPT, str(seed), *settings]


def finish(runs: Path, seed: int, settings: Sequence[str], timeout_s: float) -> str:
    """Runs the quickstart to its end; what it said."""
    runs.mkdir(parents=True, exist_ok=True)
    with started(command(runs, seed, settings), {"RUNS": str(runs)}) as process:
        process.wait(timeout=timeout_s)
    said = (runs / "said.txt").read_text()
    assert process.returncode == 0, said
    return said


def interrupt(
    runs: Path, seed: int, settings: Sequence[str], *, stage: str, after_s: float, timeout_s: float
) -> None:
    """Presses Ctrl-C so many seconds after the first line of metrics of a stage."""
    runs.mkdir(parents=True, exist_ok=True)
    metrics = runs / f"seed_{seed}" / stage / "metrics.jsonl"
    deadline = time.monotonic() + timeout_s
    with started(command(runs, seed, settings), {"RUNS": str(runs)}) as process:
        while not (metrics.exists() and metrics.stat().st_size):
            assert process.poll() is None, f"ended before {stage}"
            assert time.monotonic() < deadline, f"{stage} never began"
            time.sleep(0.05)
        time.sleep(after_s)
        assert process.poll() is None, f"ended before the interruption of {stage}"
        os.killpg(process.pid, signal.SIGINT)
        process.wait(timeout=60)
        assert process.returncode == INTERRUPTED_EXIT


def table(said: str) -> list[str]:
    """The table at the end."""
    lines = said.splitlines()
    (title,) = (n for n, line in enumerate(lines) if "held-out questions x" in line)
    return lines[title:-1]


def compare(left_alone: Path, interrupted: Path, seed: int, tables: Sequence[list[str]]) -> None:
    ours, theirs = (runs / f"seed_{seed}" for runs in (interrupted, left_alone))
    for stage in ("sft", "oreal"):
        assert_same_run(ours / stage, theirs / stage)
    first, second = tables
    assert first == second, "\n".join([*first, *second])


def main(seed: int) -> None:
    console = Console(soft_wrap=True, highlight=False)
    root = Path(tempfile.mkdtemp(prefix="quickstart-"))
    alone, broken = root / "left_alone", root / "interrupted"
    console.print(f"into {root}")
    first = table(finish(alone, seed, [], 7200))
    rng = random.Random()
    for stage in ("sft", "oreal"):
        lines = (alone / f"seed_{seed}" / stage / "metrics.jsonl").read_text().splitlines()
        seconds = sum(json.loads(line).get("time/iteration_s", 0.0) for line in lines)
        after_s = rng.random() * seconds
        console.print(f"Ctrl-C in {stage}, {after_s:.1f} of {seconds:.0f} s after its first line")
        interrupt(broken, seed, [], stage=stage, after_s=after_s, timeout_s=7200)
    second = table(finish(broken, seed, [], 7200))
    console.print("\n".join(second), markup=False)
    compare(alone, broken, seed, (first, second))
    console.print("the same table, the same metrics and weights")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 0)
