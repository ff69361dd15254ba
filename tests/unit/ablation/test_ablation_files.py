"""Each rung of the ladder changes one thing, and its table and picture hold what the runs said."""

from __future__ import annotations

import dataclasses
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from examples.ablation import plot
from megatron_oreal.config.load import config_keys, load_config
from megatron_oreal.config.schema import Config

LADDER = Path(__file__).parents[3] / "examples" / "ablation"
RUNGS = ["1_reinforce", "2_reward_shaping", "3_behaviour_cloning", "4_token_weights"]


def rung(name: str) -> dict[str, Any]:
    config: Config = load_config(
        [LADDER / f"{name}.yaml"], ["model.path=m", "data.path=d", "evaluation.path=e"]
    )
    return {key: _value(dataclasses.asdict(config), key) for key in config_keys()}


def _value(tree: Any, key: str) -> Any:
    for name in key.split("."):
        tree = tree[name]
    return tree


def test_each_rung_adds_one_switch_to_the_one_below() -> None:
    assert [path.stem for path in sorted(LADDER.glob("*.yaml"))] == RUNGS
    rungs = [rung(name) for name in RUNGS]
    changes = [
        {key: (low[key], high[key]) for key in low if low[key] != high[key]}
        for low, high in pairwise(rungs)
    ]
    assert changes == [
        {"oreal.shaping": ("none", "rloo")},
        {"oreal.positive_times_advantage": (True, False)},
        {"oreal.token_weights.kind": ("none", "threshold")},
    ]


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Two rungs, two seeds, evaluated after 0 and 8 iterations; a third run has not ended."""
    ends = {"1_reinforce": {0: 0.5, 1: 0.6}, "2_reward_shaping": {0: 0.6, 1: 0.8}}
    for name, seeds in ends.items():
        for seed, end in seeds.items():
            write_run(tmp_path / name / f"seed_{seed}", seed, end)
    write_run(tmp_path / "2_reward_shaping" / "seed_2", 2, 0.9)
    (tmp_path / "2_reward_shaping" / "seed_2" / "summary.json").unlink()
    return tmp_path


def write_run(folder: Path, seed: int, end: float) -> None:
    folder.mkdir(parents=True)
    lines = [
        {"kind": "eval", "iteration": 0, "eval/pass_at_1": 0.4},
        {"kind": "train", "iteration": 0},
        {"kind": "eval", "iteration": 8, "eval/pass_at_1": end},
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text)
    summary = {"seed": seed, "seconds": {"generate": 60.0, "policy": 30.0}}
    (folder / "summary.json").write_text(json.dumps(summary))


def test_the_table_compares_rungs_seed_by_seed(runs: Path) -> None:
    # means 55 and 70; deviations 10 / sqrt 2 and 20 / sqrt 2; steps 10 and 20: 15 +- 5
    assert plot.table(plot.summarise(plot.read_ladder(runs))).splitlines()[2:] == [
        "| 1 reinforce | 2 | 40.0 | 55.0 | ± 7.1 | +15.0 |  | 1.5 |",
        "| 2 reward shaping | 2 | 40.0 | 70.0 | ± 14.1 | +30.0 | +15.0 ± 5.0 | 1.5 |",
    ]


def test_the_picture_is_drawn(runs: Path) -> None:
    plot.draw(plot.read_ladder(runs), runs / "ladder.png")
    assert (runs / "ladder.png").read_bytes().startswith(b"\x89PNG")


def test_one_seed_has_no_spread(tmp_path: Path) -> None:
    write_run(tmp_path / "1_reinforce" / "seed_0", 0, 0.5)
    (row,) = plot.summarise(plot.read_ladder(tmp_path))
    assert (row["deviation"], row["step"], row["step_error"]) == (None, None, None)
    plot.draw(plot.read_ladder(tmp_path), tmp_path / "ladder.png")
