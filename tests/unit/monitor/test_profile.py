from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch

from megatron_oreal.monitor.profile import IterationProfile, memory_metrics


def test_traced_phases_leave_a_trace_and_all_of_them_memory(tmp_path: Path) -> None:
    profile = IterationProfile(["policy"])
    with profile.phase("generate"):
        kept = torch.ones(8 << 20)
    with profile.phase("policy"):
        kept = kept @ torch.ones(len(kept))
    profile.write(tmp_path / "deeper", 3)
    assert {path.name for path in (tmp_path / "deeper").iterdir()} == {
        "rank_3.policy.trace.json.gz",
        "rank_3.memory.json",
    }
    with gzip.open(tmp_path / "deeper" / "rank_3.policy.trace.json.gz") as file:
        names = {event.get("name") for event in json.load(file)["traceEvents"]}
    assert "aten::dot" in names or "aten::matmul" in names
    generate, policy = json.loads((tmp_path / "deeper" / "rank_3.memory.json").read_text())
    assert (generate["phase"], policy["phase"]) == ("generate", "policy")
    assert generate["host_gib_after"] - generate["host_gib_before"] > 0.02  # of 0.03
    assert generate["seconds"] > 0
    assert profile.busy_s > 0


def test_a_phase_that_comes_twice_leaves_two_traces(tmp_path: Path) -> None:
    profile = IterationProfile(["sync"])
    for _ in range(2):
        with profile.phase("sync"):
            torch.ones(1)
    profile.write(tmp_path, 0)
    assert len(list(tmp_path.glob("rank_0.sync*.trace.json.gz"))) == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="a device has more to say")
def test_without_a_device_there_is_host_memory_alone() -> None:
    metrics = memory_metrics()
    assert list(metrics) == ["memory/host_gib"]
    assert 0.1 < metrics["memory/host_gib"] < 100
