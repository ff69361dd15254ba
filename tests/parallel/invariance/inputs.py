"""What every layout reads: a toy policy, a reference that it has moved away from, rollouts."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests.parallel.invariance.batch import record
from tests.toy_models import CONFIG_JSON, write_toy

LAYERS = 4  # two stages of two virtual ones each
SPREAD = 0.15  # of its weights: wider ones blow rounding up within a step or two
HEADS = CONFIG_JSON["num_attention_heads"]
WEIGHTS = "model.safetensors"


def write_inputs(folder: Path, *, tied: bool) -> Path:
    """Writes `policy`, `reference` and `recorded` into a folder that does not exist yet."""
    toy = "qwen2_tied" if tied else "qwen2"
    policy = write_toy(folder / "policy", toy, SPREAD, num_hidden_layers=LAYERS)
    reference = folder / "reference"
    shutil.copytree(policy, reference)
    generator = torch.Generator().manual_seed(17)
    moved = {
        name: weight + 0.02 * torch.randn(weight.shape, generator=generator)
        for name, weight in load_file(policy / WEIGHTS).items()
    }
    save_file(moved, reference / WEIGHTS, metadata={"format": "pt"})
    record(folder / "recorded")
    return folder
