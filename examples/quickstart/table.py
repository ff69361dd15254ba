"""Puts the results of several seeds into one markdown table: before and after, and the gain."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import mean

RUNS = {"OREAL": "oreal", "plain cloning": "cloning"}
COLUMNS = ("run", "seed", "pass@1 before", "after", "gain", "pass@8 before", "after", "minutes")


def read_runs(folders: list[Path], name: str) -> dict[str, dict[str, float]]:
    """Returns the numbers of each seed's run that has ended, rates in percent."""
    found = {}
    for folder in folders:
        path = folder / name / "summary.json"
        if not path.exists():
            continue
        summary = json.loads(path.read_text(encoding="utf-8"))
        one, eight = summary["pass_at_1"], summary["pass_at_8"]
        found[str(summary["seed"])] = {
            "before": 100 * one["before"],
            "after": 100 * one["after"],
            "gain": 100 * (one["after"] - one["before"]),
            "before 8": 100 * eight["before"],
            "after 8": 100 * eight["after"],
            "minutes": sum(summary["seconds"].values()) / 60,
        }
    return found


def rows(label: str, runs: dict[str, dict[str, float]]) -> list[list[str]]:
    """Formats a row a seed, then mean, min and max over the seeds."""
    written = [[label, seed, *_cells(numbers)] for seed, numbers in runs.items()]
    for word, combine in (("mean", mean), ("min", min), ("max", max)):
        columns = {key: combine(run[key] for run in runs.values()) for key in _keys(runs)}
        written.append([label, word, *_cells(columns)])
    return written


def _keys(runs: dict[str, dict[str, float]]) -> list[str]:
    return list(next(iter(runs.values())))


def _cells(numbers: dict[str, float]) -> list[str]:
    return [f"{value:+.1f}" if key == "gain" else f"{value:.1f}" for key, value in numbers.items()]


def table(folders: list[Path]) -> str:
    """Returns the markdown table of every run found below the folders of seeds."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + " --- |" * len(COLUMNS)]
    for label, name in RUNS.items():
        runs = read_runs(folders, name)
        lines += ["| " + " | ".join(row) + " |" for row in (rows(label, runs) if runs else [])]
    return "\n".join(lines)


def main() -> None:
    """Parses the command line and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", nargs="+", type=Path, help="one a seed: runs/quickstart/seed_*")
    print(table(parser.parse_args().folders))


if __name__ == "__main__":
    main()
