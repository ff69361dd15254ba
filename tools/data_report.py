"""Says what a set of questions holds: sources, kinds of answers, lengths, pass rates.

tools/data_report.py data.path=hf://datasets/internlm/OREAL-RL-Prompts [--json]
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megatron_oreal.config.errors import UserError
from megatron_oreal.config.load import load_config
from megatron_oreal.data.prompts import QuestionRecord
from megatron_oreal.data.records import read_records
from megatron_oreal.data.report import DataReport, balance_of_tenth, report_on

BAR = 30


def main(arguments: list[str] | None = None) -> int:
    """Returns 0, or 2 and one line where a user can mend it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("settings", nargs="*", metavar="key=value", help="data.path, data.columns")
    parser.add_argument("--config", type=Path, action="append", default=[], metavar="FILE")
    parser.add_argument("--json", action="store_true", help="print one JSON object, no table")
    options = parser.parse_args(arguments)
    try:
        data = load_config(options.config, options.settings, optional=("model.path",)).data
        rows = read_records(data.path, "data.path", QuestionRecord, asdict(data.columns))
        report = report_on([row.record for row in rows])
    except UserError as error:
        print(f"data_report: {error}", file=sys.stderr)
        return 2
    if options.json:
        print(json.dumps(asdict(report)))
    else:
        _show(data.path, report)
    return 0


def _show(source: str, report: DataReport) -> None:
    console = Console()
    console.print(f"{report.questions} questions of {source}", markup=False, highlight=False)
    _counts(console, "source", report.sources)
    _counts(console, "answer", report.answers)
    console.print(_table("words of a question", {k: str(v) for k, v in report.words.items()}))
    if report.pass_rates:
        rates = Table("pass rate", "questions", "", "asked in an epoch")
        most = max(report.pass_rates.values())
        for tenth, count in report.pass_rates.items():
            times = f"{balance_of_tenth(tenth)}x"
            rates.add_row(tenth, str(count), "#" * round(BAR * count / most), times)
        console.print(rates)
    console.print(
        f"{report.without_pass_rate} without a pass rate; balanced by it, an epoch asks"
        f" {report.per_epoch} and never {report.dropped} of them"
    )


def _counts(console: Console, title: str, counts: dict[str, int]) -> None:
    console.print(_table(title, {name: str(count) for name, count in counts.items()}))


def _table(title: str, rows: dict[str, str]) -> Table:
    table = Table(title, "questions" if not title.startswith("words") else "count")
    for name, value in rows.items():
        table.add_row(name, value)
    return table


if __name__ == "__main__":
    sys.exit(main())
