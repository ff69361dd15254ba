"""Whether policy and engines hold the same model: a few responses, asked before a run begins."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_oreal.algorithm.rollout_diagnostics import mismatch_metrics
from megatron_oreal.config.errors import UserError
from megatron_oreal.config.schema import Config
from megatron_oreal.engine.roles import Policy
from megatron_oreal.parallel.collectives import world_size
from megatron_oreal.rollout.engine import Request, RolloutEngine
from megatron_oreal.rollout.seeds import sample_seed
from megatron_oreal.trainer.packer import Packer
from megatron_oreal.types import Prompt, Rollout, Trajectory

_RESPONSES_PER_RANK = 4  # at least one of every engine
_TOKENS = 32  # of a response
_ITERATION = -1  # seeds that no iteration has


def probe_engine(
    policy: Policy, engine: RolloutEngine, prompt: Prompt, packer: Packer, config: Config
) -> float:
    """Samples short responses to one prompt and has the policy score them; the engines sleep then.

    Collective over the world. Returns the mean difference of a token's log-probabilities.

    Raises:
        UserError: It is above `rollout.max_mean_logprob_difference`.
    """
    tokens = min(_TOKENS, config.sampling.max_new_tokens)
    sampling = dataclasses.replace(config.sampling, max_new_tokens=tokens)
    requests = [
        Request(prompt.tokens, sample_seed(config.run.seed, _ITERATION, prompt.id, sample))
        for sample in range(_RESPONSES_PER_RANK * world_size())
    ]
    rollouts = engine.generate(requests, sampling, lambda _: None)
    engine.sleep()
    trajectories = [unjudged(prompt, rollout) for rollout in rollouts]
    logprobs = policy.logprobs(packer.pack(trajectories)).logprobs
    return check_difference(logprobs, trajectories, config)


def unjudged(prompt: Prompt, rollout: Rollout) -> Trajectory:
    """Returns what the policy scores of a response that nobody judges; pure."""
    return Trajectory(
        prompt_id=prompt.id,
        tokens=prompt.tokens + rollout.tokens,
        prompt_length=len(prompt.tokens),
        reward=0.0,
        advantage=0.0,
        rollout_logprobs=rollout.logprobs,
    )


def check_difference(
    logprobs: Sequence[Tensor], trajectories: Sequence[Trajectory], config: Config
) -> float:
    """Returns the mean difference of the policy's log-probabilities from the engine's; pure.

    Raises:
        UserError: It is above `rollout.max_mean_logprob_difference`.
    """
    sampled = [torch.tensor(trajectory.rollout_logprobs) for trajectory in trajectories]
    mean = mismatch_metrics(logprobs, sampled)["rollout/mismatch_mean"]
    bound = config.rollout.max_mean_logprob_difference
    if not mean <= bound:
        raise UserError(
            f"rollout.max_mean_logprob_difference={bound}: policy and rollout engine differ by"
            f" {mean:.3g} a token on the same weights; make their precisions alike or raise it"
        )
    return mean
