"""Says where the time of an iteration goes, from a run's metrics.jsonl or from a run made for it.

A phase's time is the median over iterations that train the policy, the first left out: it compiles.
Generation, verification (the wait for what was not judged while others generated) and training's
mathematics are the work; all else is outside: engines put to sleep and given weights, records,
transcripts, checkpoints, and what lies between phases.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_oreal.config.errors import UserError
from megatron_oreal.config.load import read_yaml
from megatron_oreal.monitor.report.read import phases_of, read_run

EPILOG = """
examples:
  python tools/bench/iteration.py runs/oreal_7b
  python tools/bench/iteration.py --ranks 2 --config examples/quickstart/oreal.yaml \\
    model.path=runs/quickstart/seed_0/sft/hf/final \\
    data.path=runs/quickstart/seed_0/data/train.jsonl

Must reach on an H100: outside_share at most 0.10.
"""
WORK = {
    "generation": ("generate",),
    "verification": ("verify",),
    "training": ("token_rm", "importance", "reference", "policy"),
}
# A run of a few iterations that trains from the first, and leaves and evaluates nothing.
SHORT = (
    *("schedule.freeze_iterations=0", "schedule.warmup_iterations=1", "checkpoint.every=0"),
    *("evaluation.every=0", "evaluation.at_start=false", "evaluation.at_end=false"),
    *("export.at_end=false", "monitor.wandb=disabled"),
)


def shares(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns medians of an iteration's seconds and their shares of its time on the clock; pure.

    Raises:
        UserError: No iteration after the first has trained the policy.
    """
    trained = [line for line in lines[1:] if "time/policy_s" in line and "time/wall_s" in line]
    if not trained:
        raise UserError("no iteration after the first has trained the policy: let the run go on")
    found = [phases_of([line]) for line in trained]
    wall = statistics.median(line["time/wall_s"] for line in trained)
    names = dict.fromkeys(name for phases in found for name in phases)
    seconds = {name: statistics.median(phases.get(name, 0.0) for phases in found) for name in names}
    between = [
        line["time/wall_s"] - sum(phases.values())
        for line, phases in zip(trained, found, strict=True)
    ]
    seconds["between phases"] = statistics.median(between)
    work = {kind: sum(seconds.get(name, 0.0) for name in own) for kind, own in WORK.items()}
    return {
        "iterations": len(trained),
        "wall_s": wall,
        "seconds": dict(sorted(seconds.items(), key=lambda item: -item[1])),
        **{f"{kind}_share": value / wall for kind, value in work.items()},
        "outside_share": 1 - sum(work.values()) / wall,
    }


def describe(folder: Path, lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns what of a run the numbers depend on."""
    config = read_yaml(folder / "config.yaml")
    gpu = any("memory/device_used_gib" in line for line in lines)
    return {
        "run": str(folder),
        "device": "gpu" if gpu else "cpu",
        "model": config["model"]["path"],
        "precision": config["model"]["precision"],
        "quantization": config["rollout"]["quantization"],
        "parallel": {key: config["parallel"][key] for key in ("tensor", "pipeline", "context")},
    }


def run_short(options: argparse.Namespace, folder: Path) -> None:
    """Trains a few iterations into a folder.

    Raises:
        UserError: The run fails; what it said is on the console.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(options.ranks), "-m", "megatron_oreal.cli", "train"]
    for file in options.config:
        command += ["--config", str(file)]
    settings = [*SHORT, f"schedule.iterations={options.iterations}", f"run.folder={folder}"]
    done = subprocess.run([*command, *settings, *options.settings], stdout=sys.stderr, check=False)
    if done.returncode:
        raise UserError(f"the run ended with status {done.returncode}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Reads or makes a run and prints where its time went."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("settings", nargs="*", help="a run's folder; with --config: key=value ...")
    parser.add_argument("--config", type=Path, action="append", default=[], help="make a run of it")
    parser.add_argument("--ranks", type=int, default=1, help="of that run (1)")
    parser.add_argument("--iterations", type=int, default=5, help="of that run (5)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_intermixed_args(arguments)
    try:
        with tempfile.TemporaryDirectory() as made:
            folder = Path(made) / "run"
            if options.config:
                run_short(options, folder)
            elif len(options.settings) == 1:
                folder = Path(options.settings[0])
            else:
                parser.error("name the folder of one run, or --config")
            lines = read_run(folder).train
            found = describe(folder, lines) | shares(lines)
    except UserError as error:
        print(f"iteration: {error}", file=sys.stderr)
        return 2
    print(json.dumps(found) if options.json else table(found))
    return 0


def table(found: Mapping[str, Any]) -> str:
    """Returns a line a number; phases by their seconds."""
    lines = []
    for name, value in found.items():
        if name == "seconds":
            lines += [
                f"  {phase:22}{seconds:12.3f} s {100 * seconds / found['wall_s']:6.1f} %"
                for phase, seconds in value.items()
            ]
        else:
            shown = f"{value:.3f}" if isinstance(value, float) else str(value)
            lines.append(f"{name:24}{shown}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
