"""Whether a run fits a cluster and how long it takes, before anything is booked; pure Python."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from megatron_oreal.config.errors import UserError
from megatron_oreal.planner.duration import (
    Assumptions,
    Duration,
    assumptions_for,
    plan_duration,
)
from megatron_oreal.planner.hardware import GIB
from megatron_oreal.planner.memory import Memory, plan_memory
from megatron_oreal.planner.search import all_that_fit, check, layout_of, nearest_that_fit

if TYPE_CHECKING:
    from megatron_oreal.config.schema import Config
    from megatron_oreal.planner.hardware import Cluster
    from megatron_oreal.planner.sizes import Dims

_NO_LAYOUT = "no layout fits: take more or larger GPUs"


@dataclass(frozen=True)
class RunPlan:
    """A layout that fits, its memory and its time."""

    config: Config
    cluster: Cluster
    memory: Memory
    duration: Duration
    given: Assumptions

    @property
    def gpu_hours(self) -> float:
        """What the whole run costs."""
        return self.duration.run / 3600 * self.cluster.ranks

    def as_dict(self) -> dict[str, Any]:
        """Returns all numbers by name: bytes, seconds, tokens."""
        memory, duration = self.memory, self.duration
        return {
            "ranks": self.cluster.ranks,
            "gpu": asdict(memory.gpu),
            "modules": self.cluster.modules,
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
            "tokens_per_s": {
                "generate": duration.tokens / duration.phases["generate"],
                "iteration": duration.tokens / duration.iteration,
            },
            "gpu_hours": self.gpu_hours,
            "assumptions": asdict(self.given),
        }


def plan_run(
    config: Config, dims: Dims, cluster: Cluster, given: Assumptions | None = None
) -> RunPlan:
    """Plans a run; pure.

    Args:
        config: The run.
        dims: The dimensions of its model.
        cluster: The GPUs of the run.
        given: What is taken for granted; None: `assumptions_for(config)`.

    Raises:
        UserError: The layout is impossible, or does not fit; names the nearest that do.
    """
    check(config, dims, cluster)
    memory = plan_memory(config, dims, cluster)
    if not memory.fits:
        raise UserError(_refusal(config, dims, memory, cluster))
    given = given or assumptions_for(config)
    duration = plan_duration(config, dims, cluster, memory.kv_tokens, given)
    return RunPlan(config, cluster, memory, duration, given)


def ranked_runs(config: Config, dims: Dims, cluster: Cluster, given: Assumptions) -> list[RunPlan]:
    """Plans the run in every layout that fits and returns them, the fastest first; pure.

    Raises:
        UserError: None fits.
    """
    plans = [
        RunPlan(
            other,
            cluster,
            memory,
            plan_duration(other, dims, cluster, memory.kv_tokens, given),
            given,
        )
        for other, memory in all_that_fit(config, dims, cluster)
    ]
    if not plans:
        raise UserError(f"{cluster.ranks} x {cluster.gpu.name}: {_NO_LAYOUT}")
    return sorted(plans, key=lambda plan: (plan.duration.run, plan.memory.peak))


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
    way_out = f"nearest that fit: {ways}" if near else _NO_LAYOUT
    return f"{_shown(config)}: does not fit {cluster.ranks} x {gpu.name}: {why}; {way_out}"


def _shown(config: Config) -> str:
    return " ".join(f"{key}={value}" for key, value in layout_of(config).items())
