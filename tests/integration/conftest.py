"""What the integration tests share: a toy with its questions, and a policy that half knows them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from megatron_oreal.monitor.metrics import read_metrics
from tests.integration import breaking, toy


@dataclass(frozen=True)
class FineTuning:
    """A short `megatron-oreal sft` and the Hugging Face folder it left."""

    folder: Path
    model: Path
    metrics: list[dict[str, Any]]


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `model/`, `questions.jsonl`, `held_out.jsonl` and `demonstrations.jsonl`."""
    root = tmp_path_factory.mktemp("integration")
    toy.make(root)
    return root


@pytest.fixture(scope="session")
def fine_tuning(root: Path) -> FineTuning:
    model = toy.fine_tune(root)
    folder = root / "sft"
    return FineTuning(folder, model, read_metrics(folder / "metrics.jsonl"))


@pytest.fixture(scope="session")
def unbroken(root: Path, fine_tuning: FineTuning) -> Path:
    """The folder of a training on two ranks that nothing befell."""
    breaking.finish_run(breaking.settings(root, "unbroken", fine_tuning.model))
    return root / "unbroken"
