"""A step whose numbers are not finite changes no weight of any rank, and the next one is as ever.

One trajectory of one data-parallel rank spoils the batch; the other ranks see nothing of it but
what they are told.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from megatron_oreal.engine.megatron_model import Refuse, refuse_nothing
from megatron_oreal.engine.roles import Policy, PolicyStep
from tests.ranks import RankPools
from tests.toy_models import (
    TIGHT,
    make_config,
    make_policy,
    make_trajectories,
    open_models,
    pack,
    whole_weights,
    write_model,
)

pytestmark = pytest.mark.parallel
Objective = Callable[[torch.Tensor, dict[str, torch.Tensor]], torch.Tensor]
RATE, NAN = 1e-3, float("nan")


def linear(logprobs: torch.Tensor, fields: dict[str, torch.Tensor]) -> torch.Tensor:
    """A loss that is NaN where `factor` is."""
    return -logprobs * fields["factor"]


def kinked(logprobs: torch.Tensor, fields: dict[str, torch.Tensor]) -> torch.Tensor:
    """The same loss, with a term of value 0 whose gradient is NaN where `factor` is 0."""
    smooth = (fields["factor"] != 0).float()
    return linear(logprobs, fields) + (logprobs * 0 + smooth).sqrt() - smooth


def short(values: Mapping[str, Sequence[torch.Tensor]]) -> str:
    """Refuses by values that every rank has."""
    return "short" if min(map(len, values["entropy"])) < 1000 else ""


class Seen(NamedTuple):
    """`end` is after the step that follows the refused ones, `untouched` after that step alone."""

    start: dict[str, torch.Tensor]
    refused: list[PolicyStep]
    still: dict[str, torch.Tensor]
    taken: PolicyStep
    end: dict[str, torch.Tensor]
    untouched: dict[str, torch.Tensor]


def spoil(folder: Path, distributed_optimizer: bool) -> Seen:
    """Two steps that must be refused and one that must not; collective over the world."""
    source = open_models(make_config(folder, distributed_optimizer=distributed_optimizer))
    trajectories = make_trajectories()

    def step(
        policy: Policy, factor: float, objective: Objective, refuse: Refuse = refuse_nothing
    ) -> PolicyStep:
        factors = [torch.full((t.response_length,), 0.1) for t in trajectories]
        factors[2][1] = factor
        batch = pack(trajectories, TIGHT).with_fields(factor=factors)
        return policy.step(batch, objective, RATE, refuse=refuse)

    policy, other = make_policy(source), make_policy(source)
    step(other, 0.2, kinked)
    return Seen(
        start=whole_weights(source, policy),
        refused=[
            step(policy, NAN, linear),
            step(policy, 0.0, kinked),
            step(policy, 0.2, kinked, short),
        ],
        still=whole_weights(source, policy),
        taken=step(policy, 0.2, kinked),
        end=whole_weights(source, policy),
        untouched=whole_weights(source, other),
    )


@pytest.mark.parametrize(
    ("layout", "distributed_optimizer"),
    [({}, True), ({}, False), ({"pp": 2}, True)],
    ids=["dp2", "dp2, plain optimizer", "pp2"],
)
def test_all_ranks_refuse_alike_and_go_on(
    ranks: RankPools, tmp_path: Path, layout: dict[str, int], distributed_optimizer: bool
) -> None:
    folder = write_model(tmp_path / "hf", tied=False)
    for rank in ranks(2).run(spoil, folder, distributed_optimizer, **layout):
        assert [step.refused for step in rank.refused] == [
            "loss not finite",
            "gradient norm not finite",
            "short",
        ]
        assert rank.taken.refused == ""
        for name, weights in rank.start.items():
            assert torch.equal(rank.still[name], weights), name
            assert torch.equal(rank.end[name], rank.untouched[name]), name
            assert not torch.equal(rank.end[name], weights), name
