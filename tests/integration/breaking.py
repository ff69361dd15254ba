"""Runs that break at a moment and go on, compared with one that never broke."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
from safetensors.torch import load_file

from megatron_oreal.monitor.metrics import MEASURED, read_metrics
from tests.integration import toy
from tests.integration.broken_program import VARIABLE, Break
from tests.integration.commands import Finished, run, torchrun

RANKS = 2
PROGRAM = ("-m", "tests.integration.broken_program")


def settings(root: Path, name: str, model: Path, **more: Any) -> list[str]:
    """The command line's `key=value` of a run of the toy in `root/name`; `more` wins.

    Each engine has several rounds of responses: it may break between two.
    """
    chosen: dict[str, Any] = {
        "run__seed": 7,
        "monitor__wandb": "disabled",
        "parallel__tensor": RANKS,
        "rollout__max_sequences": 8,
        "schedule__iterations": 5,
        "schedule__freeze_iterations": 1,
        "evaluation__at_start": "true",
        "evaluation__at_end": "true",
        "evaluation__every": 2,
        "checkpoint__every": 2,
    }
    return toy.settings(root, name, model, **chosen | more)


def break_run(arguments: Sequence[str], plan: Break) -> Finished:
    """Starts `train` and waits until it has broken as planned."""
    line = torchrun(RANKS, "train", *arguments, program=PROGRAM)
    finished = run(line, {VARIABLE: msgspec.json.encode(plan).decode()})
    assert finished.status != 0, f"{plan} never came\n{finished.stdout}"
    return finished


def finish_run(arguments: Sequence[str]) -> Finished:
    """Starts `train` and waits for its end."""
    finished = run(torchrun(RANKS, "train", *arguments))
    assert finished.status == 0, finished.stderr
    return finished


def exact_metrics(folder: Path) -> list[dict[str, Any]]:
    """All lines as they stand, without what a clock or the memory says."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert lines == read_metrics(folder / "metrics.jsonl")
    return [
        {name: value for name, value in line.items() if not name.startswith(MEASURED)}
        for line in lines
    ]


def assert_same_run(got: Path, want: Path) -> None:
    """Metrics and final weights to the last bit."""
    assert exact_metrics(got) == exact_metrics(want)
    ours, theirs = (load_file(f / "hf" / "final" / "model.safetensors") for f in (got, want))
    assert ours.keys() == theirs.keys()
    assert all(ours[name].equal(theirs[name]) for name in ours)
