"""A plan as aligned lines for people."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from megatron_oreal.planner.hardware import GIB
from megatron_oreal.planner.plan import layout_of

if TYPE_CHECKING:
    from megatron_oreal.planner.plan import RunPlan

_HOUR = 3600


def table(plan: RunPlan) -> str:
    """Returns memory by part and phase, seconds by phase, and what was taken for granted."""
    return "\n\n".join((_head(plan), _memory(plan), _time(plan), _assumptions(plan)))


def _head(plan: RunPlan) -> str:
    layout = " ".join(f"{key}={value}" for key, value in layout_of(plan.config).items())
    return f"{plan.cluster.ranks} x {plan.memory.gpu.name}: {layout}"


def _memory(plan: RunPlan) -> str:
    memory = plan.memory
    names = dict.fromkeys(name for parts in memory.phases.values() for name in parts)
    title = f"GiB of a GPU of stage {memory.stage}"
    lines = [f"{title:<24}" + "".join(f"{phase:>11}" for phase in memory.phases)]
    for name in names:
        cells = (parts.get(name, 0) / GIB for parts in memory.phases.values())
        lines.append(f"{name:<24}" + "".join(f"{cell:>11.2f}" for cell in cells))
    totals = (memory.total(phase) / GIB for phase in memory.phases)
    total = f"total, of {memory.gpu.memory / GIB:.1f}"
    lines.append(f"{total:<24}" + "".join(f"{cell:>11.2f}" for cell in totals))
    return "\n".join(lines)


def _time(plan: RunPlan) -> str:
    duration = plan.duration
    lines = ["seconds of an iteration"]
    lines += [f"{phase:<24}{seconds:>11.1f}" for phase, seconds in duration.phases.items()]
    frozen = sum(duration.frozen.values())
    hours = duration.run / _HOUR
    gpu_hours = hours * plan.cluster.ranks
    return "\n".join(
        [
            *lines,
            f"{'sum':<24}{duration.iteration:>11.1f}",
            f"{'sum, policy frozen':<24}{frozen:>11.1f}",
            f"start {duration.start:.0f}, all checkpoints {duration.checkpoints:.0f}",
            f"{duration.iterations} iterations: {hours:.1f} h, {gpu_hours:,.0f} GPU hours",
            f"an engine generates {duration.slots} responses at a time, {plan.memory.kv_tokens:,}"
            " tokens of cache",
        ]
    )


def _assumptions(plan: RunPlan) -> str:
    given = ", ".join(f"{name} {value:g}" for name, value in asdict(plan.given).items())
    return f"taken for granted (docs/planner.md): {given}"
