r"""Removes repeated, contradictory and held-out questions and says which and why.

    python tools/clean_questions.py data.path=prompts.parquet data.columns.question=problem \
      --held-out suites/mixed48.jsonl --held-out math500.jsonl --output clean.jsonl

Reads whatever `data.path` may name and writes JSON lines as `data.path` takes them; what is removed
goes into OUTPUT.removed.jsonl with the reason and the question it is too close to.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from megatron_oreal.config.errors import UserError
from megatron_oreal.config.load import load_config
from megatron_oreal.config.schema import Config
from megatron_oreal.data.cleaning import Cleaning, Reason, Removal, find_removals
from megatron_oreal.data.overlap import HeldOut
from megatron_oreal.data.prompts import QuestionRecord
from megatron_oreal.data.records import Row, read_records
from megatron_oreal.monitor.metrics import to_json
from megatron_oreal.monitor.run_folder import atomic_write_text

_UNSET = ("model.path",)


def main(arguments: list[str] | None = None) -> int:
    """Returns 0, or 2 and one line where a user can mend it."""
    options = _parser().parse_args(arguments)
    try:
        config = load_config(options.config, options.settings, optional=_UNSET)
        rows = _read(config)
        removals = find_removals(
            [(r.name, r.record.question, str(r.record.gold_answer)) for r in rows],
            HeldOut(_held_out(options.held_out), options.held_out_words),
            Cleaning(options.near_words, options.near_share, options.held_out_share),
        )
        _write(options.output, rows, removals)
    except (UserError, OSError) as error:
        print(f"clean_questions: {error}", file=sys.stderr)
        return 2
    counts = Counter(removal.reason for removal in removals.values())
    result = {"read": len(rows), "written": len(rows) - len(removals)}
    result |= {reason.value: counts[reason] for reason in Reason}
    _show(result, as_json=options.json)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("settings", nargs="*", metavar="key=value", help="data.path and data.columns.*")
    add("--config", type=Path, action="append", default=[], metavar="FILE")
    add("--output", type=Path, required=True, metavar="FILE")
    add("--held-out", action="append", default=[], metavar="SOURCE", help="may be given again")
    add("--held-out-words", type=int, default=8, metavar="N", help="n of those n-grams (8)")
    add("--held-out-share", type=float, default=0.5, metavar="SHARE", help="in common (0.5)")
    add("--near-words", type=int, default=3, metavar="N", help="n of near duplicates (3)")
    add("--near-share", type=float, default=0.8, metavar="SHARE", help="Jaccard (0.8); 2: none")
    add("--json", action="store_true", help="print one JSON object, no table")
    return parser


def _read(config: Config) -> list[Row[QuestionRecord]]:
    """Reads the questions, each under its own name."""
    data = config.data
    rows = read_records(data.path, "data.path", QuestionRecord, asdict(data.columns))
    return [row if row.record.id is None else row._replace(name=str(row.record.id)) for row in rows]


def _held_out(sources: list[str]) -> list[tuple[str, str]]:
    return [
        (f"{Path(source).stem} {row.name}", row.record.question)
        for source in sources
        for row in read_records(source, "--held-out", QuestionRecord)
    ]


def _write(output: Path, rows: list[Row[QuestionRecord]], removals: dict[int, Removal]) -> None:
    kept, removed = [], []
    for i, (_, name, record) in enumerate(rows):
        fields: dict[str, Any] = {
            "id": name,
            "question": record.question,
            "gold_answer": str(record.gold_answer),
        }
        if record.pass_rate is not None:
            fields["pass_rate"] = record.pass_rate
        if record.data_source:
            fields["data_source"] = record.data_source
        if i in removals:
            removed.append(fields | {"removed": asdict(removals[i])})
        else:
            kept.append(fields)
    files = {output: kept, output.with_suffix(".removed.jsonl"): removed}
    for path, lines in files.items():
        atomic_write_text(path, "".join(f"{to_json(line)}\n" for line in lines))


def _show(result: dict[str, int], *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(result))
        return
    table = Table("questions", "count")
    for name, count in result.items():
        table.add_row(name.replace("_", " "), str(count))
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
