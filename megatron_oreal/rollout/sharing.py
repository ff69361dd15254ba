"""What every backend does: how long responses may get, how far all are, which tensors came."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_oreal.config.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence

    import torch

    from megatron_oreal.config.schema import SamplingConfig
    from megatron_oreal.rollout.engine import Request
    from megatron_oreal.types import Advance


_NAMED = 8  # requests, then their number


def response_budgets(
    requests: Sequence[Request], sampling: SamplingConfig, max_total_tokens: int
) -> list[int]:
    """Returns the most tokens that each response may have; pure.

    Args:
        requests: What is asked.
        sampling: How.
        max_total_tokens: The engine's own limit on prompt and response together.

    Raises:
        UserError: A prompt leaves no room.
    """
    window = min(sampling.max_total_tokens, max_total_tokens)
    longest = max((len(request.tokens) for request in requests), default=0)
    if longest >= window:
        raise UserError(
            f"sampling.max_total_tokens={window}: a prompt of {longest} tokens "
            "leaves no room for a response; raise it or drop the prompt"
        )
    return [min(sampling.max_new_tokens, window - len(request.tokens)) for request in requests]


def named(
    tensors: Iterator[tuple[str, torch.Tensor]], names: set[str]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Passes tensors on and notes their names."""
    for name, tensor in tensors:
        names.add(name)
        yield name, tensor


def unanswered(asked: Collection[int], answered: Collection[int]) -> str:
    """Returns in words which requests, by their numbers, an engine still works at."""
    left = [str(index) for index in asked if index not in answered]
    more = ", ..." if len(left) > _NAMED else ""
    return f"{len(left)} of {len(asked)} requests: {', '.join(left[:_NAMED])}{more}"


class SharedProgress:
    """Turns one rank's finished requests into an estimate for all, exact at the end."""

    def __init__(self, n_own: int, n_all: int, advance: Advance) -> None:
        """Takes how many requests are this rank's, and how many there are."""
        self._n_own, self._n_all, self._advance = n_own, n_all, advance
        self._told = 0

    def report(self, n_done: int) -> None:
        """Takes the number of own requests that are done."""
        self._tell(self._n_all * n_done // self._n_own)

    def finish(self) -> None:
        """Takes that all ranks are done."""
        self._tell(self._n_all)

    def _tell(self, total: int) -> None:
        if total > self._told:
            self._advance(total - self._told)
            self._told = total
