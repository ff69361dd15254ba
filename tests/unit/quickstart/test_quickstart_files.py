"""The quickstart's problems are right, apart, and alike for a seed; its tokenizer loses nothing."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.quickstart import make_model, problems, table
from megatron_oreal.config.schema import VerifierConfig
from megatron_oreal.types import Outcome
from megatron_oreal.verify.cascade import Answer, Verifier

SIZES = {"held_out": 40, "training": 60, "demonstrations": 200}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    problems.write(folder, 3, **SIZES)
    return folder


def lines(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def value(expression: str) -> int:
    """Products before sums, by hand: the problems hold one kind of sign only, or plus and minus."""
    words = expression.split()
    total = int(words[0])
    for sign, number in zip(words[1::2], words[2::2], strict=True):
        total = {"+": total + int(number), "-": total - int(number), "*": total * int(number)}[sign]
    return total


def test_no_question_is_in_two_files_or_twice_in_one(data: Path) -> None:
    files = {path.stem: [q["question"] for q in lines(path)] for path in data.iterdir()}
    assert {name: len(questions) for name, questions in files.items()} == {
        "eval": 40,
        "train": 60,
        "sft": 200,
    }
    everything = [question for questions in files.values() for question in questions]
    assert len(set(everything)) == len(everything)


def test_products_and_sums_are_never_mixed_so_that_left_to_right_is_right(data: Path) -> None:
    for question in lines(data / "train.jsonl"):
        signs = set(question["question"].split()[1::2])
        assert signs <= {"+", "-"} or signs == {"*"}


def test_gold_answers_are_the_values(data: Path) -> None:
    for question in lines(data / "eval.jsonl") + lines(data / "train.jsonl"):
        assert question["gold_answer"] == str(value(question["question"]))


def test_steps_follow_from_each_other_and_one_in_four_is_off_by_one(data: Path) -> None:
    errors = []
    for demonstration in lines(data / "sft.jsonl"):
        *steps, boxed = demonstration["response"].split(";")
        left, results = [], []
        for step in steps:
            expression, result = step.split("=")
            first, sign, number = re.fullmatch(r"(-?\d+)([-+*])(\d+)", expression).groups()  # pyright: ignore[reportOptionalMemberAccess]
            errors.append(int(result) - value(f"{first} {sign} {number}"))
            left.append(first)
            results.append(result)
        assert left[1:] == results[:-1]
        assert boxed == f"\\boxed{{{results[-1]}}}"
    assert set(errors) == {-1, 0, 1}
    assert 0.2 < sum(map(abs, errors)) / len(errors) < 0.3


def test_a_worked_example() -> None:
    slips = random.Random(0)
    assert problems.work_out("7 + 5 - 9", slips, share=0) == r"7+5=12;12-9=3;\boxed{3}"
    first = problems.work_out("7 + 5 - 9", slips, share=1).split(";")[0]
    assert first in ("7+5=11", "7+5=13")


def test_the_verifier_takes_careful_work_for_correct_and_a_slip_for_incorrect(data: Path) -> None:
    questions = lines(data / "eval.jsonl")[:6]
    answers = [
        Answer(
            gold=question["gold_answer"],
            response=problems.work_out(question["question"], random.Random(0), share=share),
            stopped=True,
        )
        for question in questions
        for share in (0, 1)
    ]
    slipped = [f"\\boxed{{{answer.gold}}}" not in answer.response for answer in answers]
    with Verifier(VerifierConfig()) as verifier:
        outcomes = [verdict.outcome for verdict in verifier.judge(answers)]
    assert outcomes == [Outcome.INCORRECT if slip else Outcome.CORRECT for slip in slipped]
    assert any(slipped)


def test_a_seed_gives_the_same_files_and_another_seed_others(data: Path, tmp_path: Path) -> None:
    for name, seed in (("same", 3), ("other", 4)):
        problems.write(tmp_path / name, seed, **SIZES)
    for file in ("eval.jsonl", "train.jsonl", "sft.jsonl"):
        text = (data / file).read_text()
        assert (tmp_path / "same" / file).read_text() == text
        assert (tmp_path / "other" / file).read_text() != text


def test_the_tokenizer_gives_back_every_text_of_the_task(data: Path, tmp_path: Path) -> None:
    make_model.make_tokenizer().save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    for demonstration in lines(data / "sft.jsonl"):
        for text in demonstration.values():
            ids = tokenizer.encode(text, add_special_tokens=False)
            assert tokenizer.decode(ids) == text
            assert len(ids) == len(text)  # a character each: nothing is unknown or merged
    chat = [{"role": "user", "content": "1 + 2"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert prompt == "<user>1 + 2<assistant>"
    assert tokenizer.decode([tokenizer.eos_token_id]) == "<end>"


def test_the_model_is_small_drawn_from_its_seed_and_loadable(tmp_path: Path) -> None:
    tokenizer = make_model.make_tokenizer()
    first, same, other = (make_model.make_model(tokenizer, seed) for seed in (0, 0, 1))
    pairs = zip(first.parameters(), same.parameters(), other.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b, _ in pairs)
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)
    assert 2e6 < sum(p.numel() for p in first.parameters()) < 8e6
    first.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded.lm_head.weight, first.lm_head.weight)


def test_the_table_of_seeds_holds_each_run_and_mean_min_max(tmp_path: Path) -> None:
    for seed, after in ((0, 0.5), (1, 0.7)):
        folder = tmp_path / f"seed_{seed}" / "oreal"
        folder.mkdir(parents=True)
        summary = {
            "seed": seed,
            "pass_at_1": {"before": 0.25, "after": after},
            "pass_at_8": {"before": 0.5, "after": 0.75},
            "seconds": {"generate": 60.0, "policy": 30.0},
        }
        (folder / "summary.json").write_text(json.dumps(summary))
    written = table.table(sorted(tmp_path.iterdir())).splitlines()
    assert written[2] == "| OREAL | 0 | 25.0 | 50.0 | +25.0 | 50.0 | 75.0 | 1.5 |"
    assert written[4:] == [
        "| OREAL | mean | 25.0 | 60.0 | +35.0 | 50.0 | 75.0 | 1.5 |",
        "| OREAL | min | 25.0 | 50.0 | +25.0 | 50.0 | 75.0 | 1.5 |",
        "| OREAL | max | 25.0 | 70.0 | +45.0 | 50.0 | 75.0 | 1.5 |",
    ]
