"""The first of the layouts on four ranks; `make layouts` runs them all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_oreal.weights.checksum import tensor_checksum
from megatron_oreal.weights.geometry import Box
from tests.integration.conftest import FineTuning
from tests.integration.layout_program import digest
from tests.integration.layouts import LAYOUTS, problems, run_layout

pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def found(root: Path, fine_tuning: FineTuning) -> dict[str, Any]:
    return run_layout(root, fine_tuning.model, LAYOUTS[0])


def test_two_iterations_train_and_arrive_in_the_engines(
    found: dict[str, Any], fine_tuning: FineTuning
) -> None:
    assert not problems(found, digest_of(load_file(fine_tuning.model / "model.safetensors")))


def digest_of(tensors: dict[str, torch.Tensor]) -> str:
    """The digest of a checkpoint, reckoned from its file."""
    return digest(
        {
            name: int(tensor_checksum(tensor, Box.whole(tuple(tensor.shape)), tuple(tensor.shape)))
            for name, tensor in tensors.items()
        }
    )
