"""The quickstart, shrunk, under a real Slurm: asked to stop, cancelled, requeued, ended."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_oreal.monitor.metrics import read_metrics
from tests.integration import slurm, toy
from tests.integration.commands import ROOT, run
from tests.integration.conftest import FineTuning

ITERATIONS = 2
DEADLINE_S = 300.0
SMALL = ("--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=0", "--cpus-per-task=1")
SCRIPT = "examples/oreal_7b/run.sbatch"
SCRIPTS = (SCRIPT, "examples/oreal_32b/run.sbatch", "examples/oreal_32b/run_with_judge.sbatch")
SCRIPTS += ("examples/judge/run.sbatch",)


@pytest.mark.parametrize("script", SCRIPTS)
def test_outside_slurm_one_line_says_how(script: str, tmp_path: Path) -> None:
    finished = run(["bash", script])
    (line,) = finished.stderr.splitlines()
    assert finished.status != 0
    assert f"not inside a job, submit it: sbatch {script} " in line
    elsewhere = run(["bash", f"{ROOT}/{SCRIPT}"], {"SLURM_SUBMIT_DIR": str(tmp_path)})
    assert elsewhere.stderr == f"{tmp_path}: submit from the repository's root\n"
    assert elsewhere.status != 0


class Job:
    """A submitted job and what it has written."""

    def __init__(self, cluster: slurm.Slurm, folder: Path, number: str) -> None:
        self.cluster, self.folder, self.number = cluster, folder, number

    def log(self, name: str) -> str:
        """One of its logs; `job.out` is the batch script's own."""
        path = self.folder / name
        path = path if path.exists() else self.folder / "logs" / self.number / name
        return path.read_text() if path.exists() else ""

    def shown(self) -> dict[str, str]:
        return self.cluster.job(self.number)

    def state(self) -> tuple[str, str]:
        """Its state, and how often it was requeued."""
        found = self.shown()
        return found["JobState"], found["Restarts"]

    def wait(self, until: Callable[[], bool]) -> None:
        deadline = time.monotonic() + DEADLINE_S
        while not until():
            said = self.log("job.out") + self.log("all.log")
            assert time.monotonic() < deadline, said + self.cluster.logs()
            time.sleep(0.5)


def submit(cluster: slurm.Slurm, folder: Path, *settings: str) -> Job:
    variables = {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}",
        "CONFIG": "examples/quickstart/oreal.yaml",
        "MASTER_ADDR": "127.0.0.1",  # both nodes are this machine
        "LOGS": str(folder / "logs"),
        "NODE_CACHE": str(folder / "cache"),
    }
    command = ("sbatch", "--parsable", f"--output={folder}/job.out", *SMALL, SCRIPT)
    variables |= dict(zip(("MODEL", "DATA"), settings[:2], strict=True))
    return Job(cluster, folder, cluster.ask(*command, *settings[2:], more=variables).strip())


@pytest.mark.vllm
@pytest.mark.skipif(bool(slurm.why_not()), reason=slurm.why_not())
@pytest.mark.timeout(900)
def test_a_job_is_stopped_cancelled_requeued_and_ends_right(
    root: Path, fine_tuning: FineTuning, tmp_path: Path
) -> None:
    run_folder = root / "slurm"
    settings = toy.settings(
        root,
        run_folder.name,
        fine_tuning.model,
        monitor__wandb="disabled",
        schedule__iterations=ITERATIONS,
        schedule__freeze_iterations=1,
        evaluation__at_start="false",
        evaluation__at_end="false",
        parallel__tensor=2,
    )
    folder = tmp_path / "slurm"
    folder.mkdir()
    with slurm.cluster(folder) as cluster:
        data = str(root / "questions.jsonl")
        job = submit(cluster, tmp_path, str(fine_tuning.model), data, *settings)
        job.wait(lambda: "weights reach the engines" in job.log("rank_0.log"))
        # What Slurm does by itself ten minutes before the time limit.
        cluster.ask("scancel", "--signal=USR1", "--batch", job.number)
        job.wait(lambda: job.state() == ("RUNNING", "1"))
        cluster.ask("scancel", job.number)
        job.wait(lambda: job.state() == ("CANCELLED", "1"))
        cluster.ask("scontrol", "requeue", job.number)
        ended = ("COMPLETED", "FAILED", "TIMEOUT", "NODE_FAIL")
        job.wait(lambda: job.state()[0] in ended)
        found = job.shown()
    said = job.log("job.out") + job.log("all.log")
    assert (found["JobState"], found["ExitCode"], found["Restarts"]) == ("COMPLETED", "0:0", "2"), (
        said
    )
    assert "ended with status 75" in said
    assert "cancelled" in said
    first, merged = job.log("rank_0.log"), job.log("all.log").splitlines()
    assert "stopped by a signal after" in first
    assert "resumed from" in first
    # The merged view has the lines of every rank, each with its number.
    ours = [line.removeprefix("0: ") for line in merged if line.startswith("0: ")]
    assert [line for line in first.splitlines() if line.startswith("train ")] == [
        line for line in ours if line.startswith("train ")
    ]
    assert any(line.startswith("1: ") for line in merged)
    done = [line["iteration"] for line in read_metrics(run_folder / "metrics.jsonl")]
    assert done == list(range(ITERATIONS))
    assert (run_folder / "hf" / "final" / "model.safetensors").exists()
