"""What an iteration says about itself: each metric defined here, once, with its formula.

All functions are pure and take the values of the whole update, all ranks' trajectories: they
return flat names and floats, alike wherever they are called. A quantity of nothing (the AUC of one
class, the mean weight of no negatives) is left out rather than invented. Sums run in float64.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from megatron_oreal.algorithm.kl import k1, k3
from megatron_oreal.algorithm.objectives import policy_loss_terms

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from megatron_oreal.config.schema import OrealConfig, ScheduleConfig

QUANTILES = (0.1, 0.5, 0.9)
CALIBRATION_BINS = 10


def policy_metrics(
    cfg: OrealConfig,
    logprobs: Sequence[Tensor],
    fields: Mapping[str, Sequence[Tensor]],
    entropies: Sequence[Tensor] = (),
) -> dict[str, float]:
    """Measures the policy on the trajectories of an update, before the step.

    - `oreal/loss` = `oreal/positive_loss` + `oreal/negative_loss` + `oreal/kl_loss`: the terms of
      Eq. 11 summed over tokens, with factors and denominators.
    - `oreal/kl_k1`, `oreal/kl_k3`: mean over response tokens of -d and exp(d) - d - 1, d =
      reference logp - policy logp.
    - `oreal/reference_difference_max`: max |policy logp - reference logp|; 0 exactly while the two
      are the same model.
    - `oreal/logprob`: mean log-probability of a response token.
    - `oreal/entropy`: mean of the entropy of the policy's distribution, where `entropies` are
      given.
    - `oreal/positive_tokens`, `oreal/negative_tokens`: N+ and N-.

    Args:
        cfg: the objective.
        logprobs: policy log-probabilities, `[response_length]` a trajectory.
        fields: what `objectives.policy_fields` laid out, one such tensor a trajectory each.
        entropies: in nats, likewise.
    """
    if not logprobs:
        return {}
    logp = _flat(logprobs)
    flat = {name: _flat(values) for name, values in fields.items()}
    positive, negative = int((flat["reward"] > 0).sum()), int((flat["reward"] < 0).sum())
    terms = policy_loss_terms(cfg, positive, negative, logp, flat)
    sums = {f"oreal/{name}_loss": float(term.sum()) for name, term in terms.items()}
    reference = flat["reference_logprobs"]
    metrics = {
        "oreal/loss": sum(sums.values()),
        **sums,
        "oreal/kl_k1": float(k1(logp, reference).mean()),
        "oreal/kl_k3": float(k3(logp, reference).mean()),
        "oreal/reference_difference_max": float((logp - reference).abs().max()),
        "oreal/logprob": float(logp.mean()),
        "oreal/positive_tokens": float(positive),
        "oreal/negative_tokens": float(negative),
    }
    if entropies:
        metrics["oreal/entropy"] = float(_flat(entropies).mean())
    return metrics


def token_weight_metrics(weights: Sequence[Tensor], rewards: Sequence[float]) -> dict[str, float]:
    """Describes the token weights of each sign: how much of a response is learnt from.

    For `positive` and `negative`, over all response tokens of that sign:
    `token_weight/positive_mean`, the quantiles `token_weight/positive_p10`, `_p50`, `_p90` (the
    value of rank floor(q (t - 1)), no interpolation), and `token_weight/positive_zero_share`, the
    share of weights that are exactly 0.

    Args:
        weights: `[response_length]` a trajectory.
        rewards: one a trajectory.
    """
    metrics: dict[str, float] = {}
    for name, sign in (("positive", 1), ("negative", -1)):
        side = [w for w, reward in zip(weights, rewards, strict=True) if reward * sign > 0]
        if not side:
            continue
        ordered = _flat(side).sort().values
        prefix = f"token_weight/{name}"
        metrics[f"{prefix}_mean"] = float(ordered.mean())
        metrics[f"{prefix}_zero_share"] = float((ordered == 0).double().mean())
        for quantile in QUANTILES:
            rank = int(quantile * (ordered.numel() - 1))
            metrics[f"{prefix}_p{round(100 * quantile)}"] = float(ordered[rank])
    return metrics


def token_rm_metrics(mean_scores: Tensor, rewards: Tensor) -> dict[str, float]:
    """Measures the token_rm on the trajectories of an update, before its own step.

    With a response's mean score, of `mean_scores` `[n]`, as a logit x, its reward of `rewards`
    `[n]`, p = sigmoid(x), and label y = 1[reward > 0]:

    - `token_rm/loss`: mean binary cross-entropy of x against y (Eq. 12).
    - `token_rm/accuracy`: share of trajectories with (x > 0) = y.
    - `token_rm/auc`: chance that a correct trajectory scores above an incorrect one, a tie
      counting half (`rank_auc`); left out where one class is missing.
    - `token_rm/calibration_error`: with the p cut into 10 equal bins, sum over bins of
      (share of trajectories in the bin) |mean p - share correct|.
    - `token_rm/score_positive`, `token_rm/score_negative`: mean x of each class.
    """
    if not mean_scores.numel():
        return {}
    scores, correct = mean_scores.detach().double(), rewards > 0
    loss = functional.binary_cross_entropy_with_logits(scores, correct.double())
    metrics = {
        "token_rm/loss": float(loss),
        "token_rm/accuracy": float(((scores > 0) == correct).double().mean()),
        "token_rm/calibration_error": calibration_error(scores.sigmoid(), correct),
    }
    for name, side in (("positive", scores[correct]), ("negative", scores[~correct])):
        if side.numel():
            metrics[f"token_rm/score_{name}"] = float(side.mean())
    if correct.any() and not correct.all():
        metrics["token_rm/auc"] = rank_auc(scores, correct)
    return metrics


def step_metrics(model: str, grad_norm: float, learning_rate: float) -> dict[str, float]:
    """Names what one model's step was made with; `model` is `oreal`, the policy, or `token_rm`.

    - `oreal/grad_norm`, `token_rm/grad_norm`: square root of the sum, over all parameters, of the
      squared gradient of the whole loss, before clipping; 0 of a frozen policy.
    - `oreal/learning_rate`, `token_rm/learning_rate`: the rate of the step; 0 of a frozen policy.
    """
    return {f"{model}/grad_norm": grad_norm, f"{model}/learning_rate": learning_rate}


def iteration_metrics(
    schedule: ScheduleConfig,
    iteration: int,
    *,
    trajectories: int,
    dropped: int,
    updates: int,
    refused: int,
) -> dict[str, float]:
    """Says what an iteration came to, also one that trained on nothing.

    - `rollout/dropped_groups`: questions left out whole, for more than
      `verifier.max_unverified_share` of unverified answers.
    - `oreal/trajectories`: answers trained on; 0 where every question was trivial.
    - `oreal/skipped_iterations`: iterations since the start, frozen ones left out, in which the
      policy took no step: max(0, iteration + 1 - freeze_iterations) - updates.
    - `oreal/skipped_steps`: models, policy and token_rm, whose step in this iteration was refused
      because a number was not finite.

    Args:
        schedule: tells how long the policy is frozen.
        iteration: 0-based.
        trajectories: of this iteration.
        dropped: groups of this iteration.
        updates: steps the policy has taken since the start, this iteration's included.
        refused: steps of this iteration.
    """
    due = max(0, iteration + 1 - schedule.freeze_iterations)
    return {
        "rollout/dropped_groups": float(dropped),
        "oreal/trajectories": float(trajectories),
        "oreal/skipped_iterations": float(due - updates),
        "oreal/skipped_steps": float(refused),
    }


def rank_auc(scores: Tensor, correct: Tensor) -> float:
    """Returns (R - P (P + 1) / 2) / (P N) of P correct and N incorrect scores.

    R sums the ranks of the correct ones among all P + N, from 1, ties at their mid-rank.

    Args:
        scores: `[n]`.
        correct: `[n]` bool, of both kinds.
    """
    _, place, counts = scores.unique(return_inverse=True, return_counts=True)
    mid_ranks = counts.cumsum(0) - (counts - 1) / 2
    positives = int(correct.sum())
    negatives = correct.numel() - positives
    rank_sum = float(mid_ranks.double()[place][correct].sum())
    return (rank_sum - positives * (positives + 1) / 2) / (positives * negatives)


def calibration_error(probabilities: Tensor, correct: Tensor) -> float:
    """Returns the expected calibration error over 10 equal bins; `[n]` and `[n]` bool."""
    bins = (probabilities * CALIBRATION_BINS).long().clamp(max=CALIBRATION_BINS - 1)
    surplus = torch.zeros(CALIBRATION_BINS, dtype=torch.float64, device=bins.device)
    surplus.index_add_(0, bins, probabilities.double() - correct.double())
    return float(surplus.abs().sum()) / correct.numel()


def _flat(values: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(values)).detach().double()
