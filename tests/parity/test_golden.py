"""The objective against the authors' training code: golden_oreal.json, float64, ten cases.

Each case names the reference's switches. They map so: `threshold_rescale` is `threshold` (0.5
unless given), `topk_rescale` is `topk`, no `token_level_rm` is `none`, `pos_mult_adv` (off where
absent) is `positive_times_advantage`, `kl_type: mse` is `k2` and its default `k3`. Nothing in the
file differs from our definitions. `plain_oreal`, with which the loop is compared, is held to the
same numbers.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from megatron_oreal.algorithm.objectives import (
    count_tokens,
    policy_loss_terms,
    policy_objective,
    token_rm_objective,
)
from megatron_oreal.algorithm.shaping import shape_rewards
from megatron_oreal.algorithm.token_weights import token_weights
from megatron_oreal.config.schema import OrealConfig, TokenWeightsConfig, VerifierConfig
from megatron_oreal.types import Trajectory
from tests.parity.plain_oreal import Answers, plain_oreal
from tests.unit.algorithm.groups import make_group

CASES = json.loads((Path(__file__).parent / "golden_oreal.json").read_text())["cases"]
KNOWN_SWITCHES = {
    "threshold_rescale",
    "correct_threshold",
    "incorrect_threshold",
    "topk_rescale",
    "correct_topk_ratio",
    "incorrect_topk_ratio",
    "token_level_rm",
    "pos_mult_adv",
    "kl_type",
    "kl_coef",
    "shaping",
    "positive_loss_factor",
    "negative_loss_factor",
}
TOLERANCE = 1e-12


class Flat(NamedTuple):
    """All response tokens of a case in one row, `[t]`, and its trajectories."""

    logprobs: torch.Tensor
    fields: dict[str, torch.Tensor]
    tokens: tuple[int, int]


def config_of(switches: dict[str, Any]) -> OrealConfig:
    """Translates the reference's switches."""
    assert switches.keys() <= KNOWN_SWITCHES
    if "token_level_rm" in switches:
        weights = TokenWeightsConfig(kind="none")
    elif switches.get("topk_rescale"):
        ratios = (switches["correct_topk_ratio"], switches["incorrect_topk_ratio"])
        weights = TokenWeightsConfig(kind="topk", ratio_pos=ratios[0], ratio_neg=ratios[1])
    else:
        weights = TokenWeightsConfig(
            kind="threshold",
            c_pos=switches.get("correct_threshold", 0.5),
            c_neg=switches.get("incorrect_threshold", 0.5),
        )
    return OrealConfig(
        shaping=switches["shaping"],
        token_weights=weights,
        positive_factor=switches["positive_loss_factor"],
        negative_factor=switches["negative_loss_factor"],
        positive_times_advantage=switches.get("pos_mult_adv", False),
        kl="k2" if switches.get("kl_type") == "mse" else "k3",
        kl_coefficient=switches["kl_coef"],
    )


def rows(case: dict[str, Any], name: str) -> list[torch.Tensor]:
    """One field of every trajectory, `[n]` each."""
    return [torch.tensor(item[name], dtype=torch.float64) for item in case["trajectories"]]


def flatten(case: dict[str, Any]) -> Flat:
    cfg, items = config_of(case["switches"]), case["trajectories"]
    logprobs = rows(case, "logprobs")
    rewards = [item["reward"] for item in items]
    trajectories = [
        Trajectory("q", (0,) * (1 + len(x)), 1, item["reward"], item["advantage"])
        for item, x in zip(items, logprobs, strict=True)
    ]
    # Without a token_rm the file's scores stand unused: `none` reads their shape alone.
    weights = token_weights(rows(case, "token_scores"), rewards, cfg.token_weights)
    fields = {
        "token_weight": weights,
        "reference_logprobs": rows(case, "reference_logprobs"),
        "reward": [
            torch.full_like(x, t.reward) for x, t in zip(logprobs, trajectories, strict=True)
        ],
        "advantage": [
            torch.full_like(x, t.advantage) for x, t in zip(logprobs, trajectories, strict=True)
        ],
    }
    flat = {name: torch.cat(values) for name, values in fields.items()}
    return Flat(torch.cat(logprobs).requires_grad_(), flat, count_tokens(trajectories))


def test_the_file_holds_what_the_tests_walk_over():
    assert len(CASES) == 10
    kinds = {(config_of(c["switches"]).token_weights.kind, c["switches"]["shaping"]) for c in CASES}
    assert kinds == {(k, s) for k in ("threshold", "topk", "none") for s in ("rloo", "grpo")}


@pytest.mark.parametrize("case", CASES)
def test_losses_by_part(case):
    flat = flatten(case)
    cfg = config_of(case["switches"])
    terms = policy_loss_terms(cfg, *flat.tokens, flat.logprobs, flat.fields)
    for part in ("positive", "negative", "kl"):
        assert terms[part].sum().item() == pytest.approx(case[f"{part}_loss"], rel=TOLERANCE)


@pytest.mark.parametrize("case", CASES)
def test_policy_loss_and_its_gradient(case):
    flat = flatten(case)
    cfg = config_of(case["switches"])
    loss = policy_objective(cfg, *flat.tokens)(flat.logprobs, flat.fields).sum()
    (gradient,) = torch.autograd.grad(loss, flat.logprobs)
    assert loss.item() == pytest.approx(case["policy_loss"], rel=TOLERANCE)
    golden = torch.cat(rows(case, "grad_logprobs"))
    torch.testing.assert_close(gradient, golden, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("case", [c for c in CASES if c["token_rm_loss"] is not None])
def test_token_rm_loss_and_its_gradient(case):
    scores = [x.requires_grad_() for x in rows(case, "token_scores")]
    rewards = torch.tensor([item["reward"] for item in case["trajectories"]])
    means = torch.stack([x.mean() for x in scores])
    loss = token_rm_objective(len(scores))(means, rewards).sum()
    assert loss.item() == pytest.approx(case["token_rm_loss"], rel=TOLERANCE)
    gradients = torch.autograd.grad(loss, scores)
    golden = rows(case, "grad_token_scores")
    for gradient, expected in zip(gradients, golden, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("case", CASES)
def test_advantages_of_the_whole_group(case):
    for item in case["trajectories"]:
        outcomes = "".join("+" if reward > 0 else "-" for reward in item["group_rewards"])
        (group,) = shape_rewards([make_group(outcomes)], config_of(case["switches"]))
        first = group.rewards.index(item["reward"])
        assert group.advantages[first] == pytest.approx(item["advantage"], rel=TOLERANCE)


class Table(NamedTuple):
    """The groups of a case, a row an answer; answers that were not kept are one token long."""

    answers: Answers
    kept: torch.Tensor
    items: list[dict[str, Any]]
    logprobs: torch.Tensor
    reference: torch.Tensor
    scores: torch.Tensor


def tabulate(case: dict[str, Any]) -> Table:
    """Lays the trajectories, a correct and an incorrect one of each group, into their groups."""
    rows: list[tuple[int, float, dict[str, Any] | None]] = []
    items = case["trajectories"]
    for q, pair in enumerate(zip(items[::2], items[1::2], strict=True)):
        rewards = pair[0]["group_rewards"]
        firsts = {rewards.index(item["reward"]): item for item in pair}
        rows += [(q, reward, firsts.get(i)) for i, reward in enumerate(rewards)]
    longest = max(len(item["logprobs"]) for item in items)
    values = torch.full((3, len(rows), 1 + longest), -1.0, dtype=torch.float64)
    response = torch.zeros(len(rows), 1 + longest, dtype=torch.bool)
    for row, (_, _, item) in enumerate(rows):
        end = 1 + (len(item["logprobs"]) if item else 1)  # after one token of question
        response[row, 1:end] = True
        for i, name in enumerate(("logprobs", "reference_logprobs", "token_scores")):
            if item:
                values[i, row, 1:end] = torch.tensor(item[name], dtype=torch.float64)
    answers = Answers(
        question=torch.tensor([q for q, _, _ in rows]),
        outcome=["+" if reward > 0 else "-" for _, reward, _ in rows],
        stopped=torch.ones(len(rows), dtype=torch.bool),
        tokens=torch.zeros(response.shape, dtype=torch.int64),
        response=response,
        rollout_logprobs=values[0],
    )
    kept = torch.tensor([item is not None for *_, item in rows])
    return Table(answers, kept, [item for *_, item in rows if item], *values)


def two_words(logprobs: torch.Tensor) -> torch.Tensor:
    """Logits of a vocabulary of two that give word 0 at t these log-probabilities."""
    return torch.stack((logprobs, torch.log1p(-logprobs.exp())), dim=2).roll(-1, dims=1)


@pytest.mark.parametrize("case", CASES)
def test_the_plain_function_of_the_parity_suite(case):
    cfg, table = config_of(case["switches"]), tabulate(case)
    logprobs, scores = table.logprobs.requires_grad_(), table.scores.requires_grad_()
    result = plain_oreal(
        cfg,
        VerifierConfig(),
        table.answers,
        pairs=table.kept,
        logits=two_words(logprobs),
        reference_logits=two_words(table.reference),
        scores=scores.roll(-1, dims=1),
    )
    losses = [(result.policy_loss, logprobs, "policy_loss", "grad_logprobs")]
    if case["token_rm_loss"] is not None:
        losses.append((result.token_rm_loss, scores, "token_rm_loss", "grad_token_scores"))
    for loss, point, name, gradient_name in losses:
        assert loss.item() == pytest.approx(case[name], rel=TOLERANCE)
        (gradient,) = torch.autograd.grad(loss, point, retain_graph=True)
        kept = gradient[table.answers.response & table.kept[:, None]]
        golden = [value for item in table.items for value in item[gradient_name]]
        expected = torch.tensor(golden, dtype=torch.float64)
        torch.testing.assert_close(kept, expected, rtol=0, atol=TOLERANCE)
