"""The head under Megatron's overlaps: what its shortcut past the output layer must not skip.

A weight that is all-gathered late must be waited for, and the gradient of one whose bucket is
reduced early must be announced once a micro-batch. Overlapped or not, the numbers are the same.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_oreal.config.schema import OptimizerConfig
from megatron_oreal.engine.heads import LogprobHead
from megatron_oreal.engine.megatron_model import _forward_step
from megatron_oreal.engine.micro_batch import lay_out
from megatron_oreal.engine.optimizer import build_optimizer
from megatron_oreal.models.heads import Fields, HeadSettings
from megatron_oreal.parallel.cuda_on_cpu import cuda_on_cpu
from tests.ranks import RankPools
from tests.toy_models import (
    TIGHT,
    make_config,
    make_reference,
    make_trajectories,
    open_models,
    pack,
    write_toy,
)

pytestmark = pytest.mark.parallel

STEPS = 3  # the first counts gradients, the second reduces them early, both gather weights late
BUCKET = 64  # elements: a bucket for every matrix
ADAM = OptimizerConfig(lr=1e-2, eps=1e-3)  # a gradient that is rounding alone moves nothing


class Trained(NamedTuple):
    """This rank's weights, and how often the hooks of all its weights fired in a micro-batch."""

    weights: dict[str, torch.Tensor]
    fired: set[int]


def objective(logprobs: torch.Tensor, _: Fields) -> torch.Tensor:
    return 0.01 * logprobs**2 - 0.1 * logprobs


def train(folder: Path, recompute: str, **overlaps: bool) -> Trained:
    """Takes some steps under Megatron's wrapper with these of its switches set."""
    sharded = overlaps["use_distributed_optimizer"]
    config = make_config(folder, distributed_optimizer=sharded, recompute=recompute)
    source = open_models(config)
    stages = make_reference(source).model.stages
    settings = stages[0].config
    ddp = DistributedDataParallelConfig(grad_reduce_in_fp32=True, bucket_size=BUCKET, **overlaps)
    with cuda_on_cpu():
        wrapped = [DistributedDataParallel(settings, ddp, stage.train()) for stage in stages]
        optimizer = build_optimizer(wrapped, ADAM, config)
        settings.finalize_model_grads_func = finalize_model_grads
        settings.no_sync_func = [stage.no_sync for stage in wrapped]
        if len(wrapped) == 1:
            settings.no_sync_func = wrapped[0].no_sync
    head = LogprobHead(stages[-1], source.topology, source.dims.vocab, HeadSettings(4), objective)
    batch = pack(make_trajectories(3), TIGHT)
    assert any(() in rank for rank in batch.micro_batches), "one of padding alone"
    cut = source.topology.cut
    laid = [lay_out(batch, m, cut) for m in batch.micro_batches[source.topology.dp_rank]]
    for _ in range(STEPS):
        with cuda_on_cpu():
            for stage in wrapped:
                stage.zero_grad_buffer()
            optimizer.zero_grad()
            get_forward_backward_func()(
                forward_step_func=functools.partial(_forward_step, head=head),
                data_iterator=[iter(laid) for _ in wrapped],
                model=list(wrapped),
                num_microbatches=len(laid),
                seq_length=max(len(m.tokens) for m in laid) * cut.cp_size,
                micro_batch_size=1,
                forward_only=False,
            )
            optimizer.step()
    return Trained(*_look_at(wrapped, overlaps))


def _look_at(wrapped: list[Any], overlaps: dict[str, bool]) -> tuple[dict[str, Any], set[int]]:
    weights, fired = {}, set()
    for i, stage in enumerate(wrapped):
        if overlaps.get("overlap_param_gather"):
            with cuda_on_cpu():
                stage.start_param_sync(force_sync=True)
        weights |= {f"{i} {name}": p.detach().clone() for name, p in stage.named_parameters()}
        for group in stage.bucket_groups:
            fired |= set(group.golden_per_param_grad_ready_counts.values())
    return weights, fired


@pytest.mark.parametrize(
    ("layout", "toy", "recompute"),
    [
        ({}, "qwen2", "none"),
        pytest.param({"tp": 2}, "qwen2_tied", "full", marks=pytest.mark.slow),
        pytest.param({"pp": 2}, "qwen2_tied", "full", marks=pytest.mark.slow),
        pytest.param({}, "qwen2_tied", "none", marks=pytest.mark.slow),
        pytest.param({"tp": 2}, "qwen2", "none", marks=pytest.mark.slow),
        pytest.param({"pp": 2}, "qwen2", "none", marks=pytest.mark.slow),
        pytest.param({"cp": 2}, "qwen2_tied", "selective", marks=pytest.mark.slow),
        pytest.param({"pp": 2, "vpp": 2}, "smollm2", "none", marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_overlaps_change_no_weight(
    ranks: RankPools, tmp_path: Path, layout: dict[str, int], toy: str, recompute: str
) -> None:
    """Two data-parallel groups, one of which has a micro-batch of padding alone."""
    folder = write_toy(tmp_path / "toy", toy)
    pool = ranks(4 if layout else 2)
    plain = pool.run(
        functools.partial(train, use_distributed_optimizer=True), folder, recompute, **layout
    )
    early = {"use_distributed_optimizer": False, "overlap_grad_reduce": True}
    both = dict.fromkeys((*early, "overlap_param_gather"), True)
    for overlaps in (early, both):
        found = pool.run(functools.partial(train, **overlaps), folder, recompute, **layout)
        for rank, expected in zip(found, plain, strict=True):
            assert rank.fired == {1}
            torch.testing.assert_close(rank.weights, expected.weights, rtol=1e-5, atol=1e-6)
