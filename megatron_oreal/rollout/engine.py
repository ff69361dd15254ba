"""What a rollout backend is: requests in, rollouts out, new weights in between."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch

    from megatron_oreal.config.schema import SamplingConfig
    from megatron_oreal.types import Rollout

Advance = Callable[[int], None]
"""Told how many more requests are done; local to a rank. The calls of one `generate` sum to all."""


@dataclass(frozen=True, slots=True)
class Request:
    """One response to sample: the prompt's token ids and the seed that alone decides the draw."""

    tokens: tuple[int, ...]
    seed: int


class RolloutEngine(Protocol):
    """A backend that samples responses; every method is collective over the world."""

    def generate(
        self, requests: Sequence[Request], sampling: SamplingConfig, advance: Advance
    ) -> list[Rollout]:
        """Samples one response a request.

        Every rank passes the same requests and gets all rollouts, in the order of the requests. A
        rollout depends on its request, the sampling and the weights alone, not on what else is in
        the batch or which engine drew it (to the last bit where the backend's kernels allow).
        `sampling.temperature` 0 is greedy; `sampling.samples_per_question` is not read here.

        Raises:
            UserError: if a prompt leaves no room in `sampling.max_total_tokens`.
        """
        ...

    def load_weights(self, tensors: Iterator[tuple[str, torch.Tensor]]) -> None:
        """Replaces all weights and forgets every cached prefix.

        `tensors` are Hugging Face names and full tensors, the same in the same order on every rank;
        the iterator may itself be collective, each rank draws all of it. A tensor must not change
        until the call returns.

        Raises:
            ValueError: if the names are not those of the model's checkpoint.
        """
        ...

    def close(self) -> None:
        """Frees the engine's memory; the process group of the world stays."""
        ...
