"""SIGKILL of one rank and of all at every phase, and what is left once the run goes on.

A run of the toy on two ranks is killed in each phase in turn, one iteration after the other, at a
moment drawn at random, and goes on each time; at its end it is compared with a run that was never
killed. Three such runs lose one rank each time, three lose all at once.
"""

from __future__ import annotations

import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers.utils.logging import disable_progress_bar

from megatron_oreal.monitor.metrics import read_metrics
from tests.integration import breaking, toy
from tests.integration.broken_program import SAVE_AFTER, SAVE_BEFORE, Break
from tests.machine import processor

# (in the table, in the journal, the iteration in which it is killed); saves follow odd ones.
PHASES = (
    ("generate", "generate", 1),
    ("verify", "verify", 2),
    ("score (the reference's log-probabilities)", "reference", 3),
    ("train the token reward model", "token_rm", 4),
    ("train the policy", "policy", 5),
    ("sync", "sync", 6),
    (SAVE_BEFORE, SAVE_BEFORE, 7),
    (SAVE_AFTER, SAVE_AFTER, 9),
)
ITERATIONS, MOMENTS = 10, 3
AFTER_RENAME_S = 0.02  # old checkpoints and banks go then
WHOM = {"one rank": 1, "all ranks": None}
BEGIN, END = "<!-- kill-matrix -->\n", "<!-- /kill-matrix -->\n"


@dataclass(frozen=True)
class Cell:
    """A phase, and who is killed in it: at how many moments, and what came of it."""

    phase: str
    whom: str
    same: bool


def settings(root: Path, name: str, model: Path) -> list[str]:
    return breaking.settings(
        root,
        name,
        model,
        schedule__iterations=ITERATIONS,
        evaluation__at_start="false",
        evaluation__every=0,
    )


def plans(whole: Sequence[Mapping[str, Any]], whom: str, moment: int) -> list[Break]:
    """One kill a phase, each at a random moment of as long as it took the unbroken run."""
    seconds = {line["iteration"]: line for line in whole if line["kind"] == "train"}
    planned = []
    for _, phase, iteration in PHASES:
        share = random.Random(f"{phase} {whom} {moment}").random()
        if phase == SAVE_AFTER:
            delay_s = share * AFTER_RENAME_S
        elif phase == SAVE_BEFORE:  # its seconds are in the line of the next iteration
            delay_s = share * seconds[iteration + 1]["time/checkpoint_s"]
        else:
            delay_s = share * seconds[iteration][f"time/{phase}_s"]
        rank = WHOM[whom]
        if rank is not None and phase in (SAVE_BEFORE, SAVE_AFTER):
            rank = 0  # the one that renames
        planned.append(Break(phase, iteration, delay_s, rank))
    return planned


def killed_run(root: Path, model: Path, whom: str, moment: int, console: Console) -> list[Cell]:
    """One run that is killed once in every phase; the cells that it adds to the table."""
    name = f"{whom} {moment}".replace(" ", "-")
    line = settings(root, name, model)
    whole = root / "whole"
    for plan in plans(read_metrics(whole / "metrics.jsonl"), whom, moment):
        started = time.monotonic()
        breaking.break_run(line, plan)
        took = time.monotonic() - started
        console.print(f"{whom}, {plan.phase}, after {1e3 * plan.delay_s:.0f} ms: {took:.0f} s")
    breaking.finish_run(line)
    differs = first_difference(root / name, whole)
    if differs is not None:
        console.print(f"{name} differs from iteration {differs} on: {root / name}", style="red")
    # What a kill spoils shows in its own iteration or after it.
    return [
        Cell(shown, whom, same=differs is None or iteration < differs)
        for shown, _, iteration in PHASES
    ]


def first_difference(got: Path, want: Path) -> int | None:
    """The first iteration whose metrics differ, the last one where only the weights do."""
    ours, theirs = breaking.exact_metrics(got), breaking.exact_metrics(want)
    for mine, other in zip(ours, theirs, strict=False):
        if mine != other:
            return min(mine["iteration"], other["iteration"])
    try:
        breaking.assert_same_run(got, want)
    except AssertionError:
        return ITERATIONS - 1
    return None


def table(cells: Sequence[Cell], seconds: float) -> str:
    """What `docs/resume.md` shows."""
    lines = [f"| killed in | {' | '.join(WHOM)} |", f"| --- |{' --- |' * len(WHOM)}"]
    for phase, _, _ in PHASES:
        row = []
        for whom in WHOM:
            found = [cell.same for cell in cells if (cell.phase, cell.whom) == (phase, whom)]
            row.append(f"{sum(found)} of {len(found)}")
        lines.append(f"| {phase} | {' | '.join(row)} |")
    machine = f"{processor()}, {os.cpu_count()} cores, load {os.getloadavg()[2]:.0f}"
    when = f"{datetime.now(UTC):%Y-%m-%d}"
    lines += ["", f"{len(cells)} kills, {seconds / 60:.0f} minutes on {machine}, {when}."]
    return "\n".join(lines) + "\n"


def write(document: Path, cells: Sequence[Cell], seconds: float) -> None:
    """Puts the table between the marks of a document."""
    before, _, rest = document.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    document.write_text(f"{before}{BEGIN}{table(cells, seconds)}{END}{after}")


def main(document: Path) -> int:
    disable_progress_bar()
    console, started = Console(soft_wrap=True), time.monotonic()
    cells: list[Cell] = []
    root = Path(tempfile.mkdtemp(prefix="kill-matrix-"))
    toy.make(root)
    model = toy.fine_tune(root)
    breaking.finish_run(settings(root, "whole", model))
    for moment in range(MOMENTS):
        for whom in WHOM:
            cells += killed_run(root, model, whom, moment, console)
            write(document, cells, time.monotonic() - started)
    console.print(table(cells, time.monotonic() - started), markup=False)
    if not all(cell.same for cell in cells):
        return 1
    shutil.rmtree(root)
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
