"""Learning rates and the policy's freeze as functions of a counter from 0, without a state."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_oreal.config.schema import ScheduleConfig


def learning_rate(i: int, peak: float, minimum: float, schedule: ScheduleConfig) -> float:
    """Returns the rate of step `i` (0-based): linear warm-up to `peak`, then a cosine to `minimum`.

    With W warm-up and N iterations: peak min(1, (i + 1) / W) for i <= W, then minimum + (peak -
    minimum) (1 + cos(pi (i - W) / (N - W))) / 2, and `minimum` from i = N on. The default 10 and
    90 give the reference's schedule. With `count: iterations` the counter runs also while the
    policy is frozen, so that the policy starts at its peak.
    """
    warmup, total = schedule.warmup_iterations, schedule.iterations
    if i <= warmup:
        return peak * min(1.0, (i + 1) / max(1, warmup))
    if i >= total:
        return minimum
    progress = (i - warmup) / (total - warmup)
    return minimum + (peak - minimum) * (1 + math.cos(math.pi * progress)) / 2


def schedule_index(iteration: int, updates: int, schedule: ScheduleConfig) -> int:
    """Returns the `i` of `learning_rate`.

    Args:
        iteration: 0-based iteration of the run; frozen and skipped iterations count.
        updates: optimizer steps this model has made so far, so that with `count: updates` a policy
            frozen at first warms up at its own first step, and iterations skipped for want of
            trajectories shift the schedule.
        schedule: says which of the two counts.
    """
    return iteration if schedule.count == "iterations" else updates


def policy_is_frozen(iteration: int, schedule: ScheduleConfig) -> bool:
    """Says whether only the token_rm learns in this 0-based iteration, whatever `count` says."""
    return iteration < schedule.freeze_iterations
