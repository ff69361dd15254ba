"""`megatron-oreal doctor` alone and on two ranks, on the machine that runs the tests."""

from __future__ import annotations

import json

import pytest

from tests.integration.commands import alone, under_torchrun


@pytest.mark.vllm
def test_two_ranks_are_compared() -> None:
    finished = under_torchrun(2, "doctor", "--json")
    assert finished.status == 0, finished.stderr
    report = json.loads(finished.stdout)
    found = {finding["name"]: finding for finding in report["findings"]}
    assert report["status"] == 0
    assert found["world"]["found"] == "2 on 1 hosts"
    assert found["clocks"]["level"] == "fine"
    assert found["environments"]["found"] == "alike"
    assert "over 2 ranks, gloo" in found["all-reduce in a node"]["found"]
    assert found["import vllm"]["level"] != "missing"
    assert sum(finding["name"] == "torch" for finding in report["findings"]) == 1


@pytest.mark.vllm
def test_what_a_run_lacks_is_status_one() -> None:
    finished = alone("doctor", "model.path=no-such-model", "data.path=no-such-file")
    assert finished.status == 1
    assert "missing" in finished.stdout
    assert "no-such-model" in finished.stdout
