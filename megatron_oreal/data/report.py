"""What a set of questions holds: counts by source and kind of answer, lengths, pass rates."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_oreal.data.overlap import words_of
from megatron_oreal.data.sampler import PASS_RATE_BOUNDS, copies

if TYPE_CHECKING:
    from collections.abc import Sequence

    from megatron_oreal.data.prompts import QuestionRecord

PERCENTILES = (0, 5, 50, 95, 100)
_BINS = 10
_KINDS = {
    "integer": re.compile(r"[+-]?\d{1,3}(?:(?:,|\\,|\{,\})?\d{3})*|[+-]?\d+"),
    "decimal": re.compile(r"[+-]?\d*\.\d+"),
    "fraction": re.compile(r"[+-]?(?:\\[dt]?frac\s*(?:\{?\d+\}?)\s*\{?\d+\}?|\d+\s*/\s*\d+)"),
    "choice": re.compile(r"\(?(?:\\text\{)?\(?[A-E]\)?\}?\)?"),
    "several values": re.compile(r".*(?:,|;|\\cup|\\text\{\s*(?:and|or)\s*\}).*", re.DOTALL),
    "expression": re.compile(r".*[\\^_=+*/(){}\d].*", re.DOTALL),
}


@dataclass(frozen=True)
class DataReport:
    """The numbers of a set of questions.

    Attributes:
        questions: how many.
        sources: questions of each `data_source`, most first.
        answers: questions of each kind of answer, most first.
        words: percentiles of the questions' lengths, 0 5 50 95 100.
        pass_rates: questions in each tenth of the pass rate, 1 in the last; empty where none has
            one.
        without_pass_rate: questions that have none.
        per_epoch: questions that an epoch asks, where it repeats them by their pass rates.
        dropped: questions that such an epoch never asks.
    """

    questions: int
    sources: dict[str, int]
    answers: dict[str, int]
    words: dict[str, int]
    pass_rates: dict[str, int]
    without_pass_rate: int
    per_epoch: int
    dropped: int


def report_on(questions: Sequence[QuestionRecord]) -> DataReport:
    """Counts a set of questions, which must not be empty."""
    rates = [question.pass_rate for question in questions if question.pass_rate is not None]
    repeated = [copies(question.pass_rate) for question in questions]
    lengths = sorted(len(words_of(question.question)) for question in questions)
    return DataReport(
        questions=len(questions),
        sources=_counts([question.data_source or "none given" for question in questions]),
        answers=_counts([answer_kind(str(question.gold_answer)) for question in questions]),
        words={f"p{p}": _percentile(lengths, p) for p in PERCENTILES},
        pass_rates=_histogram(rates),
        without_pass_rate=len(questions) - len(rates),
        per_epoch=sum(repeated),
        dropped=repeated.count(0),
    )


def answer_kind(answer: str) -> str:
    """Returns what a gold answer looks like: integer, decimal, fraction, choice, ... or words."""
    plain = answer.strip().strip("$").strip()
    return next((kind for kind, form in _KINDS.items() if form.fullmatch(plain)), "words")


def _counts(values: list[str]) -> dict[str, int]:
    return dict(sorted(Counter(values).items(), key=lambda item: (-item[1], item[0])))


def _percentile(ordered: list[int], p: int) -> int:
    """Returns the nearest rank: the smallest value that p percent do not exceed."""
    return ordered[max(0, -(-p * len(ordered) // 100) - 1)]


def _histogram(rates: list[float]) -> dict[str, int]:
    if not rates:
        return {}
    # Counted in hundred-millionths: 0.3 * 10 must fall into the fourth tenth, not the third.
    bins = Counter(min(int(round(rate * 1e8) * _BINS // 10**8), _BINS - 1) for rate in rates)
    return {f"{i / _BINS:.1f}-{(i + 1) / _BINS:.1f}": bins[i] for i in range(_BINS)}


def balance_of_tenth(tenth: str) -> int:
    """Returns how often an epoch asks the questions of a tenth; bounds of copies are tenths."""
    assert all((bound * _BINS) % 1 == 0 for bound in PASS_RATE_BOUNDS)
    return copies(float(tenth.partition("-")[0]) + 0.5 / _BINS)
