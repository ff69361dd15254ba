"""The benchmark of a training step runs on a CPU, and leaves out what a device has not."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megatron_oreal.config.device import Device
from tests.ranks import RankPools
from tools.bench.train_step import RECIPES, TOY, Bench, Model, available, measure_all, table

pytestmark = pytest.mark.parallel

TINY = Bench(replace(TOY, hidden=32, ffn=48, heads=2, kv_heads=1, head_dim=16, vocab=64), 32, 2)


def measured() -> tuple[list[dict[str, float | str]], dict[str, torch.Tensor], float]:
    """A run of it; the gradients of the bare products, and of the loss that ours has."""
    rows = measure_all(TINY, ["none"], repeats=1)
    model = Model(TINY, "none")
    model.passes(model.heads["bare"])
    stage = model.chunk.module
    grads = {name: weight.main_grad.clone() for name, weight in stage.named_parameters()}
    return rows, grads, model.passes(model.heads["ours"])


def test_it_runs_on_a_cpu(ranks: RankPools) -> None:
    (row,), grads, loss = ranks(1).run(measured)[0]
    assert row["layers"] == "bf16"
    assert row["ours_over_bare"] == pytest.approx(row["ours_ms"] / row["bare_ms"])
    assert row["over_first"] == 1.0
    assert "bf16" in table([row])
    assert all(bool(grad.isfinite().all()) and bool(grad.any()) for grad in grads.values())
    # One positive and one negative of weight 1 at the start: -logp, about log 64, and 0.5; the
    # reference's -10 is further away, its k3 times 0.01.
    assert 4.0 < loss < 7.0


def test_a_device_measures_the_recipes_that_it_has() -> None:
    def has(device: Device) -> list[str]:
        return [recipe for recipe, lacks in available(TINY, RECIPES, device).items() if not lacks]

    assert has(Device("a CPU")) == ["none"]
    assert has(Device("H100", (9, 0), "2.20.2")) == ["none", "delayed", "tensorwise", "blockwise"]
    assert has(Device("A100", (8, 0), "2.20.2")) == ["none"]
