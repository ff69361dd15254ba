"""Draws a run and writes its table: pass@1 before and after, tokens a second and time by phase."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib.figure import Figure

from megatron_oreal.config.load import load_config
from megatron_oreal.monitor.metrics import read_metrics

Lines = Sequence[Mapping[str, Any]]
SAMPLED = ("generate", "verify")
TRAINED = ("token_rm", "reference", "importance", "policy")
# Sums, what goes on beside the iteration, and what each start of a run does once.
NOT_OF_AN_ITERATION = frozenset(
    {"iteration", "wall", "last_verdict_wait", "checkpoint_write", "start", "check", "evaluate"}
)


@dataclass(frozen=True)
class Run:
    """The lines of a run's iterations and evaluations, and responses of an iteration."""

    train: Lines
    evaluations: Lines
    responses: int


@dataclass(frozen=True)
class Phase:
    """Means over iterations: seconds, share of all phases, response tokens a second or None."""

    name: str
    seconds: float
    share: float
    tokens_per_s: float | None


def read_run(folder: Path) -> Run:
    """Reads what a run has written so far, finished or not."""
    config = load_config([folder / "config.yaml"], [])
    lines = read_metrics(folder / "metrics.jsonl")
    return Run(
        [line for line in lines if line["kind"] == "train"],
        [line for line in lines if line["kind"] == "eval"],
        config.data.questions_per_iteration * config.sampling.samples_per_question,
    )


def phases(run: Run) -> list[Phase]:
    """Returns the phases, the longest first; the first iteration, which warms up, is left out.

    Tokens of `generate` and `verify` are those of all responses, of the models' phases those of
    the responses that were trained on.
    """
    lines = run.train[1:] or run.train
    names = {
        key.removeprefix("time/").removesuffix("_s")
        for line in lines
        for key in line
        if key.startswith("time/") and key.endswith("_s")
    }
    seconds = {
        name: fmean(line.get(f"time/{name}_s", 0.0) for line in lines)
        for name in names - NOT_OF_AN_ITERATION
    }
    found = []
    for name in sorted(seconds, key=lambda name: -seconds[name]):
        mean, tokens = seconds[name], fmean(_tokens(run, line, name) for line in lines)
        speed = tokens / mean if tokens else None
        found.append(Phase(name, mean, mean / sum(seconds.values()), speed))
    return found


def _tokens(run: Run, line: Mapping[str, Any], phase: str) -> float:
    if phase in SAMPLED:
        return line["rollout/response_length_mean"] * run.responses
    if phase in TRAINED:
        return line.get("oreal/positive_tokens", 0) + line.get("oreal/negative_tokens", 0)
    return 0.0


def table(run: Run) -> str:
    """Returns both tables in markdown."""
    lines = ["| after iterations | pass@1 | greedy |", "| --- | --- | --- |"]
    for line in run.evaluations:
        cells = [_percent(line.get(f"eval/{name}")) for name in ("pass_at_1", "greedy")]
        lines.append(f"| {line['iteration']} | {' | '.join(cells)} |")
    lines += ["", "| phase | s | share | tokens/s |", "| --- | --- | --- | --- |"]
    for phase in phases(run) if run.train else []:
        speed = "" if phase.tokens_per_s is None else f"{phase.tokens_per_s:,.0f}"
        lines.append(f"| {phase.name} | {phase.seconds:.2f} | {_percent(phase.share)} | {speed} |")
    return "\n".join(lines)


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f}"


def draw(run: Run, path: Path) -> None:
    """Draws the pass rate in training with the evaluations, and below it the token_rm and KL."""
    figure = Figure(figsize=(8, 6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    _curve(above, run.train, "rollout/pass_rate", "pass rate of the iteration's questions")
    _curve(above, run.evaluations, "eval/pass_at_1", "pass@1 on unseen questions", "o")
    above.set_ylabel("percent")
    _curve(below, run.train, "token_rm/auc", "AUC of the token reward model")
    _curve(below, run.train, "oreal/kl_k3", "KL to the reference, nats a token")
    below.set_xlabel("iterations")
    for axes in (above, below):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=120)


def _curve(axes: Any, lines: Lines, metric: str, label: str, marks: str = "-") -> None:
    share = metric.startswith(("rollout/", "eval/"))
    points = [
        (line["iteration"], line[metric] * (100 if share else 1))
        for line in lines
        if metric in line
    ]
    axes.plot([x for x, _ in points], [y for _, y in points], marks, label=label)


def main() -> None:
    """Parses the command line; writes `run.png` and `run.md` into the run's folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="of a run: runs/smollm2/seed_0/oreal")
    folder = parser.parse_args().folder
    run = read_run(folder)
    draw(run, folder / "run.png")
    text = table(run)
    (folder / "run.md").write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
