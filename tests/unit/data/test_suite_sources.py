"""Small samples in the columns in which the suites are published, turned into our format."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest

from megatron_oreal.config.errors import UserError
from megatron_oreal.data.prompts import QuestionRecord
from megatron_oreal.data.records import read_records
from megatron_oreal.data.suite_sources import SUITES, convert
from tests.unit.data.conftest import write_jsonl
from tests.unit.data.test_sources import write_parquet

FETCH = Path(__file__).parents[3] / "tools" / "fetch_suites.py"
MATH500 = {
    "problem": "What is $1+1$?",
    "solution": "Two.",
    "answer": "2",
    "subject": "Algebra",
    "level": 1,
    "unique_id": "test/algebra/1.json",
}


def run(*arguments: object) -> int:
    return runpy.run_path(str(FETCH))["main"]([*map(str, arguments)])


def test_math500(tmp_path: Path) -> None:
    assert convert("math500", write_jsonl(tmp_path / "test.jsonl", MATH500)) == [
        {
            "id": "test/algebra/1.json",
            "category": "Algebra",
            "question": "What is $1+1$?",
            "gold_answer": "2",
        }
    ]


def test_aime(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", id=[60], problem=["p"], answer=["204"], url=["u"])
    assert convert("aime24", path) == [{"id": "60", "question": "p", "gold_answer": "204"}]
    path = write_jsonl(tmp_path / "b.jsonl", {"question": "q", "answer": "70"})
    assert convert("aime25", path) == [{"id": "aime25-1", "question": "q", "gold_answer": "70"}]


def test_olympiad_has_lists_of_answers(tmp_path: Path) -> None:
    path = write_parquet(
        tmp_path / "o.parquet",
        id=[1606, 1607],
        question=["p", "q"],
        final_answer=[["$2$ or $4$"], ["$3$", "$-\\frac{1}{2}$"]],
        subfield=["Algebra", "Geometry"],
    )
    answers = [line["gold_answer"] for line in convert("olympiad", path)]
    assert answers == ["$2$ or $4$", "3, -\\frac{1}{2}"]


def test_livemath(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "l.parquet", question=["q"], answer=["$\\pi$"])
    assert convert("livemath", path)[0]["gold_answer"] == "\\pi"


def test_the_tool_writes_a_suite_and_says_what_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = write_jsonl(tmp_path / "test.jsonl", MATH500)
    assert run("math500", "--from", copy, "--output", tmp_path / "suites") == 0
    assert "1 questions, not the 500 expected" in capsys.readouterr().out
    (row,) = read_records(tmp_path / "suites/math500.jsonl", "suite", QuestionRecord)
    assert (row.record.gold_answer, row.record.category) == ("2", "Algebra")
    about = json.loads((tmp_path / "suites/math500.json").read_text())
    assert (about["questions"], about["licence"]) == (1, SUITES["math500"].licence)


def test_bad_input_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for arguments, says in (
        (("math50",), "no such suite; there are math500, aime24"),
        (("math500", "--output", tmp_path), "the hub does not give it"),
        (("math500", "aime24", "--from", tmp_path), "is of one suite"),
    ):
        assert run(*arguments) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert says in line
    with pytest.raises(UserError, match="it has `question`, `answer`"):
        convert("math500", write_jsonl(tmp_path / "t.jsonl", {"question": "q", "answer": "2"}))


def test_without_a_name_it_lists_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert run() == 0
    assert "math500" in capsys.readouterr().out
