"""One batch, one result: policy and token_rm under parallel layouts, against one rank.

Why the engine has no factor of its own
---------------------------------------
The objective of a response token (of a trajectory, in Eq. 12) is divided by the denominators of the
whole update before the engine sees it: N+ and N-, the response tokens of all positive and of all
negative trajectories on all ranks, N+ + N- for the KL term, the number of trajectories for Eq. 12.
So the loss of the update is a plain sum, and it does not matter in which order it is taken:

    loss = sum over data-parallel ranks d
             sum over the micro-batches m of d
               sum over context-parallel ranks c
                 sum over the response tokens t of m that c scores:  l_t / N

Each link of the chain only has to add up, and to leave out or count twice nothing:

1. The packer deals whole trajectories: each is in one micro-batch of one d. A micro-batch that is
   padding only adds zero and has a backward pass, which collective calls within it need.
2. Context parallelism cuts trajectories by tokens: a response token is scored by the one c that
   holds the token before it. The mean score of Eq. 12 needs all of a trajectory: the sums of scores
   are added over c first. Each c then has the whole loss and its gradient by its own scores; the
   first c alone reports it.
3. The chunked head adds up chunks of tokens, as the sum over t does.
4. The loss function hands Megatron (local sum, 0 tokens). With `calculate_per_token_loss` Megatron
   does not divide it by micro-batches or scale it by cp, and without tokens it divides the gradient
   by nothing (`tests/contracts/test_megatron.py`). Two returned values instead of three would.
5. Megatron's data-parallel buffers add gradients over d and c together; no mean is taken.
6. Tensor and pipeline parallelism cut weights, not the sum. Every tp rank has the same loss, which
   one of them reports. A weight that all tp ranks hold whole sees, under sequence parallelism, a
   part of the tokens on each: it is marked, and Megatron adds its gradient over tp. Tied embeddings
   lie on the first and the last stage, and Megatron adds both gradients.
7. Recomputing, interleaving stages and sharing optimizer state change when and where, not what.

In numbers: weights and advantages 1, no KL, `negative_factor` 0.5. Positives `a` with
-logp = 1, 2, 3 and `b` with 6, so N+ = 4; a negative `c` of two tokens with advantage -1, so N- = 2
and each token's term is -exp(0) * -1 = 1.

    loss = (1 + 2 + 3 + 6)/4 + 0.5 (1 + 1)/2 = 3 + 0.5 = 3.5

Under dp2 cp2 with two micro-batches a rank:

              c = 0             c = 1
    d0 m0     a: (1 + 3)/4 = 1  a: 2/4 = 0.5
    d0 m1     padding: 0        padding: 0
    d1 m0     b: 6/4 = 1.5      0
    d1 m1     c: 0.5/2 = 0.25   c: 0.5/2 = 0.25

    1 + 0.5 + 0 + 0 + 1.5 + 0 + 0.25 + 0.25 = 3.5

A mean over micro-batches would make it 1.75, one over dp x cp 0.875; denominators of each d alone,
N+ = 3 and 1, would make the positives 6/3 + 6/1 = 8 instead of 3. The first two scale the gradient
and show in its norm, which is told before clipping (Adam would hardly notice); the last turns it,
and shows in every tensor.

Tried by hand, each in the engine's code and seen here:

| fault | layout | what tells |
| --- | --- | --- |
| every cp rank reports the loss of Eq. 12 | cp2 | the token_rm's loss, twice too large |
| a mean score over this cp rank's tokens alone | cp2 | the token_rm's scores, loss and gradients |
| the loss times cp | cp2 | both gradient norms, twice too large |
| one token told a micro-batch | dp2, micro-batches | both gradient norms, a quarter of theirs |
| norms not marked for sequence parallelism | tp2 sp | tp ranks hold different gradients |
| cut weights not marked as cut | tp2 | gradient norms, 0.4 off |
| outputs freed while gloo still sends them | pp2 vpp2 | gradients, 1.3 off, in some runs |
"""

from __future__ import annotations

from dataclasses import asdict
from itertools import combinations
from pathlib import Path

import pytest
import torch

from megatron_oreal.algorithm import objectives
from megatron_oreal.config.schema import OrealConfig
from tests.parallel.invariance.batch import drawn_weights, record, replay
from tests.parallel.invariance.compare import LEAST_MOVE, MODELS, bounds_of, compare
from tests.parallel.invariance.inputs import write_inputs
from tests.parallel.invariance.layouts import Layout, covering_set, full_product
from tests.parallel.invariance.run import Seen, run
from tests.ranks import RankPools

pytestmark = pytest.mark.parallel

FULL = full_product()
# A pool of three ranks more would be started for what two and four show.
OFFERED = [layout for layout in FULL if layout.ranks != 3]
COVERING = covering_set(OFFERED)


class Runs:
    """Writes what layouts read, and runs each of the plain ones once."""

    def __init__(self, ranks: RankPools, root: Path) -> None:
        self._ranks, self._root = ranks, root
        self._folders: dict[bool, Path] = {}
        self._plain: dict[Layout, Seen] = {}

    def folder(self, layout: Layout) -> Path:
        if layout.tied not in self._folders:
            self._folders[layout.tied] = write_inputs(
                self._root / str(layout.tied), tied=layout.tied
            )
        return self._folders[layout.tied]

    def __call__(self, layout: Layout) -> list[Seen]:
        return run(self._ranks(layout.ranks), self.folder(layout), [layout])[0]

    def plain(self, layout: Layout) -> Seen:
        if layout.plain not in self._plain:
            self._plain[layout.plain] = self(layout.plain)[0]
        return self._plain[layout.plain]


@pytest.fixture(scope="module")
def runs(ranks: RankPools, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(ranks, tmp_path_factory.mktemp("invariance"))


# The order of trajectories decides which of them share a rank and a micro-batch.
BACKWARDS = [
    Layout(backwards=True),
    Layout(dp=2, tight=True, backwards=True),
    Layout(pp=2, cp=2, tight=True, backwards=True),
]


@pytest.mark.parametrize("layout", COVERING + BACKWARDS, ids=str)
def test_a_layout_changes_no_number(runs: Runs, layout: Layout) -> None:
    found = compare(runs.folder(layout), runs(layout), runs.plain(layout))
    bounds = bounds_of(layout)
    for model in MODELS:
        differences = found[model]
        moved = differences.pop("moved")
        beyond = {name: value for name, value in differences.items() if not value <= bounds[name]}
        assert not beyond, (model, beyond)
        assert moved >= LEAST_MOVE, model


def test_every_choice_meets_every_other() -> None:
    """Each two choices that go together are made together by some layout of the covering set."""

    def pairs(layouts: list[Layout]) -> set[tuple]:
        return {pair for layout in layouts for pair in combinations(asdict(layout).items(), 2)}

    assert pairs(COVERING) == pairs(OFFERED)
    assert all(layout.is_valid and layout.ranks <= 4 for layout in FULL)
    assert len(set(FULL)) == len(FULL)


def test_the_batch_asks_for_every_term(tmp_path: Path) -> None:
    """Positives and negatives weigh something, and one response is of a single token."""
    record(tmp_path)
    trajectories = replay(tmp_path)
    weights = drawn_weights(trajectories)
    for sign in (1, -1):
        mine = [w for w, t in zip(weights, trajectories, strict=True) if t.reward == sign]
        assert len(mine) == len(trajectories) / 2
        assert torch.cat(mine).mean() > 0.15
    assert min(t.response_length for t in trajectories) == 1
    assert all(t.advantage for t in trajectories)


def test_the_chain_adds_up() -> None:
    """The numbers of this module's docstring, from the objective itself."""
    objective = objectives.policy_objective(OrealConfig(kl_coefficient=0.0), 4, 2)

    def part(*logprobs: float, reward: float = 1.0) -> float:
        ones = torch.ones(len(logprobs))
        fields = {
            "reward": reward * ones,
            "advantage": reward * ones,
            "token_weight": ones,
            "reference_logprobs": 0 * ones,
        }
        return float(objective(torch.tensor(logprobs), fields).sum())

    ranks = [part(-1.0, -3.0), part(-2.0), part(), part(), part(-6.0), part()]
    ranks += [part(-5.0, reward=-1.0), part(-7.0, reward=-1.0)]
    assert ranks == [1.0, 0.5, 0.0, 0.0, 1.5, 0.0, 0.25, 0.25]
    whole = part(-1.0, -2.0, -3.0, -6.0) + part(-5.0, -7.0, reward=-1.0)
    assert whole == sum(ranks) == 3.5
