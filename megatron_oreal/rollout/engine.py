"""What a rollout backend is: requests in, rollouts out, new weights in between."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch

    from megatron_oreal.config.schema import SamplingConfig
    from megatron_oreal.types import Advance, Rollout
    from megatron_oreal.weights.sums import Checksums
    from megatron_oreal.weights.vllm_layout import LiveShard

Finished = Callable[[int, "Rollout"], None]
"""Told the index of a request and its rollout, as soon as this rank's engine has them."""

Renew = Callable[[str], AbstractContextManager[Callable[[], None]]]
"""Told why engines have lost the policy's weights; in the block, once they are back, the function
brings the present ones into all of them. Collective over the world."""


@dataclass(frozen=True, slots=True)
class Request:
    """One response to sample: the prompt's token ids and the seed that alone decides the draw."""

    tokens: tuple[int, ...]
    seed: int


class Sampler(Protocol):
    """Answers requests; collective over the world."""

    def generate(
        self,
        requests: Sequence[Request],
        sampling: SamplingConfig,
        advance: Advance,
        finished: Finished = lambda _index, _rollout: None,
    ) -> list[Rollout]:
        """Samples one response a request.

        Every rank passes the same requests and gets all rollouts, in the order of the requests. A
        rollout depends on its request, the sampling and the weights alone, not on what else is in
        the batch or which engine drew it (to the last bit where the backend's kernels allow).
        `sampling.temperature` 0 is greedy; `sampling.samples_per_question` is not read here.
        A backend that streams calls `finished` for every request, each on one rank alone; one that
        does not never calls it. It must return at once and is not collective.

        Raises:
            UserError: if a prompt leaves no room in `sampling.max_total_tokens`, or an engine in
                another process has died and does not come back.
        """
        ...


class RolloutEngine(Sampler, Protocol):
    """A backend that samples responses; every method is collective over the world.

    One that shares GPUs with training gives its memory back between generations, in this order:
    `sleep`, `wake_weights`, `load_weights` or a write in place with `forget_prefixes` after it,
    `wake_cache`. A step that is done already does nothing; one out of order is a `RuntimeError`
    that names the state, see `cycle`. One that shares nothing never sleeps.
    """

    def renew_by(self, renew: Renew) -> None:
        """Takes what brings the policy's weights into engines that were started again.

        Without it, an engine in another process that dies ends the run.
        """
        ...

    @property
    def receivers(self) -> Collection[int] | None:
        """World ranks that hand whole tensors to the engine; None: all of them."""
        ...

    def live_shard(self) -> LiveShard | None:
        """Returns the parameters that this rank's part of the engine computes with; not collective.

        They stay where they are as long as the engine lives. Whether they may be written is for the
        caller to find out. None: they are in no reach, and `load_weights` is the way.
        """
        ...

    def load_weights(
        self, tensors: Iterator[tuple[str, torch.Tensor]], expected: Checksums | None = None
    ) -> list[str]:
        """Replaces all weights and forgets every cached prefix.

        `tensors` are Hugging Face names and full tensors, in the same order on every receiver and
        nothing on other ranks; the iterator may itself be collective, each rank draws all of it. A
        tensor must not change until the call returns.

        Returns:
            With `expected`, the checksums of all tensors, the names of those that the engine does
            not have so, as far as this rank can tell; else nothing.

        Raises:
            ValueError: if the names are not those of the model's checkpoint.
            UserError: on every rank, if an engine in other processes fails.
        """
        ...

    def forget_prefixes(self) -> None:
        """Forgets every cached prefix, after all weights were written in place."""
        ...

    @property
    def needs_weights(self) -> bool:
        """Whether it cannot generate before weights are brought: it sleeps, or never had any."""
        ...

    def sleep(self) -> None:
        """Gives back the memory of weights and cache, whose content is lost."""
        ...

    def wake_weights(self) -> None:
        """Takes memory for the weights again, at the addresses where they lay; nothing is in it."""
        ...

    def wake_cache(self) -> None:
        """Takes memory for the cache again, once the weights are written; then it generates."""
        ...

    def close(self) -> None:
        """Frees the engine's memory; the process group of the world stays."""
        ...
