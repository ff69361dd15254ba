"""Groups and trajectories by a short spelling: '+' correct, '-' incorrect, '?' unverified."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_oreal.types import (
    Outcome,
    Prompt,
    Rollout,
    RolloutGroup,
    Trajectory,
    Verdict,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

OUTCOMES = {"+": Outcome.CORRECT, "-": Outcome.INCORRECT, "?": Outcome.UNVERIFIED}


def make_group(
    outcomes: str,
    prompt_id: str = "q",
    lengths: Sequence[int] | None = None,
    truncated: Sequence[int] = (),
) -> RolloutGroup:
    """Answer i holds the token 100 + i, `lengths[i]` times (twice by default)."""
    lengths = lengths or [2] * len(outcomes)
    return RolloutGroup(
        prompt=Prompt(id=prompt_id, question="1 + 1?", gold_answer="2", tokens=(1, 2, 3)),
        rollouts=tuple(
            Rollout((100 + i,) * n, (-0.5 - i,) * n, text="", stopped=i not in truncated)
            for i, n in enumerate(lengths)
        ),
        verdicts=tuple(Verdict(OUTCOMES[o], "rule", "", None, 0.0) for o in outcomes),
    )


def make_trajectory(reward: float, length: int, advantage: float = 0.0) -> Trajectory:
    """Three tokens of question and `length` of answer."""
    return Trajectory("q", tuple(range(3 + length)), 3, reward, advantage)
