"""The suite of the project: its form, and every gold answer against one found another way."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction
from pathlib import Path

import pytest
import sympy

from megatron_oreal.data.prompts import QuestionRecord
from megatron_oreal.data.records import read_records
from megatron_oreal.types import Outcome
from megatron_oreal.verify.equivalence import compare
from megatron_oreal.verify.protocol import Pair
from tests.unit.suites.mixed48 import ANSWERS

SUITE = Path(__file__).parents[3] / "suites" / "mixed48.jsonl"
RECORDS = [row.record for row in read_records(SUITE, "suite", QuestionRecord)]


def test_six_categories_of_eight() -> None:
    assert len({record.question for record in RECORDS}) == 48
    assert set(Counter(record.category for record in RECORDS).values()) == {8}
    assert [record.id for record in RECORDS] == list(ANSWERS)


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: record.id)
def test_the_gold_answer_is_right_and_the_verifier_reads_it(record: QuestionRecord) -> None:
    answer = ANSWERS[str(record.id)]()
    if isinstance(answer, int | Fraction):
        answer = sympy.Rational(answer.numerator, answer.denominator)
    compared = compare(Pair(str(record.gold_answer), sympy.latex(answer)))
    assert compared.outcome is Outcome.CORRECT, (record.gold_answer, answer)
