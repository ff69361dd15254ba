"""The batch of all layouts: recorded rollouts, and what the objective reads of each token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from megatron_oreal.algorithm import objectives, selection, shaping
from megatron_oreal.algorithm.token_weights import token_weights
from megatron_oreal.config.schema import OrealConfig, TokenWeightsConfig
from megatron_oreal.rollout.record import (
    FORMAT,
    RecordHeader,
    decode_groups,
    record_path,
    write_groups,
)
from megatron_oreal.types import Outcome, Prompt, Rollout, RolloutGroup, Trajectory, Verdict
from tests.toy_models import VOCAB

OREAL = OrealConfig()
SEED, ITERATION = 23, 0
# The length of each question's prompt and of its four answers. The first two answers are right, the
# last is wrong, the third nobody could decide. A response of one token is the shortest there can
# be; a length seldom divides by what a layout cuts it into.
LENGTHS = ((1, (1, 1, 2, 1)), (3, (9, 12, 5, 17)), (6, (2, 5, 8, 11)), (5, (19, 14, 3, 4)))
OUTCOMES = (Outcome.CORRECT, Outcome.CORRECT, Outcome.UNVERIFIED, Outcome.INCORRECT)
ROOMY, TIGHT = 4096, 40  # tokens per micro-batch; padded for cp4 the longest trajectory has 24


def record(folder: Path) -> Path:
    """Writes judged groups as an iteration records them."""
    generator = torch.Generator().manual_seed(SEED)

    def draw(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(VOCAB, (count,), generator=generator).tolist())

    groups = [
        RolloutGroup(
            prompt=Prompt(str(number), question="?", gold_answer="!", tokens=draw(prompt)),
            rollouts=tuple(Rollout(draw(n), (-4.0,) * n, "", stopped=True) for n in answers),
            verdicts=tuple(Verdict(outcome, "rule", "", None, 0.0) for outcome in OUTCOMES),
        )
        for number, (prompt, answers) in enumerate(LENGTHS)
    ]
    header = RecordHeader(FORMAT, ITERATION, SEED, len(LENGTHS), len(OUTCOMES), vocabulary="")
    return write_groups(folder, header, groups)


def replay(folder: Path) -> list[Trajectory]:
    """What a run trains on: of each question in the record a right and a wrong answer."""
    _, groups = decode_groups(record_path(folder, ITERATION).read_bytes())
    return list(selection.select(shaping.shape_rewards(groups, OREAL), OREAL, SEED, ITERATION))


def drawn_weights(trajectories: Sequence[Trajectory]) -> list[torch.Tensor]:
    """Token weights of scores drawn in +-3.

    The scores of a trajectory lie around a mean of its own: around 0 the running means of a long
    one would vanish, and its weights with them.
    """
    generator = torch.Generator().manual_seed(SEED)
    scores = []
    for trajectory in trajectories:
        drawn = torch.rand(1 + trajectory.response_length, generator=generator) * 2 - 1
        scores.append(2 * drawn[0] + drawn[1:])
    return token_weights(scores, [t.reward for t in trajectories], TokenWeightsConfig())


def sum_of_terms(
    trajectories: Sequence[Trajectory],
    fields: Mapping[str, list[torch.Tensor]],
    logprobs: Sequence[torch.Tensor],
) -> float:
    """The sum of the absolute parts of the policy's loss: what its rounding is relative to."""
    terms = objectives.policy_loss_terms(
        OREAL,
        *objectives.count_tokens(trajectories),
        torch.cat(list(logprobs)),
        {name: torch.cat(values) for name, values in fields.items()},
    )
    return sum(float(term.abs().sum()) for term in terms.values())
