"""The seconds of a run as planned: the assumptions that they were planned with come back."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from megatron_oreal.cli import main
from megatron_oreal.config.errors import UserError
from megatron_oreal.config.load import load_config, resolve_config_yaml
from megatron_oreal.config.schema import Config
from megatron_oreal.models.registry import read_model
from megatron_oreal.planner.calibrate import MeasuredRun, calibrate, read_run
from megatron_oreal.planner.duration import (
    Assumptions,
    Duration,
    assumptions_for,
    plan_duration,
    response_lengths,
)
from megatron_oreal.planner.hardware import GPUS, Cluster
from megatron_oreal.planner.memory import plan_memory

ROOT = Path(__file__).parents[3]
MODEL = ROOT / "configs/models/qwen2.5-7b"
A100 = Cluster(GPUS["a100-80"], 32)
_, DIMS = read_model(MODEL)
ANSWERS = 64 * 16
TRUE = Assumptions(
    mean_response_tokens=2500.0,
    length_sigma=0.5,
    mixed_questions=0.6,
    decode_share=0.3,
    train_share=0.55,
    network_share=0.5,
    verify_s=0.4,
    storage=3e9,
    start_s=120.0,
)
READ = {*asdict(TRUE)} - {"prompt_tokens", "packing_share", "reduce_s", "seed_s"}


def recipe() -> Config:
    settings = [f"model.path={MODEL}", "data.path=d", "parallel.pipeline=2"]
    return load_config([ROOT / "configs/oreal_7b.yaml"], settings)


def duration(config: Config, given: Assumptions) -> Duration:
    kv_tokens = plan_memory(config, DIMS, A100).kv_tokens
    return plan_duration(config, DIMS, A100, kv_tokens, given)


def iteration(config: Config, given: Assumptions, **more: float) -> dict[str, Any]:
    lengths = response_lengths(ANSWERS, config, given)
    assert max(lengths) < config.sampling.max_new_tokens
    phases = duration(config, given).phases
    return {
        "kind": "train",
        "iteration": 0,
        "oreal/learning_rate": 1e-7,
        "rollout/response_length_mean": given.mean_response_tokens,
        "rollout/response_length_max": max(lengths),
        "rollout/truncated_share": 0.0,
        "rollout/nontrivial_share": given.mixed_questions,
        **{f"time/{phase}_s": seconds for phase, seconds in phases.items()},
        **more,
    }


def seconds(config: Config) -> dict[str, float]:
    planned = duration(config, TRUE)
    return {"start": planned.start, "checkpoint": planned.checkpoints}


def test_the_assumptions_of_a_run_come_back() -> None:
    config = recipe()
    run = MeasuredRun(config, 32, [iteration(config, TRUE)], seconds(config))
    found = calibrate(run, DIMS, A100.gpu, A100.modules)
    assert set(found.measured) == READ
    assert asdict(found.given) == pytest.approx(asdict(TRUE), rel=1e-6)


def test_a_slow_first_iteration_says_nothing() -> None:
    config = recipe()
    usual = iteration(config, TRUE)
    slow = usual | {"time/generate_s": 10 * usual["time/generate_s"]}
    run = MeasuredRun(config, 32, [slow, usual, usual], seconds(config))
    given = calibrate(run, DIMS, A100.gpu, A100.modules).given
    assert given.decode_share == pytest.approx(TRUE.decode_share, rel=0.1)


def test_a_run_that_only_scored_says_how_fast_a_forward_pass_is() -> None:
    config = recipe()
    frozen = iteration(config, TRUE, **{"oreal/learning_rate": 0.0})
    del frozen["time/sync_s"]
    found = calibrate(MeasuredRun(config, 32, [frozen], {}), DIMS, A100.gpu, A100.modules)
    # What layers exchange takes the network's share, of which such a run says nothing.
    assert found.given.train_share == pytest.approx(TRUE.train_share, rel=0.1)
    assert not {"network_share", "storage", "start_s"} & set(found.measured)


def test_responses_that_were_cut_tell_the_spread() -> None:
    config = recipe()
    given = replace(TRUE, mean_response_tokens=5000.0, length_sigma=0.7)
    lengths = response_lengths(ANSWERS, config, given)
    cut = sum(length >= config.sampling.max_new_tokens for length in lengths) / ANSWERS
    longest = float(config.sampling.max_new_tokens)
    line = iteration(config, TRUE) | {
        "rollout/response_length_mean": 5000.0,
        "rollout/response_length_max": longest,
        "rollout/truncated_share": cut,
    }
    found = calibrate(MeasuredRun(config, 32, [line], {}), DIMS, A100.gpu, A100.modules)
    assert found.given.length_sigma == pytest.approx(0.7, rel=0.02)


def test_responses_of_one_length_have_next_to_no_spread() -> None:
    line = iteration(recipe(), TRUE) | {"rollout/response_length_max": TRUE.mean_response_tokens}
    found = calibrate(MeasuredRun(recipe(), 32, [line], {}), DIMS, A100.gpu, A100.modules)
    assert found.given.length_sigma == 0.01


def write_run(folder: Path, config: Config) -> Path:
    folder.mkdir()
    (folder / "config.yaml").write_text(resolve_config_yaml(config))
    (folder / "metrics.jsonl").write_text(json.dumps(iteration(config, TRUE)) + "\n")
    (folder / "summary.json").write_text(json.dumps({"ranks": 32, "seconds": seconds(config)}))
    return folder


def test_the_command_plans_by_what_a_run_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_run(tmp_path / "run", recipe())
    command = ["plan", "--config", f"{ROOT}/configs/oreal_7b.yaml", "--ranks", "32", "--gpu"]
    command += ["a100-80", "--calibrate", str(folder), f"model.path={MODEL}", "data.path=d"]
    assert main([*command, "--json"]) == 0
    given = json.loads(capsys.readouterr().out)["assumptions"]
    assert given["decode_share"] == pytest.approx(TRUE.decode_share)
    assert main(command) == 0
    assert "measured: mean_response_tokens 2500, " in capsys.readouterr().out
    (folder / "summary.json").unlink()
    assert main(command) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "name the folder of a training run that has ended" in line


@pytest.mark.parametrize("summary", ["", "[]", "{}", '{"ranks": "x", "seconds": {}}'])
def test_a_folder_without_a_whole_summary_is_refused(tmp_path: Path, summary: str) -> None:
    (tmp_path / "summary.json").write_text(summary)
    with pytest.raises(UserError, match="--calibrate="):
        read_run(tmp_path, recipe())


def test_a_run_without_training_is_refused(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text('{"ranks": 2, "seconds": {}}')
    (tmp_path / "metrics.jsonl").write_text('{"kind": "eval", "iteration": 0}\n')
    with pytest.raises(UserError, match="no iteration that trained"):
        read_run(tmp_path, recipe())


def test_assumptions_start_from_the_config() -> None:
    assert assumptions_for(recipe()).mean_response_tokens == pytest.approx(14_000 / 3)
