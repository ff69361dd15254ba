"""Layouts of a run on a cluster: the nearest ones that fit, and all that fit, the fastest first."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

from megatron_oreal.config.device import Device, check_device
from megatron_oreal.config.errors import UserError
from megatron_oreal.config.validate import check_layout, check_model
from megatron_oreal.planner.hardware import GPUS_PER_NODE
from megatron_oreal.planner.memory import plan_memory

if TYPE_CHECKING:
    from collections.abc import Iterator

    from megatron_oreal.config.schema import Config
    from megatron_oreal.planner.hardware import Cluster
    from megatron_oreal.planner.memory import Memory
    from megatron_oreal.planner.sizes import Dims

NEAREST = 3
TESTED_TE = "2.20.2"  # the planner knows no machine: this version is taken to be on it
RECOMPUTE = ("none", "selective", "full")
SHARES = tuple(i / 20 for i in range(2, 19))  # of a GPU's memory for the engine
CONTEXT = (1, 2, 4)


def layout_of(config: Config) -> dict[str, int | float | str]:
    """Returns the keys that decide what fits, with their values."""
    return {
        "parallel.tensor": config.parallel.tensor,
        "parallel.pipeline": config.parallel.pipeline,
        "parallel.context": config.parallel.context,
        "engine.recompute": config.engine.recompute,
        "rollout.tensor_parallel": config.rollout.tensor_parallel,
        "rollout.gpu_memory_utilization": config.rollout.gpu_memory_utilization,
    }


def check(config: Config, dims: Dims, cluster: Cluster) -> None:
    """Refuses with a `UserError` what no such cluster can have, or its GPUs cannot compute."""
    check_layout(config, cluster.ranks)
    check_model(config, dims)
    version = TESTED_TE if cluster.modules == "transformer_engine" else None
    check_device(config, dims, Device(cluster.gpu.name, cluster.gpu.capability, version))


def nearest_that_fit(config: Config, dims: Dims, cluster: Cluster) -> list[Config]:
    """Returns the three layouts that fit and differ least, context parallelism as it is.

    A doubling of a degree, a step of recomputation and a tenth of the GPU for the engine count
    alike. Of those that differ only in the engine's share the nearest stands for all.
    """
    shares = sorted({*SHARES, config.rollout.gpu_memory_utilization})
    nearest: list[tuple[float, Config]] = []
    for other in _layouts(config, dims, cluster, (config.parallel.context,)):
        fitting = [
            (_distance(config, shared), shared)
            for shared in (_with_share(other, share) for share in shares)
            if plan_memory(shared, dims, cluster).fits
        ]
        nearest += sorted(fitting, key=lambda found: found[0])[:1]
    ordered = sorted(nearest, key=lambda found: found[0])
    return [other for _, other in ordered[:NEAREST]]


def all_that_fit(config: Config, dims: Dims, cluster: Cluster) -> Iterator[tuple[Config, Memory]]:
    """Yields every layout that fits, with the largest share of the GPU for the engine that does."""
    for other in _layouts(config, dims, cluster, CONTEXT):
        for share in reversed(SHARES):
            shared = _with_share(other, share)
            memory = plan_memory(shared, dims, cluster)
            if memory.fits:
                yield shared, memory
                break


def _layouts(
    config: Config, dims: Dims, cluster: Cluster, context: tuple[int, ...]
) -> Iterator[Config]:
    """Yields the possible ones, whether they fit or not, with the engine's share as it is."""
    degrees = [2**i for i in range(cluster.ranks.bit_length())]
    in_node = [degree for degree in degrees if degree <= GPUS_PER_NODE]
    parallels = [
        replace(config.parallel, tensor=tensor, pipeline=pipeline, context=cp)
        for tensor in in_node
        for pipeline in degrees
        for cp in context
    ]
    for parallel in parallels:
        for degree in in_node:
            rollout = replace(config.rollout, tensor_parallel=degree)
            other = replace(config, parallel=parallel, rollout=rollout)
            if _is_possible(other, dims, cluster):
                for recompute in RECOMPUTE:
                    yield replace(other, engine=replace(config.engine, recompute=recompute))


def _with_share(config: Config, share: float) -> Config:
    return replace(config, rollout=replace(config.rollout, gpu_memory_utilization=share))


def _is_possible(config: Config, dims: Dims, cluster: Cluster) -> bool:
    try:
        check(config, dims, cluster)
    except UserError:
        return False
    return True


def _distance(one: Config, other: Config) -> float:
    pairs = [
        (one.parallel.tensor, other.parallel.tensor),
        (one.parallel.pipeline, other.parallel.pipeline),
        (one.rollout.tensor_parallel, other.rollout.tensor_parallel),
    ]
    doublings = sum(abs(math.log2(theirs / ours)) for ours, theirs in pairs)
    steps = [RECOMPUTE.index(config.engine.recompute) for config in (one, other)]
    shares = [config.rollout.gpu_memory_utilization for config in (one, other)]
    return doublings + abs(steps[0] - steps[1]) + 10 * abs(shares[0] - shares[1])
