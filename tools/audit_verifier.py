"""Audits the verifier on answers whose outcome is known, or that two ways of judging can settle."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import msgspec
from rich.console import Console
from rich.table import Table

from megatron_oreal.config.errors import UserError
from megatron_oreal.config.load import load_config
from megatron_oreal.config.schema import Config, JudgeConfig
from megatron_oreal.data.records import read_records
from megatron_oreal.monitor.progress import Progress
from megatron_oreal.types import Outcome, Verdict
from megatron_oreal.verify.cascade import Answer, Verifier
from megatron_oreal.verify.futures import results

EPILOG = """
A line of the input is {"question", "gold", "response"}, optionally with "label" (correct or
incorrect, as a person says), "data_source" (which verifier, see verifier.routes) and "stopped"
(false where the length limit cut the response).

Each response gets a verdict: correct, incorrect, or unverified where nobody could decide. Printed:
  label against verdict   a label that the verdicts contradict is a mistake of one of them
  rule against judge      with a judge: what the rules said of the answers that it was asked about
  seconds an answer       median, 90th and 99th percentile, longest
  doubtful                answers that are unverified, against their label, or where the judge
                          overruled the rules; --doubtful writes them, with reasons, for a person

With --json one object is printed: "answers", "unverified_share", "confusion", "rule_and_judge",
"seconds", "doubtful" (line numbers from 0) and "rows", one for each line of the input in its order:
{"verdict", "by" (format | rule | judge), "reason", "extracted", "seconds"}.

examples:
  python tools/audit_verifier.py answers.jsonl
  python tools/audit_verifier.py answers.jsonl --doubtful doubtful.jsonl
  python tools/audit_verifier.py answers.jsonl --config my.yaml verifier.relative_tolerance=0.01
  python tools/audit_verifier.py answers.jsonl --json judge.when=undecided \\
      'judge.hosts=[http://localhost:8000/v1]' judge.model=qwen > verdicts.json
"""
OUTCOMES = [outcome.value for outcome in Outcome]


class AuditLine(msgspec.Struct):
    """One answer of the input."""

    question: str
    gold: str
    response: str
    label: Literal["correct", "incorrect"] | None = None
    data_source: str = ""
    stopped: bool = True


@dataclass(frozen=True)
class Audit:
    """All lines with the verdicts of the rules and, where a judge was asked, of the whole."""

    lines: list[AuditLine]
    rule: list[Verdict]
    final: list[Verdict]

    def summary(self) -> dict[str, Any]:
        """Returns the tables of the report and a row for each line."""
        labels = [line.label or "unlabelled" for line in self.lines]
        asked = [(r, f) for r, f in zip(self.rule, self.final, strict=True) if f.by == "judge"]
        seconds = sorted(verdict.seconds for verdict in self.final)
        return {
            "answers": len(self.lines),
            "unverified_share": _share(v.outcome is Outcome.UNVERIFIED for v in self.final),
            "confusion": _counts(zip(labels, (v.outcome.value for v in self.final), strict=True)),
            "rule_and_judge": _counts((r.outcome.value, f.outcome.value) for r, f in asked),
            "seconds": {f"p{q}": _quantile(seconds, q) for q in (50, 90, 99, 100)},
            "doubtful": [i for i in range(len(self.lines)) if self.doubtful(i)],
            "rows": [_row(verdict) for verdict in self.final],
        }

    def doubtful(self, i: int) -> bool:
        """Whether a person should look: undecided, against the label, or rule against judge."""
        final, label = self.final[i].outcome, self.lines[i].label
        against_label = label is not None and final.value != label
        overruled = self.rule[i].outcome not in {final, Outcome.UNVERIFIED}
        return final is Outcome.UNVERIFIED or against_label or overruled


def main(arguments: Sequence[str] | None = None) -> int:
    """Audits; a user's mistake ends it with a line and status 2."""
    options = _parser().parse_args(arguments)
    try:
        overrides = [f"verifier.workers_per_rank={options.workers}", *options.overrides]
        config = load_config(options.config, overrides, optional=("model.path", "data.path"))
        audit = run_audit(options.answers, config, progress=not options.json)
    except UserError as error:
        print(f"audit_verifier: {error}", file=sys.stderr)
        return 2
    summary = audit.summary()
    if options.doubtful:
        write_doubtful(audit, options.doubtful)
    if options.json:
        print(json.dumps(summary))
    else:
        show(summary)
    return 0


def run_audit(path: Path, config: Config, *, progress: bool = False) -> Audit:
    """Judges every line of a file.

    Raises:
        UserError: the file is not what it should be, or the verifier cannot start.
    """
    lines = [row.record for row in read_records(path, "answers", AuditLine)]
    answers = [
        Answer(line.gold, line.response, line.stopped, line.data_source, line.question)
        for line in lines
    ]

    bars = Progress(progress, Console(stderr=True))
    with Verifier(config.verifier, _patient(config.judge, len(answers))) as verifier:
        with bars.task("rules", len(answers), "answers") as advance:
            rule = results([verifier.submit_to_rules(answer) for answer in answers], advance)
        with bars.task("judge", len(answers), "answers") as advance:
            asked = map(verifier.submit_to_judge, answers, rule)
            final = results(list(asked), advance)
    return Audit(lines, rule, final)


def _patient(judge: JudgeConfig, answers: int) -> JudgeConfig:
    """Returns the judge of a run with as much room and time as so many answers may want."""
    rounds = math.ceil(answers / judge.concurrency)
    return replace(judge, queue=answers, deadline_s=judge.deadline_s * rounds)


def write_doubtful(audit: Audit, path: Path) -> None:
    """Writes the doubtful lines with their verdicts, whole or not at all."""
    draft = path.with_name(f".{path.name}.part")
    with draft.open("w", encoding="utf-8") as out:
        for i, line in enumerate(audit.lines):
            if audit.doubtful(i):
                row = {"line": i + 1, **msgspec.structs.asdict(line), **_row(audit.final[i])}
                out.write(json.dumps({**row, "rule": _row(audit.rule[i])}) + "\n")
        out.flush()
        os.fsync(out.fileno())
    draft.replace(path)


def show(summary: dict[str, Any]) -> None:
    """Prints the summary as tables."""
    console = Console()
    for title, key, what in (
        ("label against verdict", "confusion", "label"),
        ("rule against judge", "rule_and_judge", "rule"),
    ):
        if summary[key]:
            table = Table(what, *OUTCOMES, title=title)
            for name, counts in sorted(summary[key].items()):
                table.add_row(name, *(str(counts.get(outcome, 0)) for outcome in OUTCOMES))
            console.print(table)
    times = "  ".join(f"{name} {value:.4f}" for name, value in summary["seconds"].items())
    print(f"seconds an answer: {times}")
    print(f"{summary['answers']} answers, {summary['unverified_share']:.1%} unverified, "
          f"{len(summary['doubtful'])} doubtful")  # fmt: skip


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("answers", type=Path, help="JSONL of answers")
    parser.add_argument("overrides", nargs="*", help="verifier.key=value or judge.key=value")
    parser.add_argument("--config", type=Path, action="append", default=[], help="YAML of a run")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes")
    parser.add_argument("--doubtful", type=Path, help="JSONL to write what a person should see")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def _row(verdict: Verdict) -> dict[str, Any]:
    row = asdict(verdict)
    return {"verdict": row.pop("outcome").value, **row}


def _counts(pairs: Any) -> dict[str, dict[str, int]]:
    counted = Counter(pairs)
    table: dict[str, dict[str, int]] = {left: {} for left, _ in counted}
    for (left, right), count in counted.items():
        table[left][right] = count
    return table


def _share(flags: Any) -> float:
    known = list(flags)
    return sum(known) / len(known)


def _quantile(in_order: Sequence[float], percent: int) -> float:
    return in_order[min(len(in_order) * percent // 100, len(in_order) - 1)]


if __name__ == "__main__":
    sys.exit(main())
