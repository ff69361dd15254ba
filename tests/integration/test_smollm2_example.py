"""The SmolLM2 example on real weights, shrunk: two pieces, importance weights on, to its table."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from examples.smollm2 import problems
from megatron_oreal.monitor.metrics import read_metrics

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(2400)]

ROOT = Path(__file__).parents[2]
SETTINGS = [
    "data.questions_per_iteration=2",
    "sampling.samples_per_question=4",
    "sampling.max_new_tokens=16",
    "oreal.importance.level=token",
    "sampling.temperature=1",
    "sampling.top_p=1",
    "oreal.selection=all",  # so that there is something to weigh
    "schedule.iterations=16",  # longer than the first piece on any CPU
    "evaluation.max_questions=4",
    "export.at_end=false",
    "monitor.wandb=disabled",
]


def run(runs: Path, piece_s: int) -> subprocess.CompletedProcess[str]:
    cpu = {"CONFIG": "examples/smollm2/cpu.yaml", "RUNS": str(runs), "PIECE_S": str(piece_s)}
    return subprocess.run(
        ["bash", "examples/smollm2/run.sh", "0", *SETTINGS],
        cwd=ROOT,
        env=os.environ | cpu | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=1100,
    )


def test_a_piece_ends_saved_and_the_next_ends_with_the_table(tmp_path: Path) -> None:
    # As if they had been rated: 32 questions and 4 samples would hardly hold enough.
    rated = [{**question, "pass_rate": 0.5} for question in problems.pool(0, 40)]
    for name, chosen in zip(("eval", "train"), problems.choose(rated, 0, 8), strict=True):
        problems.write_lines(tmp_path / "seed_0" / "data" / f"{name}.jsonl", chosen)
    subprocess.run(
        ["python", "examples/smollm2/prepare.py", tmp_path / "model"],
        cwd=ROOT,
        check=True,
        timeout=600,
    )
    first = run(tmp_path, piece_s=35)
    assert first.returncode == 75, first.stdout + first.stderr
    assert "start it again" in first.stdout
    second = run(tmp_path, piece_s=0)
    assert second.returncode == 0, second.stdout + second.stderr
    folder = tmp_path / "seed_0" / "oreal"
    summary = json.loads((folder / "summary.json").read_text())
    assert set(summary["pass_at_1"]) == {"before", "after"}
    lines = [line for line in read_metrics(folder / "metrics.jsonl") if line["kind"] == "train"]
    assert [line["iteration"] for line in lines] == list(range(16))
    for line in lines:  # the engine's processed log-probabilities are the policy's own
        assert line["rollout/mismatch_mean"] < 1e-4
        assert line["oreal/importance_mean"] == pytest.approx(1, abs=1e-3)
        assert line["oreal/importance_above_cap_share"] == 0
        assert line["time/importance_s"] > 0
    assert "| generate |" in (folder / "run.md").read_text()
    assert (folder / "run.png").read_bytes().startswith(b"\x89PNG")
    third = run(tmp_path, piece_s=0)
    assert third.returncode == 0
    assert "| generate |" in third.stdout
