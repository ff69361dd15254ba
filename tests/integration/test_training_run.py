"""One short run of the whole loop on its real parts, two ranks, and what it must leave behind."""

from __future__ import annotations

import json
import math
import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_oreal.config.load import load_config
from megatron_oreal.data.prompts import load_prompts
from megatron_oreal.data.tokenizer import load_tokenizer
from megatron_oreal.monitor.metrics import MEASURED, read_metrics
from megatron_oreal.monitor.run_folder import RunFolder
from megatron_oreal.monitor.transcripts import TOKEN_DTYPE, read_lines, read_tokens
from megatron_oreal.rollout.record import RecordHeader, decode_groups, record_path
from megatron_oreal.types import RolloutGroup
from tests.integration import toy
from tests.integration.commands import Finished, alone, run, under_torchrun
from tests.integration.conftest import FineTuning
from tools.bench import iteration as bench_iteration

pytestmark = pytest.mark.vllm

FROZEN, FIRST_UPDATE, LAST = 0, 1, 2
METRICS = Path(__file__).parents[2] / "docs" / "metrics.md"


@dataclass(frozen=True)
class TrainingRun:
    """A finished run, read back from its folder."""

    folder: Path
    settings: list[str]
    finished: Finished
    train: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    summary: dict[str, Any]

    @property
    def model(self) -> Path:
        return self.folder / "hf" / "final"


def read_run(folder: Path, settings: list[str], finished: Finished) -> TrainingRun:
    assert finished.status == 0, finished.stderr
    metrics = read_metrics(folder / "metrics.jsonl")
    return TrainingRun(
        folder,
        settings,
        finished,
        [line for line in metrics if line["kind"] == "train"],
        [line for line in metrics if line["kind"] == "eval"],
        json.loads((folder / "summary.json").read_text()),
    )


@pytest.fixture(scope="module")
def trained(root: Path, fine_tuning: FineTuning) -> TrainingRun:
    """Tensor parallelism 2 with sequence parallelism, one vLLM engine a rank."""
    settings = toy.settings(
        root,
        "trained",
        fine_tuning.model,
        run__seed=7,
        parallel__tensor=2,
        schedule__iterations=3,
        schedule__freeze_iterations=1,
        evaluation__at_start="true",
        evaluation__at_end="true",
        evaluation__every=2,
        monitor__transcripts_per_iteration=6,
        profile__iterations=f"[{FIRST_UPDATE}]",
    )
    return read_run(root / "trained", settings, under_torchrun(2, "train", *settings))


@pytest.fixture(scope="module")
def replayed(root: Path, fine_tuning: FineTuning, trained: TrainingRun) -> TrainingRun:
    """What `trained` recorded, trained on by a single rank where vLLM cannot be imported."""
    settings = toy.settings(
        root,
        "replayed",
        fine_tuning.model,
        run__seed=7,
        rollout__replay=trained.folder / "recorded",
        schedule__iterations=3,
        schedule__freeze_iterations=1,
        monitor__wandb="disabled",
    )
    program = (
        "import sys; sys.modules['vllm'] = None; from megatron_oreal.cli import main;"
        " sys.exit(main())"
    )
    finished = run([sys.executable, "-c", program, "train", *settings])
    return read_run(root / "replayed", settings, finished)


@pytest.fixture(scope="module")
def hopeless(root: Path) -> TrainingRun:
    """An untrained policy solves nothing: every batch is trivial. A single rank."""
    settings = toy.settings(
        root,
        "hopeless",
        schedule__iterations=3,
        schedule__freeze_iterations=1,
        evaluation__at_end="true",
        monitor__wandb="disabled",
    )
    return read_run(root / "hopeless", settings, alone("train", *settings))


@pytest.fixture(scope="module")
def greedy_of_vllm(root: Path, trained: TrainingRun) -> list[dict[str, Any]]:
    """Greedy answers to the held-out questions from an engine started on the exported folder."""
    out = root / "greedy.json"
    program = ("-m", "tests.integration.greedy_program", str(out))
    finished = run([sys.executable, *program, *evaluation_settings(root, trained)])
    assert finished.status == 0, finished.stderr
    return json.loads(out.read_text())


def evaluation_settings(root: Path, trained: TrainingRun, **more: Any) -> list[str]:
    return toy.settings(root, "unused", trained.model, run__seed=7, **more)


def test_fine_tuning_lowers_the_loss(fine_tuning: FineTuning) -> None:
    losses = [line["sft/loss"] for line in fine_tuning.metrics]
    # At first about ln(19 tokens) = 2.9; a perfect form with the answer at random costs ln 2 once
    # in 11 tokens, 0.06.
    assert losses[0] > 2.5
    assert 0.06 < losses[-1] < 0.2
    summary = json.loads((fine_tuning.folder / "summary.json").read_text())
    assert summary["steps"] == len(losses) == 42
    assert summary["hf"] == str(fine_tuning.model)


def test_every_iteration_and_evaluation_has_its_line(trained: TrainingRun) -> None:
    assert [line["iteration"] for line in trained.train] == [0, 1, 2]
    assert [line["iteration"] for line in trained.evaluations] == [0, 2, 3]
    for line in trained.train + trained.evaluations:
        values = [value for name, value in line.items() if name != "kind"]
        assert all(math.isfinite(value) for value in values), line


def test_every_iteration_trained(trained: TrainingRun) -> None:
    for line in trained.train:
        assert line["oreal/trajectories"] >= 2
        assert line["oreal/trajectories"] % 2 == 0  # a correct and an incorrect one each
        assert line["token_rm/grad_norm"] > 0
        assert 0 < line["rollout/pass_rate"] < 1


def test_policy_equals_reference_until_it_has_moved(trained: TrainingRun) -> None:
    for line in trained.train[: FIRST_UPDATE + 1]:
        assert line["oreal/reference_difference_max"] == 0
        assert line["oreal/kl_k1"] == line["oreal/kl_k3"] == line["oreal/kl_loss"] == 0
    assert trained.train[LAST]["oreal/reference_difference_max"] > 1e-4
    assert trained.train[LAST]["oreal/kl_k3"] > 0


def test_the_frozen_policy_takes_no_step(trained: TrainingRun) -> None:
    frozen, first = trained.train[FROZEN], trained.train[FIRST_UPDATE]
    assert frozen["oreal/learning_rate"] == frozen["oreal/grad_norm"] == 0
    assert first["oreal/learning_rate"] == 1e-3  # one iteration of warm-up: at the peak
    assert first["oreal/grad_norm"] > 0
    assert trained.evaluations[0]["eval/pass_at_1"] == trained.summary["pass_at_1"]["before"]


def test_engine_and_policy_agree_on_every_sampled_token(trained: TrainingRun) -> None:
    for line in trained.train:  # the last one on weights that were pushed
        assert line["rollout/mismatch_mean"] < 2e-5
        assert line["rollout/mismatch_max"] < 1e-3


def test_a_replay_without_vllm_on_one_rank_trains_the_same(
    trained: TrainingRun, replayed: TrainingRun
) -> None:
    """What is counted is equal; what is computed differs by the rounding of another layout."""
    for line, again in zip(trained.train, replayed.train, strict=True):
        names = {name for name in line if not name.startswith(MEASURED)}
        assert names == {name for name in again if not name.startswith(MEASURED)}
        for name in names - {"kind"}:
            counted = name.startswith("rollout/") and not re.search("mismatch|ess_", name)
            relative, absolute = (0, 0) if counted else (2e-3, 2e-5)
            assert again[name] == pytest.approx(line[name], relative, absolute), name
    assert not {"generate", "verify", "sync"} & replayed.summary["seconds"].keys()
    assert not list((replayed.folder / "recorded").iterdir())


def test_answers_are_judged_while_others_still_generate(trained: TrainingRun) -> None:
    for line in trained.train:
        assert 0 < line["throughput/judged_early_share"] <= 1
        assert 0 < line["throughput/slowest_engine_share"] <= 1
        assert line["throughput/slowest_engine_rank"] in {0, 1}
        assert line["time/last_verdict_wait_s"] >= 0


def test_the_clocks_of_a_run_say_where_its_time_went(
    trained: TrainingRun, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench_iteration.main([str(trained.folder), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["device"], found["parallel"]["tensor"]) == ("cpu", 2)
    assert found["iterations"] == 2
    assert {"generate", "sleep", "policy", "sync"} <= found["seconds"].keys()
    kinds = ("generation", "verification", "training", "outside")
    assert sum(found[f"{kind}_share"] for kind in kinds) == pytest.approx(1)
    assert all(0 <= found[f"{kind}_share"] < 1 for kind in kinds)


def test_alarms_are_said_and_written(trained: TrainingRun) -> None:
    said = [line for line in trained.finished.stdout.splitlines() if line.startswith("alarm ")]
    alarms = trained.folder / "alarms.jsonl"
    assert len(said) == (len(alarms.read_text().splitlines()) if alarms.exists() else 0)
    undecided = any(line["rollout/unverified_alarm"] for line in trained.train)
    assert any(": unverified " in line for line in said) == undecided


def test_rollout_alone_samples_what_the_first_iteration_of_a_run_sampled(
    root: Path, fine_tuning: FineTuning, trained: TrainingRun
) -> None:
    settings = toy.settings(
        root,
        "sampled",
        fine_tuning.model,
        run__seed=7,
        schedule__iterations=1,
        schedule__freeze_iterations=0,
        monitor__wandb="disabled",
    )
    finished = alone("rollout", *settings)
    assert finished.status == 0, finished.stderr
    (line,) = read_metrics(root / "sampled" / "metrics.jsonl")
    assert line["rollout/pass_rate"] == trained.train[0]["rollout/pass_rate"]
    header, groups = recorded_groups(root / "sampled", 0)
    expected_header, expected = recorded_groups(trained.folder, 0)
    assert msgspec.structs.replace(header, sampled_by="") == expected_header
    assert [without_clock(group) for group in groups] == [without_clock(g) for g in expected]


def test_weights_pushed_are_those_the_engine_computes_with(
    root: Path, fine_tuning: FineTuning
) -> None:
    settings = toy.settings(root, "unused", fine_tuning.model)
    finished = alone("check-sync", "--json", *settings)
    assert finished.status == 0, finished.stderr
    found = json.loads(finished.stdout)
    assert found["passed"]
    assert found["reference_difference_max"] == found["kl_k3"] == 0
    assert found["differing"] == {}
    assert len(found["tensors"]) == 2 + 12 * toy.SHAPE["num_hidden_layers"]
    assert found["probe_tokens"] >= 8
    assert found["mismatch_mean"] < 2e-5


@pytest.mark.slow
def test_a_policy_that_broke_is_not_trained_on_and_ends_the_run(
    root: Path, fine_tuning: FineTuning, trained: TrainingRun
) -> None:
    """A rate far too high: the first step leaves weights whose log-probabilities are NaN."""
    settings = toy.settings(
        root,
        "broken",
        fine_tuning.model,
        run__seed=7,
        rollout__replay=trained.folder / "recorded",
        policy_optimizer__lr=1e30,
        engine__max_skipped_steps=2,
        schedule__iterations=3,
        schedule__freeze_iterations=0,
        monitor__wandb="disabled",
    )
    finished = alone("train", *settings)
    assert finished.status == 2
    (line,) = finished.lines()
    assert "engine.max_skipped_steps=2: 2 iterations in a row" in line
    assert "policy: logprobs not finite" in line
    skipped = [m["oreal/skipped_steps"] for m in read_metrics(root / "broken" / "metrics.jsonl")]
    assert skipped == [0, 1, 1]


def recorded_groups(folder: Path, iteration: int) -> tuple[RecordHeader, list[RolloutGroup]]:
    return decode_groups(record_path(folder / "recorded", iteration).read_bytes())


def without_clock(group: RolloutGroup) -> RolloutGroup:
    return replace(group, verdicts=tuple(replace(v, seconds=0.0) for v in group.verdicts))


def test_transcripts_hold_what_was_sampled_judged_and_weighed(trained: TrainingRun) -> None:
    files = sorted((trained.folder / "rollouts").glob("*.jsonl"))
    assert [file.name for file in files] == [f"iter_{i:06d}.jsonl" for i in range(3)]
    vocabulary = RunFolder(trained.folder).read_vocabulary()
    for file in files:
        lines = read_lines(file)
        assert len(lines) == 6
        tokens = read_tokens(file, range(6))
        assert any(line["trained"] for line in lines)
        for line in lines:
            assert line["reward"] == {"correct": 1, "incorrect": -1}[line["outcome"]]
            assert line["advantage"] is not None
            of_line = tokens[line["line"]]
            assert len(of_line) == line["response_length"] > 0
            text = b"".join(vocabulary[token] for token in of_line["token"]).decode()
            assert text.startswith(line["response"])
            assert (of_line["rollout_logprob"] <= 0).all()
            if line["reward"] == 1:
                assert line["response"].endswith(f"\\boxed{{{line['gold_answer']}}}")
            for name in TOKEN_DTYPE.names[2:]:
                assert np.isfinite(of_line[name]).all() == line["trained"]


def test_wandb_has_a_table_of_rollouts_and_their_tokens(trained: TrainingRun) -> None:
    media = trained.folder / "wandb"
    (page,) = media.rglob("media/html/*.html")  # of iteration 0; the next is of iteration 10
    assert '<script type="text/plain" id="chunk-0">' in page.read_text()
    (table,) = media.rglob("media/table/*.json")
    assert len(json.loads(table.read_text())["data"]) == 6


def test_config_of_the_run_loads_back(trained: TrainingRun) -> None:
    assert load_config([trained.folder / "config.yaml"], []) == load_config([], trained.settings)


def test_summary_has_the_rates_before_and_after(trained: TrainingRun) -> None:
    summary = trained.summary
    assert summary["pass_at_1"].keys() == summary["pass_at_8"].keys() == {"before", "after"}
    assert 0 < summary["pass_at_1"]["before"] <= summary["pass_at_8"]["before"] <= 1
    assert summary["pass_at_1"]["after"] == trained.evaluations[-1]["eval/pass_at_1"]
    assert summary["seed"] == 7
    assert summary["ranks"] == 2
    assert summary["hf"] == str(trained.model)
    phases = {"start", "generate", "verify", "token_rm", "reference", "policy", "sync", "evaluate"}
    assert phases <= summary["seconds"].keys()


def test_console_shows_iterations_and_the_table_once(trained: TrainingRun) -> None:
    lines = trained.finished.stdout.splitlines()
    assert sum(line.startswith("train ") for line in lines) == 3
    assert sum("pass@1" in line for line in lines) == 1
    (checklist,) = (line for line in lines if line.startswith("before the first step: "))
    assert "policy and reference differ by 0 nats at most, KL 0;" in checklist
    assert not trained.finished.lines()
    assert "Warning:" not in trained.finished.stderr.replace("Warning: NUMA binding:", "")


def test_wandb_wrote_offline(trained: TrainingRun) -> None:
    assert len(list((trained.folder / "wandb").glob("offline-run-*/run-*.wandb"))) == 1


def test_evaluate_finds_the_same_rates_on_the_exported_checkpoint(
    root: Path, trained: TrainingRun
) -> None:
    """The same seeds on the same weights: one rank here, two in the run that wrote them."""
    settings = evaluation_settings(root, trained, evaluation__suites_folder=root)
    output = root / "evaluated"
    finished = alone("evaluate", "--suite", "held_out", "--output", output, "--json", *settings)
    assert finished.status == 0, finished.stderr
    found = json.loads(finished.stdout)
    assert found["model"] == str(trained.model)
    result = found["suites"]["held_out"]["result"]
    assert result["questions"] == 16
    for k in (1, 8):
        assert result["pass_at"][str(k)] == trained.summary[f"pass_at_{k}"]["after"]
    assert result["greedy"] == trained.summary["greedy"]["after"]
    kept = (output / "generations" / "held_out.jsonl").read_text().splitlines()
    assert len(kept) == 16 * (8 + 1)
    assert json.loads((output / "results.json").read_text()) == found
    assert "held_out avg@8" in (output / "table.md").read_text()


def test_transformers_and_vllm_write_the_same_greedy_text(
    root: Path, trained: TrainingRun, greedy_of_vllm: list[dict[str, Any]]
) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(trained.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(trained.model)
    prompts = load_prompts(
        root / "held_out.jsonl",
        load_tokenizer(trained.model),
        None,
        max_total_tokens=toy.WINDOW,
    )
    assert len(prompts) == len(greedy_of_vllm) == 16
    for prompt, answer in zip(prompts, greedy_of_vllm, strict=True):
        assert list(prompt.tokens) == answer["prompt"]
        inputs = torch.tensor([prompt.tokens])
        outputs = model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=16,
            do_sample=False,
        )[0, len(prompt.tokens) :]
        assert outputs.tolist() == answer["response"]
        assert tokenizer.decode(outputs, skip_special_tokens=True) == answer["text"]


def test_a_profile_tells_of_the_iteration_that_was_asked_for(trained: TrainingRun) -> None:
    (iteration,) = (trained.folder / "profile").iterdir()
    assert iteration.name == f"iteration_{FIRST_UPDATE:06d}"
    memory = json.loads((iteration / "rank_0.memory.json").read_text())
    phases = [row["phase"] for row in memory]
    assert phases[:2] == ["generate", "verify"]
    traced = ["token_rm", "reference", "policy", "sync"]
    assert [phase for phase in phases if phase in traced] == traced
    traces = {path.name for path in iteration.glob("rank_0.*.trace.json.gz")}
    assert traces == {f"rank_0.{phase}.trace.json.gz" for phase in traced}


def test_exported_weights_have_moved(trained: TrainingRun, fine_tuning: FineTuning) -> None:
    before, after = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
        for folder in (fine_tuning.model, trained.model)
    )
    assert before.keys() == after.keys()
    assert all(not torch.equal(before[name], after[name]) for name in before)


def test_trivial_batches_take_no_step_and_the_schedule_goes_on(hopeless: TrainingRun) -> None:
    assert [line["iteration"] for line in hopeless.train] == [0, 1, 2]
    for line in hopeless.train:
        assert line["rollout/all_incorrect_share"] == 1
        assert line["oreal/trajectories"] == 0
        assert not {"oreal/loss", "oreal/grad_norm", "token_rm/loss"} & line.keys()
    assert hopeless.summary["pass_at_1"] == {"after": 0.0}
    assert not {"token_rm", "policy"} & hopeless.summary["seconds"].keys()
    # The start pushes once.
    assert ["time/sync_s" in line for line in hopeless.train] == [True, False, False]


def test_trivial_batches_leave_the_weights_bit_for_bit(hopeless: TrainingRun, root: Path) -> None:
    before, after = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
        for folder in (root / "model", hopeless.model)
    )
    assert all(torch.equal(before[name], after[name]) for name in before)


def documented() -> dict[str, str]:
    """Every metric of docs/metrics.md as a pattern, and when it is there."""
    rows = re.findall(r"^\| `(\S+/\S+)` \|.*\| (.+) \|$", METRICS.read_text(), re.MULTILINE)
    return {re.sub(r"<\w+>", r"\\w+", name): when for name, when in rows}


def test_every_metric_is_documented_and_every_documented_one_is_there(
    trained: TrainingRun, hopeless: TrainingRun, fine_tuning: FineTuning
) -> None:
    lines = {
        "iteration": trained.train + hopeless.train,
        "update": trained.train,
        "token_rm": trained.train,
        "eval": trained.evaluations,
        "sft": fine_tuning.metrics,
        "if any": [],
    }
    patterns = documented()
    for line in [line for group in lines.values() for line in group]:
        found = {name for name in line if "/" in name}
        assert not [n for n in found if not any(re.fullmatch(p, n) for p in patterns)]
    for pattern, when in patterns.items():
        for line in lines[when]:
            assert any(re.fullmatch(pattern, name) for name in line), (pattern, line)
