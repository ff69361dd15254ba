"""Tables of an evaluation: for the console, and in markdown for a paper."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.table import Table

from megatron_oreal.algorithm.statistics import Interval

if TYPE_CHECKING:
    from megatron_oreal.trainer.evaluation_files import EvaluationRecord
    from megatron_oreal.trainer.scores import SuiteScore


def percent(value: float, interval: Interval | None = None, *, sign: str = "") -> str:
    """Returns `41.7 [35.0, 48.3]`, in percent."""
    shown = f"{100 * value:{sign}.1f}"
    if interval is None:
        return shown
    return f"{shown} [{100 * interval.low:{sign}.1f}, {100 * interval.high:{sign}.1f}]"


def suite_table(record: EvaluationRecord) -> Table:
    """Draws one row a suite; intervals are of 95 percent, over resampled questions."""
    table = Table(title=record.model)
    for column in ("suite", "questions", "n", "avg@n", "pass@k", "greedy", "cut", "unverified"):
        justify = "left" if column == "suite" else "right"
        table.add_column(column, justify=justify, no_wrap=column == "avg@n")
    for name, suite in record.suites.items():
        result = suite.result
        table.add_row(
            name,
            str(result.questions),
            str(result.samples_per_question),
            percent(result.pass_at[1], suite.intervals[1]),
            _pass_at(suite),
            "" if result.greedy is None else percent(result.greedy),
            percent(result.truncated_share),
            percent(result.unverified_share),
        )
    return table


def category_table(record: EvaluationRecord) -> Table:
    """Draws one row a category of each suite."""
    table = Table("suite", "category", title="avg@n by category, percent")
    table.add_column("questions", justify="right")
    table.add_column("avg@n", justify="right")
    for row in _category_rows(record):
        table.add_row(*row)
    return table


def markdown(record: EvaluationRecord) -> str:
    """Returns the tables as markdown, with what a reader must know of them."""
    columns = [
        f"{name} avg@{suite.result.samples_per_question}" for name, suite in record.suites.items()
    ]
    cells = [percent(s.result.pass_at[1], s.intervals[1]) for s in record.suites.values()]
    settings = ", ".join(f"{name} {value:g}" for name, value in record.settings.items())
    rows = [
        (name, str(s.result.questions), _pass_at(s), percent(s.result.truncated_share))
        for name, s in record.suites.items()
    ]
    return "\n".join(
        [
            rows_as_markdown(["model", *columns], [[record.model, *cells]]),
            "Percent of responses that are correct, mean over questions; in brackets 95 percent"
            " bootstrap intervals over questions. Responses that nobody could decide count as not"
            f" correct. {settings}.\n",
            rows_as_markdown(["suite", "questions", "pass@k", "cut, percent"], rows),
            rows_as_markdown(["suite", "category", "questions", "avg@n"], _category_rows(record)),
        ]
    )


def rows_as_markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a table in markdown, an empty line after it."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _category_rows(record: EvaluationRecord) -> list[tuple[str, str, str, str]]:
    return [
        (suite, name, str(found.questions), percent(found.average, found.interval))
        for suite, whole in record.suites.items()
        for name, found in whole.categories.items()
    ]


def _pass_at(suite: SuiteScore) -> str:
    rates = suite.result.pass_at.items()
    return ", ".join(f"@{k} {percent(rate)}" for k, rate in rates if k > 1)
