"""The benchmark's ways leave the same weights behind, and its bytes are those it claims."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megatron_oreal.config.schema import ParallelConfig
from megatron_oreal.models.qwen2 import QWEN2
from tests.ranks import RankPools
from tests.unit.weights.toy import DIMS
from tools.bench.weight_sync import Bench, measure

pytestmark = pytest.mark.parallel

TOY = replace(DIMS, layers=2, vocab=64)
NORMS = 5 * 16  # elements
OTHERS = 2 * 64 * 16 + 2 * (48 * 16 + 48 + 16 * 32 + 3 * 24 * 16)
MIB = 1 << 20


def measured() -> dict[str, float | str]:
    parallel = ParallelConfig(tensor=2, pipeline=2)
    return measure(Bench(QWEN2, TOY, parallel, 2, torch.float32, round_bytes=4096), repeats=1)


def test_gathering_moves_three_times_the_bytes(ranks: RankPools) -> None:
    """A rank has a quarter and wants a half; gathered, it gets three quarters.

    Norms are whole on the two ranks of their stage, and go to the two others either way.
    """
    found = ranks(4).run(measured, tp=2, pp=2)[0]
    assert found["model_mib"] == 4 * (OTHERS + NORMS) / MIB
    assert found["plan_wire_mib"] == 4 * (OTHERS + 2 * NORMS) / MIB
    assert found["gather_wire_mib"] == 4 * (3 * OTHERS + 2 * NORMS) / MIB
