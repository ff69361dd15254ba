from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_oreal.config.errors import UserError
from megatron_oreal.monitor.metrics import merge, read_metrics, to_json

if TYPE_CHECKING:
    from pathlib import Path


def test_merge_makes_floats_and_refuses_a_name_twice() -> None:
    assert merge({"a/x": 1}, {"b/x": 2.5}) == {"a/x": 1.0, "b/x": 2.5}
    with pytest.raises(ValueError, match="metrics given twice: a/x"):
        merge({"a/x": 1.0}, {"a/x": 1.0})


def test_numbers_that_are_not_finite_become_strings() -> None:
    record = {"a": math.nan, "b": [math.inf, {"c": -math.inf}], "d": (1.5, None)}
    assert to_json(record) == '{"a": "nan", "b": ["inf", {"c": "-inf"}], "d": [1.5, null]}'


@given(st.text(st.characters(codec=None)), st.floats())
def test_any_text_and_number_is_one_line_of_strict_utf8_json(text: str, number: float) -> None:
    line = to_json({"text": text, "number": number})
    assert "\n" not in line
    record = json.loads(line.encode("utf-8"), parse_constant=pytest.fail)
    assert float(record["number"]) == number or math.isnan(number)


def write(path: Path, *lines: str) -> Path:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def test_the_last_line_of_an_iteration_counts(tmp_path: Path) -> None:
    path = write(
        tmp_path / "metrics.jsonl",
        '{"kind": "train", "iteration": 0, "a/x": 1.0}',
        '{"kind": "train", "iteration": 1, "a/x": "nan"}',
        '{"kind": "eval", "iteration": 1, "eval/greedy": 0.5}',
        '{"kind": "train", "iteration": 1, "a/x": "-inf"}',
    )
    records = read_metrics(path)
    assert [(r["kind"], r["iteration"]) for r in records] == [
        ("train", 0),
        ("eval", 1),
        ("train", 1),
    ]
    assert records[2]["a/x"] == -math.inf


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not a line of JSON"),
        ("[" * 100_000, "not a line of JSON"),
        ("[]", "no object with kind"),
        ("{}", "no object with kind"),
        ('{"kind": "test", "iteration": 0}', "no object with kind"),
        ('{"kind": ["train"], "iteration": 0}', "no object with kind"),
        ('{"kind": "train", "iteration": "0"}', "no object with kind"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = write(tmp_path / "m.jsonl", '{"kind": "train", "iteration": 0}', line)
    with pytest.raises(UserError, match=rf"m\.jsonl:2: {message}"):
        read_metrics(path)


def test_a_line_that_is_being_written_is_left_for_the_next_time(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text('{"kind": "train", "iteration": 0}\n{"kind": "tr')
    assert [record["iteration"] for record in read_metrics(path)] == [0]
