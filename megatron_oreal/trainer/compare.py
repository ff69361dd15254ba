"""`megatron-oreal compare A B`: two evaluations on the same questions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean

from rich.table import Table

from megatron_oreal.algorithm.statistics import Difference, paired_difference
from megatron_oreal.config.errors import UserError
from megatron_oreal.trainer.evaluation_files import EvaluationFolder
from megatron_oreal.trainer.evaluation_tables import percent, rows_as_markdown
from megatron_oreal.trainer.scores import QuestionScore, values_of

COLUMNS = ("suite", "questions", "A", "B", "B - A", "p")


@dataclass(frozen=True)
class Comparison:
    """pass@k of two evaluations of one suite, 0 to 1, and what there is to their difference."""

    suite: str
    questions: int
    a: float
    b: float
    difference: Difference

    def row(self) -> tuple[str, ...]:
        """Returns what `COLUMNS` name, in percent."""
        found = self.difference
        return (
            self.suite,
            str(self.questions),
            percent(self.a),
            percent(self.b),
            percent(found.mean, found.interval, sign="+"),
            f"{found.p_value:.3g}",
        )


def compare_folders(a: Path, b: Path, k: int) -> list[Comparison]:
    """Compares each suite that both hold, question by question.

    Raises:
        UserError: A folder holds no evaluation, they share no suite, a suite has other questions,
            or fewer than k responses.
    """
    left, right = (EvaluationFolder(folder).read_results() for folder in (a, b))
    shared = [name for name in left.suites if name in right.suites]
    if not shared:
        has = f"{', '.join(left.suites)} and {', '.join(right.suites)}"
        raise UserError(f"{a} and {b} share no suite ({has}): evaluate both on one")
    return [
        _compare(name, left.suites[name].questions, right.suites[name].questions, k)
        for name in shared
    ]


def _compare(
    suite: str, a: Sequence[QuestionScore], b: Sequence[QuestionScore], k: int
) -> Comparison:
    least = min(question.samples for question in (*a, *b))
    if k > least:
        raise UserError(f"--k={k}: {suite} has {least} responses a question: set {least} or less")
    left, right = values_of(a, k), values_of(b, k)
    alone = sorted(left.keys() ^ right.keys())
    if alone:
        raise UserError(
            f"{suite}: {len(alone)} questions stand in one evaluation only, such as"
            f" {alone[0]:.80}: evaluate both on the same file and evaluation.max_questions"
        )
    pairs = [(left[name], right[name]) for name in left]
    first, second = ([pair[side] for pair in pairs] for side in (0, 1))
    difference = paired_difference(first, second)
    return Comparison(suite, len(pairs), fmean(first), fmean(second), difference)


def as_json(comparisons: Sequence[Comparison]) -> list[dict[str, object]]:
    """Returns the comparisons as plain JSON values."""
    return [asdict(comparison) for comparison in comparisons]


def as_markdown(comparisons: Sequence[Comparison]) -> str:
    """Returns the comparisons as a table in markdown."""
    return rows_as_markdown(COLUMNS, [comparison.row() for comparison in comparisons])


def as_table(comparisons: Sequence[Comparison], a: Path, b: Path, k: int) -> Table:
    """Draws the comparisons."""
    table = Table(title=f"A {a}\nB {b}\npass@{k}, percent")
    for column in COLUMNS:
        table.add_column(column, justify="left" if column == "suite" else "right")
    for comparison in comparisons:
        table.add_row(*comparison.row())
    return table
