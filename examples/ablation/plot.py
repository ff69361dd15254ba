"""Draws pass@1 over iterations for each rung, mean and band over seeds, and writes the table."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from matplotlib.figure import Figure

from megatron_oreal.monitor.metrics import read_metrics

COLUMNS = ("rung", "seeds", "before", "after", "over seeds", "gain", "step", "minutes a run")

Curve = dict[int, float]
"""Percent of held-out samples that are correct, by the number of iterations before them."""


@dataclass(frozen=True)
class Rung:
    """One configuration of the ladder and its runs that have ended, by seed."""

    name: str
    curves: dict[int, Curve]
    minutes: dict[int, float]

    @property
    def iterations(self) -> list[int]:
        """The iterations after which every seed was evaluated."""
        first, *others = (set(curve) for curve in self.curves.values())
        return sorted(first.intersection(*others))

    def over_seeds(self, iteration: int) -> list[float]:
        """The values of all seeds after so many iterations."""
        return [curve[iteration] for curve in self.curves.values()]

    @property
    def final(self) -> dict[int, float]:
        """The last value of each seed."""
        return {seed: curve[max(curve)] for seed, curve in self.curves.items()}


def read_rung(folder: Path) -> Rung:
    """Reads the `seed_*` runs of a rung's folder that have a summary."""
    curves, minutes = {}, {}
    for path in folder.glob("seed_*/summary.json"):
        summary = json.loads(path.read_text(encoding="utf-8"))
        lines = read_metrics(path.parent / "metrics.jsonl")
        evaluations = [line for line in lines if line["kind"] == "eval"]
        seed = summary["seed"]
        curves[seed] = {line["iteration"]: 100 * line["eval/pass_at_1"] for line in evaluations}
        minutes[seed] = sum(summary["seconds"].values()) / 60
    order = sorted(curves)
    return Rung(folder.name, {s: curves[s] for s in order}, {s: minutes[s] for s in order})


def read_ladder(folder: Path) -> list[Rung]:
    """Reads every rung that has a run, in the order of their names."""
    rungs = [read_rung(path) for path in sorted(folder.iterdir()) if path.is_dir()]
    return [rung for rung in rungs if rung.curves]


def summarise(rungs: Iterable[Rung]) -> list[dict[str, Any]]:
    """Returns each rung's numbers in percent; `step` compares with the rung before, seed by seed.

    `deviation` is the standard deviation over seeds, `step_error` the standard error of the mean
    step; both are None for fewer than two seeds.
    """
    rows: list[dict[str, Any]] = []
    before: Mapping[int, float] = {}
    for rung in rungs:
        steps = [rung.final[seed] - before[seed] for seed in rung.final if seed in before]
        starts, ends = [curve[min(curve)] for curve in rung.curves.values()], rung.final.values()
        rows.append(
            {
                "rung": rung.name,
                "seeds": list(rung.curves),
                "before": fmean(starts),
                "after": fmean(ends),
                "deviation": _deviation(list(ends)),
                "gain": fmean(ends) - fmean(starts),
                "step": fmean(steps) if steps else None,
                "step_error": _error(steps),
                "minutes": fmean(rung.minutes.values()),
                "pass_at_1": rung.curves,
            }
        )
        before = rung.final
    return rows


def table(rows: Iterable[Mapping[str, Any]]) -> str:
    """Returns the markdown table of `summarise`."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + " --- |" * len(COLUMNS)]
    for row in rows:
        over = "" if row["deviation"] is None else f"± {row['deviation']:.1f}"
        error = "" if row["step_error"] is None else f" ± {row['step_error']:.1f}"
        cells = (
            row["rung"].replace("_", " "),
            str(len(row["seeds"])),
            f"{row['before']:.1f}",
            f"{row['after']:.1f}",
            over,
            f"{row['gain']:+.1f}",
            "" if row["step"] is None else f"{row['step']:+.1f}{error}",
            f"{row['minutes']:.1f}",
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(rungs: Iterable[Rung], path: Path) -> None:
    """Draws the mean over seeds, and a band of one standard deviation to either side."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for rung in rungs:
        where = rung.iterations
        means = [fmean(rung.over_seeds(i)) for i in where]
        spread = [_deviation(rung.over_seeds(i)) or 0.0 for i in where]
        (line,) = axes.plot(where, means, marker="o", label=rung.name.replace("_", " "))
        low, high = ([m + sign * s for m, s in zip(means, spread, strict=True)] for sign in (-1, 1))
        axes.fill_between(where, low, high, alpha=0.15, color=line.get_color(), linewidth=0)
    axes.set_xlabel("iterations")
    axes.set_ylabel("pass@1 on held-out questions, percent")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def _deviation(values: list[float]) -> float | None:
    return stdev(values) if len(values) > 1 else None


def _error(values: list[float]) -> float | None:
    deviation = _deviation(values)
    return None if deviation is None else deviation / len(values) ** 0.5


def main() -> None:
    """Parses the command line; writes `ladder.png`, `ladder.json` and `ladder.md`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="holds RUNG/seed_N, as run.sh leaves them")
    folder = parser.parse_args().folder
    rungs = read_ladder(folder)
    if not rungs:
        parser.error(f"{folder}: no run has ended; start examples/ablation/run.sh")
    rows = summarise(rungs)
    draw(rungs, folder / "ladder.png")
    (folder / "ladder.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    text = table(rows)
    (folder / "ladder.md").write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
