"""A toy training under a real Slurm: two nodes of one rank, stopped, requeued by itself, ended."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_oreal.monitor.metrics import read_metrics
from tests.integration import slurm, toy
from tests.integration.commands import ROOT
from tests.integration.conftest import FineTuning

ITERATIONS = 6
DEADLINE_S = 240.0
SCRIPT = """\
#!/usr/bin/env bash
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --signal=B:USR1@600
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail
source examples/slurm/launch.sh
launch train "$@"
"""


def wait(until: Callable[[], bool], cluster: slurm.Slurm, output: Path) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not until():
        said = output.read_text() if output.exists() else ""
        assert time.monotonic() < deadline, said + cluster.logs()
        time.sleep(0.5)


@pytest.mark.vllm
@pytest.mark.skipif(bool(slurm.why_not()), reason=slurm.why_not())
@pytest.mark.timeout(600)
def test_a_job_that_is_asked_to_stop_requeues_itself_and_ends(
    root: Path, fine_tuning: FineTuning, tmp_path: Path
) -> None:
    run, output = root / "slurm", tmp_path / "job.out"
    script = tmp_path / "run.sbatch"
    script.write_text(SCRIPT)
    settings = toy.settings(
        root,
        run.name,
        fine_tuning.model,
        monitor__wandb="disabled",
        schedule__iterations=ITERATIONS,
        schedule__freeze_iterations=1,
        parallel__tensor=2,
    )
    folder = tmp_path / "slurm"
    folder.mkdir()
    variables = {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}",
        "MASTER_ADDR": "127.0.0.1",  # both nodes are this machine
        "LOGS": str(tmp_path / "logs"),
        "NODE_CACHE": str(tmp_path / "cache"),
    }
    with slurm.cluster(folder) as cluster:
        command = ("sbatch", "--parsable", f"--output={output}", str(script))
        job = cluster.ask(*command, *settings, more=variables).strip()
        metrics = run / "metrics.jsonl"
        wait(lambda: metrics.exists() and bool(metrics.read_bytes()), cluster, output)
        # What Slurm does by itself ten minutes before the time limit.
        cluster.ask("scancel", "--signal=USR1", "--batch", job)
        ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        wait(lambda: cluster.job(job)["JobState"] in ended, cluster, output)
        found = cluster.job(job)
    logs = tmp_path / "logs" / job
    first, second = ((logs / f"rank_{rank}.log").read_text() for rank in range(2))
    said = output.read_text() + first + second
    assert (found["JobState"], found["ExitCode"], found["Restarts"]) == ("COMPLETED", "0:0", "1"), (
        said
    )
    assert "ended with status 75" in said
    assert "stopped by a signal after" in first
    assert "resumed from" in first
    done = [line["iteration"] for line in read_metrics(metrics)]
    assert done == list(range(ITERATIONS))
    assert (run / "hf" / "final" / "model.safetensors").exists()
