"""The commands of docs/first-cluster-run.md, read out of it and run, on a Slurm of this machine."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from megatron_oreal.monitor.metrics import read_metrics
from tests.integration import slurm, toy
from tests.integration.commands import ROOT, run

STEPS = ("3", "4", "5", "6")
# A site's own command: as `sbatch`, but two nodes of one rank, and one of the judge, and it waits.
SBATCH = """\
#!/usr/bin/env bash
small=(--ntasks-per-node=1 --gpus-per-node=0 --cpus-per-task=1)
judge=()
[[ $* != *with_judge* ]] || judge=(: --nodes=1 "${{small[@]}}")
exec {sbatch} --wait --output={folder}/%j.out --nodes=2 "${{small[@]}}" "${{judge[@]}}" "$@"
"""
VLLM = """\
#!/usr/bin/env bash
exec {python} -m tests.contracts.judge_server "$PORT"
"""


def commands(document: str) -> str:
    """The indented lines of `STEPS`, but for examples of data."""
    script = []
    step = ""
    for line in document.splitlines():
        if line.startswith("## "):
            step = line.removeprefix("## ").split(".")[0]
        elif line.startswith("    ") and step in STEPS and not line.startswith("    {"):
            script.append(line.strip())
    return "\n".join(script)


def write_program(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


def write_shared(folder: Path) -> None:
    """What a user brings: models, questions and demonstrations, here a toy's."""
    data, models = folder / "data", folder / "models"
    data.mkdir(parents=True)
    toy.save_data(data)
    (data / "held_out.jsonl").rename(data / "math500.jsonl")
    toy.save_model(models / "Qwen2.5-32B")
    programs = folder / "venv" / "bin"
    programs.mkdir(parents=True)
    # The judge's protocol without its 72 billion parameters.
    write_program(programs / "vllm", VLLM.format(python=sys.executable))
    path = f"{programs}:{Path(sys.executable).parent}"
    (programs / "activate").write_text(f"export PATH={path}:$PATH PYTHONPATH={ROOT}\n")


def write_config(path: Path) -> None:
    """The toy's sizes in place of the recipe's; paths are the document's own."""
    settings = toy.settings(
        path.parent,
        "unused",
        monitor__wandb="disabled",
        parallel__tensor=2,
        schedule__iterations=3,
        schedule__freeze_iterations=1,
        evaluation__greedy="false",
        judge__when="undecided",
        engine__tokens_per_micro_batch=1024,
    )
    OmegaConf.save(OmegaConf.from_dotlist(settings), path)


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.skipif(bool(slurm.why_not()), reason=slurm.why_not())
@pytest.mark.timeout(1800)
def test_the_document_walks(tmp_path: Path) -> None:
    shared, site = tmp_path / "shared", tmp_path / "site"
    write_shared(shared)
    site.mkdir()
    write_program(site / "sbatch", SBATCH.format(sbatch=shutil.which("sbatch"), folder=site))
    write_config(tmp_path / "toy.yaml")
    script = commands((ROOT / "docs" / "first-cluster-run.md").read_text())
    assert script.count(".sbatch") == 5
    folder = tmp_path / "slurm"
    folder.mkdir()
    with slurm.cluster(folder) as cluster:
        variables = cluster.variables | {
            "PATH": f"{site}:{Path(sys.executable).parent}:{os.environ['PATH']}",
            "SHARED": str(shared),
            "CONFIG": str(tmp_path / "toy.yaml"),
            "LOGS": str(tmp_path / "logs"),
            "NODE_CACHE": str(tmp_path / "cache"),
            # All nodes are this machine.
            "MASTER_ADDR": "127.0.0.1",
            "JUDGE_ADDRESS": "127.0.0.1",
        }
        finished = run(["bash", "-euxo", "pipefail", "-c", script], variables, timeout_s=1500)
        written = sorted(site.glob("*.out")) + sorted((tmp_path / "logs").rglob("*.log"))
        said = "\n".join(f"== {path}\n{path.read_text()}" for path in written)
    assert finished.status == 0, f"{finished.stdout}\n{finished.stderr}\n{said}"
    assert "layouts fit, fastest first" in finished.stdout
    assert "measured: mean_response_tokens" in finished.stdout
    iterations = {"first": 2, "oreal_32b": 3, "oreal_32b_judge": 3}
    for name, count in iterations.items():
        lines = read_metrics(shared / "runs" / name / "metrics.jsonl")
        assert sum(line["kind"] == "train" for line in lines) == count
        assert json.loads((shared / "runs" / name / "summary.json").read_text())["ranks"] == 2
    assert "the judge answers at http://127.0.0.1:" in said
    assert "2 on 1 hosts" in said  # the doctor under Slurm


def test_every_command_of_the_document_can_be_read() -> None:
    script = commands((ROOT / "docs" / "first-cluster-run.md").read_text())
    assert {shlex.split(line)[0] for line in script.splitlines()} == {
        "export",
        "megatron-oreal",
        "COMMAND=sft",
        "COMMAND=doctor",
        "sbatch",
        "tail",
    }
