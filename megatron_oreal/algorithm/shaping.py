"""Rewards, pass rates and advantages of judged groups (Algorithm 1, lines 6 and 7).

Answers nobody could decide have neither a reward nor an advantage and take no part in the
statistics of their group: "could not decide" is not "wrong".
"""

from __future__ import annotations

import statistics
from dataclasses import replace
from typing import TYPE_CHECKING

from megatron_oreal.types import Outcome

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from megatron_oreal.config.schema import OrealConfig
    from megatron_oreal.types import RolloutGroup

REWARDS: dict[Outcome, float | None] = {
    Outcome.CORRECT: 1.0,
    Outcome.INCORRECT: -1.0,
    Outcome.UNVERIFIED: None,
}
GRPO_EPSILON = 1e-8


def drop_unverified(
    groups: Sequence[RolloutGroup], max_share: float, unverified_is_incorrect: bool
) -> tuple[list[RolloutGroup], int]:
    """Drops whole groups with more than `max_share` of their answers unverified.

    With `unverified_is_incorrect` nothing is dropped and every unverified answer becomes an
    incorrect one, as in the reference. Call it before `shape_rewards`, and
    `rollout_diagnostics.group_metrics` before it.

    Args:
        groups: judged groups.
        max_share: share of unverified answers, 0 to 1, up to which a group is kept.
        unverified_is_incorrect: whether to count an undecided answer as wrong.

    Returns:
        The groups kept, in order, and the number of groups dropped.
    """
    if unverified_is_incorrect:
        return [_unverified_to_incorrect(group) for group in groups], 0
    kept = [group for group in groups if unverified_share(group) <= max_share]
    return kept, len(groups) - len(kept)


def unverified_share(group: RolloutGroup) -> float:
    """Returns the share of the group's answers that nobody could decide, 0 to 1."""
    _require_verdicts(group)
    unverified = sum(verdict.outcome is Outcome.UNVERIFIED for verdict in group.verdicts)
    return unverified / len(group.verdicts)


def shape_rewards(groups: Sequence[RolloutGroup], cfg: OrealConfig) -> list[RolloutGroup]:
    """Fills in `rewards`, `advantages` and `pass_rate` of every group from its verdicts.

    Rewards are +1 correct, -1 incorrect, None unverified. `pass_rate` is the share of correct
    answers among the verified ones, None without any. Advantages are taken over the verified
    answers of a group alone; a group with fewer than two of them has nothing to compare and gets
    zeros, unless `shaping: none` compares nothing and takes the bare reward.

    Raises:
        ValueError: a group without one verdict a rollout.
    """
    return [_shape_group(group, cfg) for group in groups]


def rloo_advantages(rewards: Sequence[float]) -> list[float]:
    """Returns A_i = r_i - mean of the other rewards, `[K]`; zeros for fewer than two rewards."""
    others = len(rewards) - 1
    if others < 1:
        return [0.0] * len(rewards)
    total = sum(rewards)
    return [reward - (total - reward) / others for reward in rewards]


def grpo_advantages(rewards: Sequence[float]) -> list[float]:
    """Returns A_i = (r_i - mean) / (unbiased std + 1e-8), `[K]`; zeros for fewer than two."""
    if len(rewards) < 2:  # noqa: PLR2004  the smallest sample that has a standard deviation
        return [0.0] * len(rewards)
    mean = statistics.fmean(rewards)
    scale = statistics.stdev(rewards) + GRPO_EPSILON
    return [(reward - mean) / scale for reward in rewards]


def bare_advantages(rewards: Sequence[float]) -> list[float]:
    """Returns A_i = r_i, `[K]`: the rewards of plain REINFORCE, with no baseline."""
    return list(rewards)


ADVANTAGES: dict[str, Callable[[Sequence[float]], list[float]]] = {
    "rloo": rloo_advantages,
    "grpo": grpo_advantages,
    "none": bare_advantages,
}


def _shape_group(group: RolloutGroup, cfg: OrealConfig) -> RolloutGroup:
    _require_verdicts(group)
    rewards = tuple(REWARDS[verdict.outcome] for verdict in group.verdicts)
    verified = [reward for reward in rewards if reward is not None]
    shaped = iter(ADVANTAGES[cfg.shaping](verified))
    advantages = tuple(None if reward is None else next(shaped) for reward in rewards)
    pass_rate = sum(reward > 0 for reward in verified) / len(verified) if verified else None
    return replace(group, rewards=rewards, advantages=advantages, pass_rate=pass_rate)


def _unverified_to_incorrect(group: RolloutGroup) -> RolloutGroup:
    _require_verdicts(group)
    verdicts = tuple(
        replace(verdict, outcome=Outcome.INCORRECT)
        if verdict.outcome is Outcome.UNVERIFIED
        else verdict
        for verdict in group.verdicts
    )
    return replace(group, verdicts=verdicts)


def _require_verdicts(group: RolloutGroup) -> None:
    if not group.rollouts or len(group.verdicts) != len(group.rollouts):
        raise ValueError(
            f"group {group.prompt.id!r} has {len(group.verdicts)} verdicts"
            f" for {len(group.rollouts)} rollouts"
        )
