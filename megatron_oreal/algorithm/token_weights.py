"""Token weights from the token_rm's scores: which tokens of a response matter.

A score s_t is the scalar head's output for response token t; the running mean m_t = mean(s_1..s_t)
is the belief, after t scores, in a correct answer, and q_t = sigmoid(m_t) its probability.
Positive trajectories weigh by v = q, negative ones by v = 1 - q.

`token_score: before` reads s_t at the position that predicts token t: it has seen the tokens
before t, so what token t did shows in q_{t+1} - q_t. `token_score: at` reads it at token t itself.
The formulas are the same; the scores arrive here aligned to the response, one a token, in either
case.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from megatron_oreal.config.schema import TokenWeightsConfig


def token_weights(
    scores: Sequence[Tensor], rewards: Sequence[float], cfg: TokenWeightsConfig
) -> list[Tensor]:
    """Turns the scores of each trajectory into its weights, both `[n]`, one a response token.

    Weights are detached, 0 to 1, in the dtype of the scores.

    - `threshold`: clamp((v - c) / (1 - c), 0, 1); c = 0.5 gives max(2q - 1, 0), max(1 - 2q, 0).
    - `topk`: of the k = max(1, int(n * ratio)) largest v, (v - v_min) / (v_max - v_min), or ones
      if all are equal; others 0. Of equal values the earlier token is the larger one.
    - `none`: ones; a run without a token_rm calls `uniform_weights` instead.

    Args:
        scores: one tensor `[n]` a trajectory: the whole response, whatever part of it a rank
            computed.
        rewards: one a trajectory; its sign chooses q or 1 - q, and c_pos or c_neg, ratio_pos or
            ratio_neg.
        cfg: kind and its numbers.
    """
    return [
        _weights(trajectory_scores.detach(), reward, cfg)
        for trajectory_scores, reward in zip(scores, rewards, strict=True)
    ]


def uniform_weights(response_lengths: Sequence[int]) -> list[Tensor]:
    """Returns the weights of a run without a token_rm: ones `[n]`, fp32, one a trajectory."""
    return [torch.ones(length) for length in response_lengths]


def running_means(scores: Tensor) -> Tensor:
    """Returns m_t = mean(s_1..s_t), `[n]`, in float64: a long single-precision sum drifts."""
    counts = torch.arange(1, scores.numel() + 1, dtype=torch.float64, device=scores.device)
    return scores.double().cumsum(0) / counts


def threshold_weights(values: Tensor, threshold: float) -> Tensor:
    """Returns clamp((v - c) / (1 - c), 0, 1) of probabilities `[n]`, for 0 <= c < 1."""
    return ((values - threshold) / (1 - threshold)).clamp(0, 1)


def topk_weights(values: Tensor, ratio: float) -> Tensor:
    """Returns the k largest of `[n]` probabilities rescaled to 0..1, the least of them to 0.

    The others get 0; k = max(1, int(n * ratio)). All ones where the k are equal.
    """
    k = max(1, int(values.numel() * ratio))
    largest, order = values.sort(descending=True, stable=True)
    largest, order = largest[:k], order[:k]
    span = largest[0] - largest[-1]
    rescaled = (largest - largest[-1]) / span if span > 0 else torch.ones_like(largest)
    return torch.zeros_like(values).index_copy(0, order, rescaled)


def _weights(scores: Tensor, reward: float, cfg: TokenWeightsConfig) -> Tensor:
    if cfg.kind == "none":
        return torch.ones_like(scores)
    positive = reward > 0
    means = running_means(scores)
    values = torch.sigmoid(means if positive else -means)  # sigmoid(-m) = 1 - q, uncancelled
    if cfg.kind == "threshold":
        weights = threshold_weights(values, cfg.c_pos if positive else cfg.c_neg)
    else:
        weights = topk_weights(values, cfg.ratio_pos if positive else cfg.ratio_neg)
    return weights.to(scores.dtype)
