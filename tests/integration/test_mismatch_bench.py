"""Every pair of precisions that a CPU has, through real engines on the toy; and what is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_oreal.config.load import load_config
from tests.integration import toy
from tools.bench import mismatch

ROOT = Path(__file__).parents[2]


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_fp32_agrees_and_bf16_does_not(tmp_path: Path) -> None:
    toy.make(tmp_path)
    settings = toy.settings(tmp_path, "run", sampling__top_p=0.5)  # the bench asks for 1
    command = [sys.executable, "tools/bench/mismatch.py", "--questions", "4", "--json", *settings]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500, check=False
    )
    assert done.returncode == 0, done.stderr
    cells = {
        (cell["training"], cell["rollouts"]): cell
        for cell in json.loads(done.stdout.splitlines()[-1])["cells"]
    }
    assert set(cells) == {(a, b) for a in ("fp32", "bf16") for b in ("fp32", "bf16")}
    for cell in cells.values():
        assert cell["responses"] == 4 * 8
        mean, p99, largest = (cell[f"rollout/mismatch_{name}"] for name in ("mean", "p99", "max"))
        assert 0 < mean < p99 <= largest
        assert 0.9 < cell["rollout/ess_sequence"] <= cell["rollout/ess_token"] <= 1
    same = cells["fp32", "fp32"]
    assert same["rollout/mismatch_mean"] < 2e-5
    assert same["rollout/ess_token"] == pytest.approx(1, abs=1e-6)
    for pair in set(cells) - {("fp32", "fp32")}:
        assert cells[pair]["rollout/mismatch_mean"] > 10 * same["rollout/mismatch_mean"]


def test_what_is_compared_on_a_gpu_is_what_a_config_can_say() -> None:
    found = {}
    for option, texts in mismatch.ON_GPU.items():
        for name, settings in mismatch.precisions(texts, option).items():
            config = load_config([], ["model.path=m", "data.path=d", *settings])
            quantization = config.rollout.quantization
            found[option, name] = (config.model.precision, config.fp8.policy.recipe, quantization)
    assert found == {
        ("--train", "bf16"): ("bf16", "none", "none"),
        ("--train", "fp8 delayed"): ("bf16", "delayed", "none"),
        ("--train", "fp8 tensorwise"): ("bf16", "tensorwise", "none"),
        ("--train", "fp8 blockwise"): ("bf16", "blockwise", "none"),
        ("--rollout", "bf16"): ("bf16", "none", "none"),
        ("--rollout", "fp8"): ("bf16", "none", "fp8"),
    }


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--train", "bf16"], "mismatch: --train bf16: write NAME:key=value"),
        (["--rollout", ":model.precision=fp32"], "mismatch: --rollout :model.precision=fp32:"),
        (["--train", "fp4:model.precision=fp4"], "model.precision=fp4"),
    ],
)
def test_a_precision_that_cannot_be_read_is_one_line(
    arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert mismatch.main([*arguments, "model.path=m", "data.path=d"]) == 2
    error = capsys.readouterr().err
    assert told in error
    assert error.count("\n") == 1
