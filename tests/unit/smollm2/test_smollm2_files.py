"""The questions of the SmolLM2 example are right and well chosen; its table adds up."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from examples.smollm2 import plot, problems
from megatron_oreal.config.load import load_config, resolve_config_yaml
from tests.unit.quickstart.test_quickstart_files import value

EXAMPLE = Path(__file__).parents[3] / "examples" / "smollm2"
PATHS = ["model.path=m", "data.path=d", "evaluation.path=e"]


def test_no_question_is_asked_twice_and_gold_answers_are_the_values() -> None:
    questions = problems.pool(3, 80)
    assert len({question["question"] for question in questions}) == 80
    assert {question["category"] for question in questions} == set(problems.KINDS)
    for question in questions:
        expression = re.search(r"\d+( [-+*] \d+)+", question["question"])
        assert expression
        assert question["gold_answer"] == str(value(expression[0]))


def test_a_seed_gives_the_same_questions_and_another_seed_others() -> None:
    assert problems.pool(3, 40) == problems.pool(3, 80)[:40]
    assert problems.pool(3, 40) != problems.pool(4, 40)


def test_questions_within_the_bounds_are_chosen_none_for_both_files() -> None:
    rates = [0.0, 0.1, 0.3, 0.6, 0.7, None]
    rated = [{"id": i, "pass_rate": rate} for i, rate in enumerate(rates) if rate is not None]
    rated.append({"id": 5})  # could not be judged
    held_out, training = problems.choose(rated, 0, 2)
    assert len(held_out) == 2
    assert sorted(line["id"] for line in held_out + training) == [1, 2, 3]
    with pytest.raises(ValueError, match=r"3 of 6 questions .* too few to hold out 3"):
        problems.choose(rated, 0, 3)


@pytest.mark.parametrize("name", ["oreal", "cpu"])
def test_configs_are_whole(name: str) -> None:
    config = load_config([EXAMPLE / f"{name}.yaml"], PATHS)
    assert config.oreal.token_weights.kind == "threshold"
    assert config.evaluation.at_start
    assert config.evaluation.at_end


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Three iterations, of which the first is left out of speeds, between two evaluations."""
    config = load_config([EXAMPLE / "cpu.yaml"], PATHS)
    (tmp_path / "config.yaml").write_text(resolve_config_yaml(config))
    train = {
        "kind": "train",
        "rollout/response_length_mean": 10.0,
        "rollout/pass_rate": 0.5,
        "time/iteration_s": 9.0,
        "time/wall_s": 10.0,
        "time/start_s": 1.0,
        "time/generate_s": 4.0,
        "time/policy_s": 3.0,
        "time/sync_s": 1.0,
        "oreal/positive_tokens": 20.0,
        "oreal/negative_tokens": 40.0,
        "oreal/kl_k3": 0.0,
    }
    written: list[dict[str, Any]] = [
        {"kind": "eval", "iteration": 0, "eval/pass_at_1": 0.25, "eval/greedy": 0.5},
        {**train, "iteration": 0, "time/generate_s": 1000.0},
        *({**train, "iteration": i} for i in (1, 2)),
        {"kind": "eval", "iteration": 3, "eval/pass_at_1": 0.5},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in written))
    return tmp_path


def test_the_table_holds_both_evaluations_and_the_speed_of_each_phase(run: Path) -> None:
    # 8 questions x 8 responses of 10 tokens in 4 s; 60 trained tokens in 3 s
    assert plot.table(plot.read_run(run)).splitlines() == [
        "| after iterations | pass@1 | greedy |",
        "| --- | --- | --- |",
        "| 0 | 25.0 | 50.0 |",
        "| 3 | 50.0 |  |",
        "",
        "| phase | s | share | tokens/s |",
        "| --- | --- | --- | --- |",
        "| generate | 4.00 | 50.0 | 160 |",
        "| policy | 3.00 | 37.5 | 20 |",
        "| sync | 1.00 | 12.5 |  |",
    ]


def test_the_picture_is_drawn_of_a_run_that_has_just_begun_too(run: Path) -> None:
    plot.draw(plot.read_run(run), run / "run.png")
    assert (run / "run.png").read_bytes().startswith(b"\x89PNG")
    (run / "metrics.jsonl").write_text("")
    begun = plot.read_run(run)
    assert plot.table(begun).endswith("| --- | --- | --- | --- |")
    plot.draw(begun, run / "run.png")
