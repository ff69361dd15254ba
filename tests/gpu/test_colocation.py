"""Engines that share a device with training: what sleeping frees, and what wakes up again."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

Found = dict[str, Any]


def run_program(quantization: str, folder: Path) -> Found:
    done = subprocess.run(
        [sys.executable, "-m", "tests.gpu.colocation_program", quantization, str(folder)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return json.loads((folder / "found.json").read_text())


@pytest.fixture(scope="module")
def bf16(tmp_path_factory: pytest.TempPathFactory) -> Found:
    return run_program("none", tmp_path_factory.mktemp("bf16"))


@pytest.fixture(scope="module")
def fp8(tmp_path_factory: pytest.TempPathFactory) -> Found:
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs a device that multiplies in FP8")
    return run_program("fp8", tmp_path_factory.mktemp("fp8"))


def test_sleeping_gives_back_nine_tenths_of_what_the_engine_held(bf16: Found) -> None:
    for awake, asleep in zip(bf16["awake_gib"], bf16["asleep_gib"], strict=True):
        assert asleep <= 0.1 * awake


def test_training_may_take_it_and_the_engine_gets_it_back(bf16: Found) -> None:
    for asleep, trained, awake in zip(
        bf16["asleep_gib"], bf16["trained_gib"], bf16["awake_gib"], strict=True
    ):
        assert trained - asleep >= 0.85 * (awake - asleep)
    assert bf16["awake_gib"][1] == pytest.approx(bf16["awake_gib"][0], rel=0.05)


def test_weights_go_in_place_and_addresses_stay(bf16: Found) -> None:
    """Each push is checked: checksums of the live parameters against the policy's."""
    assert bf16["sync"] == "in place"
    assert bf16["addresses_stay"]


def test_an_engine_that_slept_answers_as_a_fresh_one(bf16: Found) -> None:
    """CUDA graphs, captured before it slept, read the weights that were written since."""
    assert bf16["answers"] == [bf16["fresh"]["answers"]] * 3


def test_an_engine_holds_no_more_than_its_share(bf16: Found) -> None:
    assert max(bf16["awake_gib"]) <= bf16["share_gib"] + 1


def test_a_cache_under_one_sequence_is_refused(bf16: Found) -> None:
    assert bf16["refusal"].startswith("rollout.gpu_memory_utilization=0.01: the engine needs")


def test_the_process_stands_as_before(bf16: Found) -> None:
    assert bf16["switches_kept"]


def test_fp8_weights_arrive_by_reload_and_wake_up_the_same(fp8: Found) -> None:
    assert fp8["sync"].startswith("whole tensors, since")
    first, *others = fp8["answers"]
    assert all(answers == first for answers in others)
    assert fp8["addresses_stay"]


def test_fp8_engines_sleep_as_others_do(fp8: Found) -> None:
    for awake, asleep in zip(fp8["awake_gib"], fp8["asleep_gib"], strict=True):
        assert asleep <= 0.1 * awake


def test_fp8_log_probabilities_are_near_those_of_bf16(fp8: Found) -> None:
    differences = torch.tensor(fp8["logprobs"]) - torch.tensor(fp8["fresh"]["logprobs"])
    assert 0 < float(differences.abs().mean()) < 0.5
