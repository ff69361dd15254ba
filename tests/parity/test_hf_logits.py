"""Our packed, sharded models against transformers, which reads one trajectory at a time."""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from transformers import Qwen2ForCausalLM

from megatron_oreal.engine.micro_batch import ScorePosition
from tests.ranks import RankPools
from tests.toy_models import Scored, make_trajectories, score, write_model

pytestmark = pytest.mark.parallel

LAYOUTS = [(1, 1, 1), (2, 2, 1), (2, 1, 2), (4, 2, 2), (2, 1, 1), (4, 2, 1), (4, 4, 1)]
"""ranks, tp, pp; the last cuts a group of query heads that share one key-value head."""

ATOL = 2e-5


class Expected(NamedTuple):
    """Per trajectory: `[response]` twice, and the last hidden states `[n, h]`."""

    logprobs: list[torch.Tensor]
    entropy: list[torch.Tensor]
    hidden: list[torch.Tensor]


class Checkpoint(NamedTuple):
    """A model folder and what transformers makes of it."""

    folder: Path
    expected: Expected


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def checkpoint(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Checkpoint:
    folder = write_model(tmp_path_factory.mktemp("parity") / "hf", tied=request.param)
    model = Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == request.param
    expected = Expected([], [], [])
    for trajectory in make_trajectories():
        tokens = torch.tensor([trajectory.tokens])
        with torch.no_grad():
            hidden = model.model(tokens).last_hidden_state
            log_softmax = model(tokens).logits[0].double().log_softmax(dim=1)
        before_response = log_softmax[trajectory.prompt_length - 1 : -1]  # t predicts t + 1
        response = tokens[0, trajectory.prompt_length :, None]
        expected.logprobs.append(before_response.gather(1, response)[:, 0].float())
        expected.entropy.append(-(before_response.exp() * before_response).sum(dim=1).float())
        expected.hidden.append(hidden[0])
    return Checkpoint(folder, expected)


@pytest.fixture(scope="module", params=LAYOUTS, ids=str)
def scored(
    request: pytest.FixtureRequest, ranks: RankPools, checkpoint: Checkpoint
) -> list[Scored]:
    size, tp, pp = request.param
    return ranks(size).run(score, checkpoint.folder, tp=tp, pp=pp)


def assert_close(got: list[torch.Tensor], want: list[torch.Tensor]) -> None:
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=ATOL)


def test_logprobs_and_entropy(checkpoint: Checkpoint, scored: list[Scored]) -> None:
    for rank in scored:
        for result in rank.policy:
            assert_close(result.logprobs, checkpoint.expected.logprobs)
            assert_close(result.entropy, checkpoint.expected.entropy)


@pytest.mark.parametrize(("position", "shift"), [("before", 1), ("at", 0)])
def test_token_scores(
    checkpoint: Checkpoint, scored: list[Scored], position: ScorePosition, shift: int
) -> None:
    head = next(rank.head for rank in scored if rank.head is not None)
    want = [
        (hidden @ head[0])[trajectory.prompt_length - shift : len(hidden) - shift]
        for trajectory, hidden in zip(make_trajectories(), checkpoint.expected.hidden, strict=True)
    ]
    for rank in scored:
        assert_close(rank.scores[position], want)


def test_every_rank_draws_the_same_scalar_head_within_its_bound(scored: list[Scored]) -> None:
    heads = [rank.head for rank in scored if rank.head is not None]
    assert all(torch.equal(head, heads[0]) for head in heads)
    assert heads[0].shape == (1, 32)
    assert 0.8 / math.sqrt(32) < float(heads[0].abs().max()) < 1 / math.sqrt(32)
    assert float(heads[0].min()) < 0 < float(heads[0].max())
