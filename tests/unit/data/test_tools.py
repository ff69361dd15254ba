"""The data tools, as their command lines run them."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest

from tests.unit.data.conftest import write_jsonl

TOOLS = Path(__file__).parents[3] / "tools"
QUESTIONS = (
    {"question": "What is $1+1$?", "answer": 2, "pass_rate": 0.5, "data_source": "made"},
    {"question": "what is 1 + 1", "answer": "2"},
    {"question": "Which day follows Monday?", "answer": "Tuesday"},
)


def run(tool: str, *arguments: object) -> int:
    return runpy.run_path(str(TOOLS / f"{tool}.py"))["main"]([*map(str, arguments)])


@pytest.fixture
def source(tmp_path: Path) -> str:
    return f"data.path={write_jsonl(tmp_path / 'q.jsonl', *QUESTIONS)}"


def test_clean_questions(source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    held_out = write_jsonl(
        tmp_path / "h.jsonl", {"question": QUESTIONS[2]["question"], "gold_answer": "?"}
    )
    arguments = (source, "data.columns.gold_answer=answer", "--held-out", held_out)
    output = tmp_path / "clean.jsonl"
    assert run("clean_questions", *arguments, "--output", output, "--json") == 0
    counts = json.loads(capsys.readouterr().out)
    assert counts == {
        "read": 3,
        "written": 1,
        "duplicate": 1,
        "contradiction": 0,
        "near_duplicate": 0,
        "held_out": 1,
    }
    (kept,) = map(json.loads, output.read_text().splitlines())
    assert kept == {
        "id": "line-1",
        "question": "What is $1+1$?",
        "gold_answer": "2",
        "pass_rate": 0.5,
        "data_source": "made",
    }
    removed = map(json.loads, (tmp_path / "clean.removed.jsonl").read_text().splitlines())
    assert [(line["id"], line["removed"]["other"]) for line in removed] == [
        ("line-2", "line-1"),
        ("line-3", "h line-1"),
    ]


def test_data_report(source: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("data_report", source, "data.columns.gold_answer=answer") == 0
    assert "3 questions" in capsys.readouterr().out
    assert run("data_report", source, "data.columns.gold_answer=answer", "--json") == 0
    assert json.loads(capsys.readouterr().out)["per_epoch"] == 6


@pytest.mark.parametrize("tool", ["clean_questions", "data_report"])
def test_a_wrong_column_is_one_line(
    tool: str, source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = ("--output", tmp_path / "clean.jsonl") if tool == "clean_questions" else ()
    assert run(tool, source, *output) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{tool}: data.path=")
    assert line.endswith("set data.columns.gold_answer")
    assert not (tmp_path / "clean.jsonl").exists()
