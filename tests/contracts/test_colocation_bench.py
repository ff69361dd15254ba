"""The benchmark of turns between training and engine, on one rank with a toy."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


def test_the_benchmark_goes_round_on_a_cpu():
    options = ["--sequences", "2", "--tokens", "8", "--rounds", "1", "--json"]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "tools/bench/colocation.py", *options],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    found = json.loads(done.stdout)
    steps = ("sleep", "wake_weights", "sync", "wake_cache")
    assert found["switch_s"] == pytest.approx(sum(found[f"{step}_s"] for step in steps))
    assert found["decode_over_alone"] == found["tokens_per_s"] / found["alone_tokens_per_s"] > 0
    assert (found["device"], found["ranks"]) == ("cpu", 1)
