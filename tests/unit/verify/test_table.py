"""Every kind of answer, both polarities, from a table; `why` marks where math-verify differs."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from math_verify import parse, verify

from megatron_oreal.types import Outcome
from megatron_oreal.verify.equivalence import compare
from megatron_oreal.verify.extract import extract_answer
from megatron_oreal.verify.protocol import Pair

TABLE = Path(__file__).with_name("equivalence.jsonl")
ROWS = [json.loads(line) for line in TABLE.read_text(encoding="utf-8").splitlines()]
KINDS = """integer decimal fraction mixed percent rounding units thousands scientific radical
    constants complex tuple set interval union matrix equation inequality multipart choice text
    degrees algebra base dfrac text_command unicode unread""".split()  # noqa: SIM905


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row['kind']}: {row['gold']}")
def test_row(row: dict[str, str]) -> None:
    answer = extract_answer(row["response"], ())
    assert answer is not None
    comparison = compare(Pair(row["gold"], answer))
    assert comparison.outcome.value == row["expected"], comparison.reason


def test_the_table_covers_every_kind_both_ways() -> None:
    assert len(ROWS) >= 300
    seen = Counter((row["kind"], row["expected"]) for row in ROWS)
    assert {kind for kind, _ in seen} == set(KINDS)
    for kind in KINDS:
        if kind not in {"rounding", "unread"}:
            assert seen[kind, "correct"], kind
        if kind != "unread":
            assert seen[kind, "incorrect"], kind


MARKED = [row for row in ROWS if "math_verify" in row]


def test_where_math_verify_differs_the_reason_is_told() -> None:
    assert len(MARKED) > 50
    assert all(row["why"] for row in MARKED)


def by_math_verify(row: dict[str, str]) -> str:
    """What math-verify says when it is called directly, as its users do."""
    gold, answer = (
        parse(text, parsing_timeout=None) for text in (f"${row['gold']}$", row["response"])
    )
    return "correct" if verify(gold, answer, timeout_seconds=None) else "incorrect"


def test_math_verify_gets_the_marked_rows_wrong() -> None:
    for row in MARKED:
        assert by_math_verify(row) == row["math_verify"] != row["expected"], row


@pytest.mark.slow
def test_math_verify_gets_no_other_row_wrong() -> None:
    for row in ROWS:
        assert row in MARKED or by_math_verify(row) == row["expected"], row


@pytest.mark.parametrize(
    ("gold", "answer", "tolerance", "outcome"),
    [
        (r"\frac{1}{3}", "0.33", 0.02, Outcome.CORRECT),
        (r"\frac{1}{3}", "0.33", 0.001, Outcome.INCORRECT),
        (r"\sqrt{2}", "1.414", 0.001, Outcome.CORRECT),
        (r"\sqrt{2}", "1.414", 0.0, Outcome.INCORRECT),
        ("100", "101", 0.02, Outcome.INCORRECT),  # whole numbers are not rounded ones
    ],
)
def test_the_tolerance_is_for_decimals(
    gold: str, answer: str, tolerance: float, outcome: Outcome
) -> None:
    assert compare(Pair(gold, answer), tolerance).outcome is outcome
