"""A plan as aligned lines for people."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from megatron_oreal.planner.hardware import GIB
from megatron_oreal.planner.search import layout_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from megatron_oreal.planner.plan import RunPlan

SHOWN = 10  # of ranked layouts
_HOUR = 3600


def table(plan: RunPlan, measured: Sequence[str] = ()) -> str:
    """Returns memory by part and phase, seconds by phase, and what was taken for granted.

    Args:
        plan: What is shown.
        measured: The assumptions that a run was measured for.
    """
    return "\n\n".join((_head(plan), _memory(plan), _time(plan), _assumptions(plan, measured)))


def ranking(plans: Sequence[RunPlan], measured: Sequence[str] = ()) -> str:
    """Returns the first few of ranked plans, a line each; arguments as of `table`."""
    first = plans[0]
    keys = list(layout_of(first.config))
    lines = [
        f"{first.cluster.ranks} x {first.memory.gpu.name}: {len(plans)} layouts fit, fastest first",
        "  ".join([*keys, "GiB", "s/iteration", "hours", "GPU hours"]),
    ]
    for plan in plans[:SHOWN]:
        numbers = {
            "GiB": f"{plan.memory.peak / GIB:.1f}",
            "s/iteration": f"{plan.duration.iteration:.1f}",
            "hours": f"{plan.duration.run / _HOUR:.2f}",
            "GPU hours": f"{plan.gpu_hours:,.0f}",
        }
        cells = layout_of(plan.config) | numbers
        lines.append("  ".join(f"{value!s:>{len(name)}}" for name, value in cells.items()))
    return "\n".join([*lines, "", _assumptions(first, measured)])


def ranking_dict(plans: Sequence[RunPlan]) -> dict[str, Any]:
    """Returns how many layouts fit, and the first few with all their numbers."""
    return {"layouts": len(plans), "fastest": [plan.as_dict() for plan in plans[:SHOWN]]}


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
    spare = (memory.gpu.memory - memory.peak) / GIB
    lines.append(
        f"fits: the peak, {memory.peak / GIB:.2f} in {memory.peak_phase}, spares {spare:.2f}"
    )
    return "\n".join(lines)


def _time(plan: RunPlan) -> str:
    duration = plan.duration
    lines = ["seconds of an iteration"]
    lines += [f"{phase:<24}{seconds:>11.1f}" for phase, seconds in duration.phases.items()]
    frozen = sum(duration.frozen.values())
    hours = duration.run / _HOUR
    rates = [
        duration.tokens / seconds for seconds in (duration.phases["generate"], duration.iteration)
    ]
    return "\n".join(
        [
            *lines,
            f"{'sum':<24}{duration.iteration:>11.1f}",
            f"{'sum, policy frozen':<24}{frozen:>11.1f}",
            f"start {duration.start:.0f}, all checkpoints {duration.checkpoints:.0f}",
            f"{duration.iterations} iterations: {hours:.1f} h, {plan.gpu_hours:,.0f} GPU hours",
            f"{rates[0]:,.0f} tokens/s while it generates, {rates[1]:,.0f} over an iteration",
            f"an engine generates {duration.slots} responses at a time, {plan.memory.kv_tokens:,}"
            " tokens of cache",
        ]
    )


def _assumptions(plan: RunPlan, measured: Sequence[str]) -> str:
    given = {name: f"{name} {value:g}" for name, value in asdict(plan.given).items()}
    guessed = ", ".join(text for name, text in given.items() if name not in measured)
    lines = [f"taken for granted (docs/planner.md): {guessed}"]
    if measured:
        lines.append(f"measured: {', '.join(given[name] for name in measured)}")
    return "\n".join(lines)
