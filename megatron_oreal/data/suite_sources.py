"""Public suites: where each is published, under which licence, and how it becomes our format."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import msgspec

from megatron_oreal.config.errors import UserError
from megatron_oreal.data.records import read_records, require_text

if TYPE_CHECKING:
    from pathlib import Path

_DOLLARS = re.compile(r"^\$([^$]*)\$$")
# The hub keeps Parquet copies of what is published in other forms on this branch.
_PARQUET = "refs%2Fconvert%2Fparquet"


@dataclass(frozen=True, slots=True)
class SuiteSource:
    """One published suite.

    Attributes:
        title: what it is.
        url: where it lies, as `sources.find_files` takes it.
        licence: as its card says.
        questions: how many there are; None where its card does not say.
        columns: the column of each field that has another name there.
    """

    title: str
    url: str
    licence: str
    questions: int | None
    columns: dict[str, str] = field(default_factory=dict)


SUITES = {
    "math500": SuiteSource(
        "MATH-500: 500 test problems of MATH (arXiv:2103.03874), chosen in arXiv:2305.20050",
        "hf://datasets/HuggingFaceH4/MATH-500/test.jsonl",
        "none on its card; MATH itself: MIT",
        500,
        {"question": "problem", "gold_answer": "answer", "id": "unique_id", "category": "subject"},
    ),
    "aime24": SuiteSource(
        "AIME 2024, I and II",
        "hf://datasets/HuggingFaceH4/aime_2024/data/train-*.parquet",
        "none on its card; problems of the MAA",
        30,
        {"question": "problem", "gold_answer": "answer"},
    ),
    "aime25": SuiteSource(
        "AIME 2025, I and II",
        "hf://datasets/opencompass/AIME2025/*.jsonl",
        "MIT on its card; problems of the MAA",
        30,
        {"gold_answer": "answer"},
    ),
    "livemath": SuiteSource(
        "LiveMathBench, hard, English, December 2024 (arXiv:2412.13147); log in: it is gated",
        f"hf://datasets/opencompass/LiveMathBench@{_PARQUET}/v202412_hard_en/**/*.parquet",
        "CC BY 4.0",
        None,
        {"gold_answer": "answer"},
    ),
    "olympiad": SuiteSource(
        "OlympiadBench, open questions without pictures, English mathematics (arXiv:2402.14008)",
        f"hf://datasets/Hothan/OlympiadBench@{_PARQUET}/OE_TO_maths_en_COMP/**/*.parquet",
        "Apache-2.0",
        674,
        {"gold_answer": "final_answer", "category": "subfield"},
    ),
}


class _Published(msgspec.Struct, frozen=True):
    question: str
    gold_answer: str | int | list[str]
    id: str | int | None = None
    category: str | int = ""


def convert(name: str, source: str | Path | None = None) -> list[dict[str, Any]]:
    """Returns the lines of a suite in our format.

    Args:
        name: One of `SUITES`.
        source: A copy of it, with its own column names; None for where it is published.

    Raises:
        UserError: It cannot be read, or a row lacks a question or an answer.
    """
    if name not in SUITES:
        raise UserError(f"{name}: no such suite; there are {', '.join(SUITES)}")
    suite = SUITES[name]
    rows = read_records(source or suite.url, f"suite {name}", _Published, suite.columns)
    lines = []
    for number, (where, _, record) in enumerate(rows, start=1):
        require_text(record.question, "question", where)
        line: dict[str, Any] = {"id": f"{name}-{number}" if record.id is None else str(record.id)}
        if record.category:
            line["category"] = str(record.category)
        line["question"] = record.question
        line["gold_answer"] = require_text(_answer(record.gold_answer), "gold_answer", where)
        lines.append(line)
    return lines


def _answer(answer: str | int | list[str]) -> str:
    """Returns one text: of several answers a list, of each what stands between its dollars."""
    several = answer if isinstance(answer, list) else [str(answer)]
    return ", ".join(_DOLLARS.sub(r"\1", part.strip()).strip() for part in several)
