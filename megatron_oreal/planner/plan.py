"""Whether a run fits a cluster and how long it takes, before anything is booked; pure Python."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from megatron_oreal.config.errors import UserError
from megatron_oreal.config.validate import check_layout, check_model
from megatron_oreal.planner.duration import (
    Assumptions,
    Duration,
    assumptions_for,
    plan_duration,
)
from megatron_oreal.planner.hardware import GIB, GPUS_PER_NODE
from megatron_oreal.planner.memory import Memory, plan_memory

if TYPE_CHECKING:
    from megatron_oreal.config.schema import Config
    from megatron_oreal.planner.hardware import Cluster
    from megatron_oreal.planner.sizes import Dims

NEAREST = 3
SHARES = tuple(i / 20 for i in range(2, 19))  # of a GPU's memory for the engine
_ALMOST = 1e-9


@dataclass(frozen=True)
class RunPlan:
    """A layout that fits, its memory and its time."""

    config: Config
    cluster: Cluster
    memory: Memory
    duration: Duration
    given: Assumptions

    def as_dict(self) -> dict[str, Any]:
        """Returns all numbers by name: bytes, seconds, tokens."""
        memory, duration = self.memory, self.duration
        return {
            "ranks": self.cluster.ranks,
            "gpu": asdict(memory.gpu),
            "layout": layout_of(self.config),
            "bytes": {
                "stage": memory.stage,
                "phases": memory.phases,
                "peak": memory.peak,
                "peak_phase": memory.peak_phase,
            },
            "kv_tokens": memory.kv_tokens,
            "sequences_at_once": duration.slots,
            "seconds": {
                "phases": duration.phases,
                "iteration": duration.iteration,
                "frozen_iteration": sum(duration.frozen.values()),
                "start": duration.start,
                "checkpoints": duration.checkpoints,
                "run": duration.run,
            },
            "gpu_hours": duration.run / 3600 * self.cluster.ranks,
            "assumptions": asdict(self.given),
        }


def plan_run(
    config: Config, dims: Dims, cluster: Cluster, mean_response_tokens: float | None = None
) -> RunPlan:
    """Plans a run; pure.

    Args:
        config: The run.
        dims: The dimensions of its model.
        cluster: The GPUs of the run.
        mean_response_tokens: Of a response, where it is known.

    Raises:
        UserError: The layout is impossible, or does not fit; names the nearest that do.
    """
    _check(config, dims, cluster.ranks)
    memory = plan_memory(config, dims, cluster)
    if not memory.fits:
        raise UserError(_refusal(config, dims, memory, cluster))
    given = assumptions_for(config, mean_response_tokens)
    duration = plan_duration(config, dims, cluster, memory.kv_tokens, given)
    return RunPlan(config, cluster, memory, duration, given)


def layout_of(config: Config) -> dict[str, int | float]:
    """Returns the keys that decide what fits, with their values."""
    return {
        "parallel.tensor": config.parallel.tensor,
        "parallel.pipeline": config.parallel.pipeline,
        "rollout.tensor_parallel": config.rollout.tensor_parallel,
        "rollout.gpu_memory_utilization": config.rollout.gpu_memory_utilization,
    }


def nearest_that_fit(config: Config, dims: Dims, cluster: Cluster) -> list[Config]:
    """Returns the layouts that fit and differ least: doublings, and tenths of the engine's share.

    Of those that differ only in the engine's share the nearest stands for all.
    """
    nearest: dict[tuple[int, int, int], tuple[float, Config]] = {}
    for other in _layouts(config, cluster.ranks):
        if not _is_valid(other, dims, cluster.ranks) or not plan_memory(other, dims, cluster).fits:
            continue
        degrees = (other.parallel.tensor, other.parallel.pipeline, other.rollout.tensor_parallel)
        distance = _distance(config, other)
        if degrees not in nearest or distance < nearest[degrees][0] - _ALMOST:
            nearest[degrees] = distance, other
    ordered = sorted(nearest.values(), key=lambda found: found[0])
    return [other for _, other in ordered[:NEAREST]]


def _check(config: Config, dims: Dims, ranks: int) -> None:
    check_layout(config, ranks)
    check_model(config, dims)


def _is_valid(config: Config, dims: Dims, ranks: int) -> bool:
    try:
        _check(config, dims, ranks)
    except UserError:
        return False
    return True


def _layouts(config: Config, ranks: int) -> Iterator[Config]:
    degrees = [2**i for i in range(ranks.bit_length())]
    in_node = [degree for degree in degrees if degree <= GPUS_PER_NODE]
    shares = sorted({*SHARES, config.rollout.gpu_memory_utilization})
    for tensor in in_node:
        for pipeline in degrees:
            parallel = replace(config.parallel, tensor=tensor, pipeline=pipeline)
            for engine in in_node:
                for share in shares:
                    rollout = replace(
                        config.rollout, tensor_parallel=engine, gpu_memory_utilization=share
                    )
                    yield replace(config, parallel=parallel, rollout=rollout)


def _distance(one: Config, other: Config) -> float:
    pairs = [
        (one.parallel.tensor, other.parallel.tensor),
        (one.parallel.pipeline, other.parallel.pipeline),
        (one.rollout.tensor_parallel, other.rollout.tensor_parallel),
    ]
    doublings = sum(abs(math.log2(theirs / ours)) for ours, theirs in pairs)
    shares = one.rollout.gpu_memory_utilization, other.rollout.gpu_memory_utilization
    return doublings + 10 * abs(shares[0] - shares[1])


def _refusal(config: Config, dims: Dims, memory: Memory, cluster: Cluster) -> str:
    gpu, phase = memory.gpu, memory.peak_phase
    if memory.peak > gpu.memory:
        parts = sorted(memory.phases[phase].items(), key=lambda part: -part[1])[:3]
        largest = ", ".join(f"{name} {size / GIB:.1f}" for name, size in parts)
        why = (
            f"phase {phase} needs {memory.peak / GIB:.1f} of {gpu.memory / GIB:.1f} GiB ({largest})"
        )
    else:
        why = f"the cache holds {memory.kv_tokens} tokens, one response may have {memory.longest}"
    near = nearest_that_fit(config, dims, cluster)
    ways = " | ".join(_shown(other) for other in near)
    way_out = f"nearest that fit: {ways}" if near else "no layout fits: take more or larger GPUs"
    return f"{_shown(config)}: does not fit {cluster.ranks} x {gpu.name}: {why}; {way_out}"


def _shown(config: Config) -> str:
    return " ".join(f"{key}={value}" for key, value in layout_of(config).items())
