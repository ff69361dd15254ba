"""What the integration tests share: a toy with its questions, and a policy that half knows them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from megatron_oreal.monitor.metrics import read_metrics
from tests.integration import toy
from tests.integration.commands import alone


@dataclass(frozen=True)
class FineTuning:
    """A short `megatron-oreal sft`."""

    folder: Path
    metrics: list[dict[str, Any]]

    @property
    def model(self) -> Path:
        """The Hugging Face folder it left."""
        return self.folder / "hf" / "final"


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `model/`, `questions.jsonl`, `held_out.jsonl` and `demonstrations.jsonl`."""
    root = tmp_path_factory.mktemp("integration")
    toy.save_model(root / "model")
    toy.save_data(root)
    return root


@pytest.fixture(scope="session")
def fine_tuning(root: Path) -> FineTuning:
    settings = toy.settings(
        root, "sft", monitor__wandb="disabled", engine__tokens_per_micro_batch=1024
    )
    finished = alone("sft", *settings)
    assert finished.status == 0, finished.stderr
    folder = root / "sft"
    return FineTuning(folder, read_metrics(folder / "metrics.jsonl"))
