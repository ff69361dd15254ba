"""Our packed, sharded models against transformers, which reads one trajectory at a time."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_oreal.engine.micro_batch import ScorePosition
from tests.ranks import RankPools
from tests.toy_models import (
    Scored,
    make_config,
    make_policy,
    make_trajectories,
    open_models,
    pack,
    score,
    write_toy,
)

pytestmark = pytest.mark.parallel

LAYOUTS = [(1, 1, 1), (2, 2, 1), (2, 1, 2), (4, 2, 2), (2, 1, 1), (4, 2, 1), (4, 4, 1)]
"""ranks, tp, pp; the last cuts a group of query heads that share one key-value head."""

CASES = [
    *(("qwen2", layout) for layout in LAYOUTS),
    *(("qwen2_tied", layout) for layout in [(1, 1, 1), (2, 1, 2), (4, 2, 2)]),
    *(("qwen3", layout) for layout in [(1, 1, 1), (4, 2, 2), (4, 4, 1)]),
    *(("llama", layout) for layout in [(1, 1, 1), (4, 2, 2), (4, 4, 1)]),
    *(("smollm2", layout) for layout in [(1, 1, 1), (2, 1, 2), (3, 3, 1)]),
]

ATOL = 2e-5


class Expected(NamedTuple):
    """Per trajectory: `[response]` twice, and the last hidden states `[n, h]`."""

    logprobs: list[torch.Tensor]
    entropy: list[torch.Tensor]
    hidden: list[torch.Tensor]


class Scores(NamedTuple):
    """What transformers makes of a model, and what each rank does."""

    expected: Expected
    ranks: list[Scored]


def expect(folder: Path) -> Expected:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tied = json.loads((folder / "config.json").read_text())["tie_word_embeddings"]
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
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
    return expected


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Expected]]:
    @cache
    def make(toy: str) -> tuple[Path, Expected]:
        folder = write_toy(tmp_path_factory.mktemp("parity") / toy, toy)
        return folder, expect(folder)

    return make


@pytest.fixture(scope="module", params=CASES, ids=str)
def scores(
    request: pytest.FixtureRequest,
    ranks: RankPools,
    toys: Callable[[str], tuple[Path, Expected]],
) -> Scores:
    toy, (size, tp, pp) = request.param
    folder, expected = toys(toy)
    return Scores(expected, ranks(size).run(score, folder, tp=tp, pp=pp))


def uneven_logprobs(folder: Path, first: int | None, last: int | None) -> list[torch.Tensor]:
    config = make_config(folder)
    layout = replace(config.parallel, first_stage_layers=first, last_stage_layers=last)
    policy = make_policy(open_models(replace(config, parallel=layout)))
    return policy.logprobs(pack(make_trajectories())).logprobs


@pytest.mark.parametrize(
    ("stages", "ends"), [(2, (1, None)), (3, (None, 2)), (3, (1, 1))], ids=["1+3", "1+1+2", "1+2+1"]
)
def test_stages_of_different_depth(
    ranks: RankPools,
    toys: Callable[[str], tuple[Path, Expected]],
    stages: int,
    ends: tuple[int | None, int | None],
) -> None:
    folder, expected = toys("smollm2")
    for logprobs in ranks(stages).run(uneven_logprobs, folder, *ends, pp=stages):
        assert_close(logprobs, expected.logprobs)


def assert_close(got: list[torch.Tensor], want: list[torch.Tensor]) -> None:
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=ATOL)


def test_logprobs_and_entropy(scores: Scores) -> None:
    for rank in scores.ranks:
        for result in rank.policy:
            assert_close(result.logprobs, scores.expected.logprobs)
            assert_close(result.entropy, scores.expected.entropy)


@pytest.mark.parametrize(("position", "shift"), [("before", 1), ("at", 0)])
def test_token_scores(scores: Scores, position: ScorePosition, shift: int) -> None:
    head = next(rank.head for rank in scores.ranks if rank.head is not None)
    want = [
        (hidden @ head[0])[trajectory.prompt_length - shift : len(hidden) - shift]
        for trajectory, hidden in zip(make_trajectories(), scores.expected.hidden, strict=True)
    ]
    for rank in scores.ranks:
        assert_close(rank.scores[position], want)


def test_every_rank_draws_the_same_scalar_head_within_its_bound(scores: Scores) -> None:
    heads = [rank.head for rank in scores.ranks if rank.head is not None]
    bound = 1 / math.sqrt(heads[0].shape[1])
    assert all(torch.equal(head, heads[0]) for head in heads)
    assert heads[0].shape == (1, scores.expected.hidden[0].shape[1])
    assert 0.8 * bound < float(heads[0].abs().max()) < bound
    assert float(heads[0].min()) < 0 < float(heads[0].max())


def test_the_scaling_of_rotary_embeddings_shows(
    toys: Callable[[str], tuple[Path, Expected]], tmp_path: Path
) -> None:
    """Or a scaling left out would pass unseen on trajectories as short as these."""
    folder, scaled = toys("llama")
    shutil.copytree(folder, tmp_path / "unscaled")
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "unscaled" / "config.json").write_text(json.dumps(config | {"rope_scaling": None}))
    unscaled = expect(tmp_path / "unscaled")
    assert (
        max(
            float((a - b).abs().max())
            for a, b in zip(scaled.logprobs, unscaled.logprobs, strict=True)
        )
        > 10 * ATOL
    )
