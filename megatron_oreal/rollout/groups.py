"""Algorithm 1, line 5: K seeded samples of every question of an iteration."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from megatron_oreal.rollout.engine import Request
from megatron_oreal.rollout.seeds import sample_seed
from megatron_oreal.types import Advance, RolloutGroup

if TYPE_CHECKING:
    from collections.abc import Sequence

    from megatron_oreal.config.schema import SamplingConfig
    from megatron_oreal.rollout.engine import Finished, Sampler
    from megatron_oreal.types import Prompt


def generate_groups(
    sampler: Sampler,
    prompts: Sequence[Prompt],
    sampling: SamplingConfig,
    *,
    seed: int,
    iteration: int,
    advance: Advance,
    finished: Finished = lambda _index, _rollout: None,
) -> list[RolloutGroup]:
    """Samples `sampling.samples_per_question` responses a prompt; collective over the world.

    Args:
        sampler: any rollout backend, or what stands before one.
        prompts: the same on every rank; one that occurs again draws fresh samples.
        sampling: how to sample.
        seed: seed of the run.
        iteration: 0-based; the same seed and iteration draw the same samples from the same weights.
        advance: told how many of the `len(prompts) * samples_per_question` requests are done.
        finished: told each response as it comes, with its number, prompt by prompt; on one rank, by
            engines that stream.

    Returns:
        One group a prompt, in the order of the prompts, the same on every rank.
    """
    n_samples = sampling.samples_per_question
    requests = build_requests(prompts, n_samples, seed, iteration)
    rollouts = sampler.generate(requests, sampling, advance, finished)
    return [
        RolloutGroup(prompt, tuple(rollouts[i * n_samples : (i + 1) * n_samples]))
        for i, prompt in enumerate(prompts)
    ]


def build_requests(
    prompts: Sequence[Prompt], n_samples: int, seed: int, iteration: int
) -> list[Request]:
    """Returns the requests of an iteration, `n_samples` a prompt, prompt by prompt."""
    drawn: Counter[str] = Counter()
    requests = []
    for prompt in prompts:
        first = drawn[prompt.id]
        drawn[prompt.id] += n_samples
        requests += [
            Request(prompt.tokens, sample_seed(seed, iteration, prompt.id, sample))
            for sample in range(first, first + n_samples)
        ]
    return requests
