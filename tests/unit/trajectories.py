"""Trajectories small enough to be followed by hand."""

from __future__ import annotations

from megatron_oreal.types import Trajectory


def trajectory(*tokens: int, prompt: int, reward: float = 1.0) -> Trajectory:
    """Returns these tokens, the first `prompt` of which are the question."""
    return Trajectory("q", tokens, prompt_length=prompt, reward=reward, advantage=0.5)
