"""The bench of precisions on the device: bf16 and every recipe of FP8, policy and engine."""

from __future__ import annotations

import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.integration import toy
from tools.bench import mismatch

ROOT = Path(__file__).parents[2]


@pytest.mark.timeout(1800)
def test_every_pair_is_compared_and_fp8_is_further_off(tmp_path: Path) -> None:
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs a device with every FP8 recipe, H100 or newer")
    if importlib.util.find_spec("transformer_engine") is None:
        pytest.skip("needs Transformer Engine")
    toy.make(tmp_path)
    settings = toy.settings(tmp_path, "run", model__precision="bf16")
    command = [sys.executable, "-m", "tools.bench.mismatch", "--questions", "8", "--json"]
    done = subprocess.run(
        [*command, *settings], cwd=ROOT, capture_output=True, text=True, timeout=1500, check=False
    )
    assert done.returncode == 0, done.stderr[-6000:]
    cells = {
        (cell["training"], cell["rollouts"]): cell
        for cell in json.loads(done.stdout.splitlines()[-1])["cells"]
    }
    names = [mismatch.precisions(mismatch.ON_GPU[option], option) for option in mismatch.ON_GPU]
    assert set(cells) == {(a, b) for a in names[0] for b in names[1]}
    for cell in cells.values():
        assert all(math.isfinite(cell[metric]) for _, metric in mismatch.COLUMNS)
        assert 0 < cell["rollout/ess_sequence"] <= 1
    own = cells["bf16", "bf16"]["rollout/mismatch_mean"]
    for pair in set(cells) - {("bf16", "bf16")}:
        assert cells[pair]["rollout/mismatch_mean"] > own
