"""Scores, tables and comparisons on two questions with responses that a person can count."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_oreal.cli import main
from megatron_oreal.config.errors import UserError
from megatron_oreal.trainer.compare import as_markdown, compare_folders
from megatron_oreal.trainer.evaluation import Evaluation, summarise
from megatron_oreal.trainer.evaluation_files import FORMAT, EvaluationFolder, EvaluationRecord
from megatron_oreal.trainer.scores import CategoryScore, Interval, score
from megatron_oreal.types import Outcome, Prompt, Rollout, RolloutGroup, Verdict

OUTCOMES = {"+": Outcome.CORRECT, "-": Outcome.INCORRECT, "?": Outcome.UNVERIFIED}


def group(name: str, outcomes: str, category: str = "") -> RolloutGroup:
    return RolloutGroup(
        Prompt(name, "1+1", "2", (1,), category=category),
        tuple(Rollout((7, 8), (0.0, 0.0), f"r{i}", i > 0) for i in range(len(outcomes))),
        tuple(Verdict(OUTCOMES[sign], "rule", "", "2", 0.0) for sign in outcomes),
    )


def evaluation(*groups: RolloutGroup) -> Evaluation:
    greedy = [group(one.prompt.id, "+" if i == 0 else "-") for i, one in enumerate(groups)]
    return Evaluation(summarise(groups, (1, 2), 0.5, 3.0), list(groups), greedy)


EASY, HARD = group("a", "++++", "algebra"), group("b", "-+?-", "counting")


def write(root: Path, *groups: RolloutGroup) -> EvaluationFolder:
    folder = EvaluationFolder(root)
    folder.create("run:\n")
    found = evaluation(*groups)
    folder.write_generations("small", found)
    scores = {"small": score(found, seed=0)}
    folder.write_results(EvaluationRecord(FORMAT, "models/x", {"temperature": 1.0}, scores))
    return folder


def test_questions_categories_and_intervals() -> None:
    found = score(evaluation(EASY, HARD), seed=0)
    assert [(q.id, q.correct, q.unverified, q.greedy) for q in found.questions] == [
        ("a", 4, 0, True),
        ("b", 1, 1, False),
    ]
    assert found.result.pass_at == {1: (1 + 0.25) / 2, 2: (1 + 0.5) / 2}
    # Two questions: resampled means are 0.25, 0.625 and 1, in a quarter, a half and a quarter.
    assert found.intervals[1] == Interval(0.25, 1.0)
    assert found.categories == {
        "algebra": CategoryScore(1, 1.0, Interval(1.0, 1.0)),
        "counting": CategoryScore(1, 0.25, Interval(0.25, 0.25)),
    }


def test_everything_is_kept_and_reads_back(tmp_path: Path) -> None:
    folder = write(tmp_path / "e", EASY, HARD)
    record = folder.read_results()
    assert record.suites["small"] == score(evaluation(EASY, HARD), seed=0)
    lines = [
        json.loads(line)
        for line in (tmp_path / "e/generations/small.jsonl").read_text().splitlines()
    ]
    assert [(line["id"], line["sample"], line["greedy"]) for line in lines] == [
        *((name, sample, False) for name in "ab" for sample in range(4)),
        ("a", 0, True),
        ("b", 0, True),
    ]
    assert [line["outcome"] for line in lines[4:8]] == [OUTCOMES[sign].value for sign in "-+?-"]
    assert (lines[0]["response"], lines[0]["stopped"], lines[0]["tokens"]) == ("r0", False, 2)
    table = (tmp_path / "e/table.md").read_text()
    assert "| model | small avg@4 |\n| --- | --- |\n| models/x | 62.5 [25.0, 100.0] |\n" in table
    assert "| small | counting | 1 | 25.0 [25.0, 25.0] |" in table
    with pytest.raises(UserError, match="holds an evaluation already"):
        folder.create("")


def test_a_comparison_is_of_pairs(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    write(a, EASY, HARD)
    write(b, group("b", "++++"), EASY)
    (found,) = compare_folders(a, b, 1)
    assert (found.questions, found.a, found.b) == (2, 0.625, 1.0)
    # Only one question differs: of its two signs, each is as far from 0.
    assert (found.difference.mean, found.difference.p_value) == (0.375, 1.0)
    row = "| small | 2 | 62.5 | 100.0 | +37.5 [+0.0, +75.0] | 1 |"
    assert row in as_markdown([found])


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = str(write(tmp_path / "a", EASY).root), str(write(tmp_path / "b", EASY).root)
    assert main(["compare", a, b, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["difference"]["p_value"] == 1.0
    assert main(["compare", a, b, "--k", "2", "--markdown"]) == 0
    assert main(["compare", a, b]) == 0
    assert "small" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("other", "k", "says"),
    [
        ((group("c", "++++"),), 1, "2 questions stand in one evaluation only, such as a"),
        ((EASY,), 8, "small has 4 responses a question: set 4 or less"),
        ((), 1, "name the --output of an `evaluate` that ended"),
    ],
)
def test_what_cannot_be_compared(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    other: tuple[RolloutGroup, ...],
    k: int,
    says: str,
) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    write(a, EASY)
    if other:
        write(b, *other)
    assert main(["compare", str(a), str(b), "--k", str(k)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert says in line


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", EASY)
    whole = folder.results.read_text()
    folder.results.write_text(whole.replace('"format": 1', '"format": 2'))
    with pytest.raises(UserError, match="has format 2, this version reads 1"):
        folder.read_results()
    folder.results.write_text(whole[:100])
    with pytest.raises(UserError, match=r"results\.json: .*: evaluate again"):
        folder.read_results()
