"""Which samples of an iteration are trained on (Algorithm 1, lines 8 and 9).

The paper's line 8 says "filter out" questions with 0 < p < 1 where it means keep. Nothing here
knows ranks, and every rank that holds the same groups picks the same trajectories.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from megatron_oreal.types import Trajectory

if TYPE_CHECKING:
    from collections.abc import Sequence

    from megatron_oreal.config.schema import OrealConfig
    from megatron_oreal.types import RolloutGroup


def select(
    groups: Sequence[RolloutGroup], cfg: OrealConfig, seed: int, iteration: int
) -> tuple[Trajectory, ...]:
    """Picks the trajectories of an update from shaped groups, in the order of the groups.

    - `pairs`: of each question with 0 < p < 1, one correct and one incorrect answer.
    - `all_nontrivial`: every verified answer of those questions.
    - `all`: every verified answer of every question, trivial ones too. Unless `shaping: none`,
      their advantages are zero, so they count in N+ and N- and in the KL term, and enter the
      positive term only without `positive_times_advantage`.

    The sign of a trajectory's reward decides its term of the objective. Unverified answers are
    never trained on.
    """
    if cfg.selection == "pairs":
        return pick_pairs(drop_trivial(groups), seed, iteration)
    chosen = drop_trivial(groups) if cfg.selection == "all_nontrivial" else groups
    return tuple(
        make_trajectory(group, index)
        for group in chosen
        for index, reward in enumerate(group.rewards)
        if reward is not None
    )


def drop_trivial(groups: Sequence[RolloutGroup]) -> list[RolloutGroup]:
    """Keeps the groups with 0 < pass_rate < 1: an answer known correct and one known incorrect."""
    return [g for g in groups if g.pass_rate is not None and 0 < g.pass_rate < 1]


def pick_pairs(groups: Sequence[RolloutGroup], seed: int, iteration: int) -> tuple[Trajectory, ...]:
    """Draws one correct and one incorrect answer of each non-trivial group: `(y+, y-, ...)`.

    The draw of a group depends on `(seed, iteration, prompt id)` alone: it is alike on every rank
    and does not change with the other groups of the batch or with their order.
    """
    pairs: list[Trajectory] = []
    for group in groups:
        generator = _generator(seed, iteration, group.prompt.id)
        correct = [i for i, reward in enumerate(group.rewards) if reward is not None and reward > 0]
        wrong = [i for i, reward in enumerate(group.rewards) if reward is not None and reward < 0]
        pairs += [make_trajectory(group, generator.choice(side)) for side in (correct, wrong)]
    return tuple(pairs)


def make_trajectory(group: RolloutGroup, index: int) -> Trajectory:
    """Joins the question and its answer `index`.

    Raises:
        ValueError: an answer without a reward, or without a single token.
    """
    rollout, reward, advantage = (
        group.rollouts[index],
        group.rewards[index],
        group.advantages[index],
    )
    if reward is None or advantage is None or not rollout.tokens:
        raise ValueError(f"answer {index} of {group.prompt.id!r} has no reward or no tokens")
    return Trajectory(
        prompt_id=group.prompt.id,
        tokens=group.prompt.tokens + rollout.tokens,
        prompt_length=len(group.prompt.tokens),
        reward=reward,
        advantage=advantage,
        rollout_logprobs=rollout.logprobs,
    )


def _generator(seed: int, iteration: int, prompt_id: str) -> random.Random:
    # A seed of bytes is hashed with SHA-512: the same in every process, unlike hash(). Ids come
    # from files and may hold lone surrogates.
    return random.Random(f"{seed}/{iteration}/{prompt_id}".encode(errors="surrogatepass"))
