"""The audit of the verifier, as its command line runs it."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[3] / "tools" / "audit_verifier.py"
LINES = [
    {"question": "2+3", "gold": "5", "response": r"\boxed{5}", "label": "correct"},
    {"question": "2+3", "gold": "5", "response": r"\boxed{6}", "label": "correct"},
    {"question": "2+3", "gold": "5", "response": r"\boxed{6}"},
    {"question": "2+3", "gold": "5", "response": r"\boxed{\text{five}}", "label": "correct"},
    {"question": "2+3", "gold": "5", "response": r"\boxed{5}", "stopped": False},
]


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("audit") / "answers.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in LINES))
    return path


def run(*arguments: object) -> int:
    spec = importlib.util.spec_from_file_location("audit_verifier", TOOL)
    assert spec is not None
    assert spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = tool  # where msgspec looks up the names in annotations
    spec.loader.exec_module(tool)
    return tool.main([str(argument) for argument in arguments])


def test_json_has_a_row_for_each_line_in_order(
    answers: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    doubtful = answers.with_name("doubtful.jsonl")
    assert run(answers, "--workers", 1, "--json", "--doubtful", doubtful) == 0
    said = json.loads(capsys.readouterr().out)
    assert [(row["verdict"], row["by"], row["extracted"]) for row in said["rows"]] == [
        ("correct", "rule", "5"),
        ("incorrect", "rule", "6"),
        ("incorrect", "rule", "6"),
        ("unverified", "rule", r"\text{five}"),
        ("incorrect", "format", None),
    ]
    assert all(row["reason"] and row["seconds"] >= 0 for row in said["rows"])
    assert said["confusion"] == {
        "correct": {"correct": 1, "incorrect": 1, "unverified": 1},
        "unlabelled": {"incorrect": 2},
    }
    assert said["unverified_share"] == 0.2
    written = [json.loads(line) for line in doubtful.read_text().splitlines()]
    assert [row["line"] for row in written] == [2, 4]


def test_the_tables_are_printed(answers: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(answers, "--workers", 1) == 0
    out = capsys.readouterr().out
    assert "label against verdict" in out
    assert "5 answers, 20.0% unverified, 2 doubtful" in out


def test_a_users_mistake_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path / "none.jsonl") == 2
    assert capsys.readouterr().err.startswith("audit_verifier: answers=")
