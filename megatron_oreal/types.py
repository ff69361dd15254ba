"""The plain data that moves through an iteration; shapes are in docstrings, no code knows ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


Advance = Callable[[int], None]
"""Told how much more of a phase is done (requests, answers, micro-batches); local to a rank."""


def advance_nothing(_: int) -> None:
    """Shows no progress."""


class Outcome(StrEnum):
    """What a verifier says of one answer."""

    CORRECT = "correct"
    INCORRECT = "incorrect"
    UNVERIFIED = "unverified"  # could not decide: never counted as wrong


@dataclass(frozen=True, slots=True)
class Prompt:
    """One question, tokenised once; `tokens` hold the chat template and the generation prefix.

    `data_source` chooses the verifier; `category` is what results are broken down by.
    """

    id: str
    question: str
    gold_answer: str
    tokens: tuple[int, ...]
    data_source: str = ""
    pass_rate: float | None = None
    category: str = ""


@dataclass(frozen=True, slots=True)
class Rollout:
    """One sampled response.

    `tokens` are the response's ids, the stop token included where it was sampled; `logprobs[i]` is
    the engine's raw log-probability of `tokens[i]`; `stopped` is false where the length limit cut
    the response.
    """

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    text: str
    stopped: bool


@dataclass(frozen=True, slots=True)
class Verdict:
    """The outcome of one answer, who decided it (`format`, `rule`, `judge`) and why."""

    outcome: Outcome
    by: str
    reason: str
    extracted: str | None
    seconds: float


@dataclass(frozen=True, slots=True)
class RolloutGroup:
    """The K samples of one question; `verdicts`, `rewards` and `advantages` are `[K]` once known.

    `rewards` are +1 correct, -1 incorrect, None unverified; `advantages` are None where the reward
    is.
    """

    prompt: Prompt
    rollouts: tuple[Rollout, ...]
    verdicts: tuple[Verdict, ...] = ()
    rewards: tuple[float | None, ...] = ()
    advantages: tuple[float | None, ...] = ()
    pass_rate: float | None = None


@dataclass(frozen=True, slots=True)
class Trajectory:
    """One question and one response as the trainer sees them: `tokens` = prompt, response, `[n]`.

    Everything per token of the response is `[response_length]` and stands at the response token it
    scores.
    """

    prompt_id: str
    tokens: tuple[int, ...]
    prompt_length: int
    reward: float
    advantage: float
    rollout_logprobs: tuple[float, ...] = ()

    @property
    def response_length(self) -> int:
        """Number of response tokens."""
        return len(self.tokens) - self.prompt_length


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """All trajectories of an update, alike on every rank, dealt to ranks and micro-batches.

    `micro_batches[d][m]` lists indices into `trajectories`; every data-parallel rank d has the same
    number of micro-batches, an empty one is padding only. `fields[name][i]` is
    `[response_length of trajectory i]`, fp32, on the CPU, one value a response token.
    """

    trajectories: tuple[Trajectory, ...]
    micro_batches: tuple[tuple[tuple[int, ...], ...], ...]
    fields: dict[str, list[torch.Tensor]] = field(default_factory=dict)

    def with_fields(self, **fields: list[torch.Tensor]) -> PackedBatch:
        """Returns the batch with these per-token fields added or replaced."""
        return replace(self, fields={**self.fields, **fields})
