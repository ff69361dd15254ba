from __future__ import annotations

import pytest

from megatron_oreal.data.prompts import QuestionRecord
from megatron_oreal.data.report import answer_kind, balance_of_tenth, report_on


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        ("-12", "integer"),
        ("1,000", "integer"),
        ("$10{,}000$", "integer"),
        ("0.5", "decimal"),
        (r"\frac{1}{2}", "fraction"),
        (r"\frac12", "fraction"),
        ("3/4", "fraction"),
        (r"\text{(B)}", "choice"),
        ("1, 2", "several values"),
        (r"[0,1]\cup[2,3]", "several values"),
        (r"2\sqrt{3}", "expression"),
        ("x", "words"),
        ("Monday", "words"),
    ],
)
def test_kinds_of_answers(answer: str, kind: str) -> None:
    assert answer_kind(answer) == kind


def test_counts() -> None:
    rates = [0.0, 0.3, 0.79, 0.8, 1.0, None]
    report = report_on(
        [
            QuestionRecord("one two three"[: 3 + 4 * (i % 2)], "1", None, rate, "amc" * (i > 0))
            for i, rate in enumerate(rates)
        ]
    )
    assert report.questions == 6
    assert report.sources == {"amc": 5, "none given": 1}
    assert report.answers == {"integer": 6}
    assert report.words == {"p0": 1, "p5": 1, "p50": 1, "p95": 2, "p100": 2}
    filled = {tenth: count for tenth, count in report.pass_rates.items() if count}
    assert filled == {"0.0-0.1": 1, "0.3-0.4": 1, "0.7-0.8": 1, "0.8-0.9": 1, "0.9-1.0": 1}
    assert report.without_pass_rate == 1
    # Six times, four, two, never, never, once.
    assert (report.per_epoch, report.dropped) == (13, 2)


def test_an_epoch_asks_by_the_tenth() -> None:
    asked = [balance_of_tenth(f"{i / 10:.1f}-{(i + 1) / 10:.1f}") for i in range(10)]
    assert asked == [6, 6, 4, 4, 4, 4, 2, 2, 0, 0]


def test_without_pass_rates_there_is_no_histogram() -> None:
    assert report_on([QuestionRecord("q", "1")]).pass_rates == {}
