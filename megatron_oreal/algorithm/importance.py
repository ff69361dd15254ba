"""Importance weights: what a token that the engine sampled counts for in the policy's loss.

Engine and policy hold the same weights and still give a token different probabilities: other
kernels, other precisions. Of one response, with e_t = policy logp_t - engine logp_t, the policy's
own before the step, the ratio r is

    token       exp(e_t)          each token by itself: biased, for the tokens before it are the
                                  engine's, but of bounded variance
    sequence    exp(sum of e_t)   the whole response, the same for each of its tokens: unbiased,
                                  with a variance that grows with its length

and the weight is min(r, cap), or with `above_cap: mask` r up to the cap and 0 beyond it. No
gradient goes through it: with one update on each batch the ratio of old to new policy is 1.

`token`, truncated, is TIS of Yao et al. 2025 ("Your Efficient RL Framework Secretly Brings You
Off-Policy RL Training"); `sequence`, and masks in place of truncation, are of Liu et al. 2025
("When Speed Kills Stability: Demystifying RL Collapse from the Training-Inference Mismatch"). A
sequence's ratio is the product there as well. The geometric mean of a response's ratios, which is
used elsewhere to reject whole responses, is no importance weight: it corrects no expectation, and
is not offered.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from megatron_oreal.config.schema_importance import ImportanceConfig


def log_ratios(
    policy_logprobs: Sequence[Tensor], rollout_logprobs: Sequence[Tensor]
) -> list[Tensor]:
    """Returns e = policy logp - engine logp, float64 and detached.

    Args:
        policy_logprobs: `[response_length]` a trajectory.
        rollout_logprobs: likewise, aligned to the same tokens.

    Raises:
        RuntimeError: They are not of the same tokens.
    """
    pairs = zip(policy_logprobs, rollout_logprobs, strict=True)
    return [policy.detach().double() - rollout.double() for policy, rollout in pairs]


def importance_weights(cfg: ImportanceConfig, ratios: Sequence[Tensor]) -> list[Tensor]:
    """Returns the weight of each token, fp32, `[response_length]` a trajectory.

    Args:
        cfg: level, cap and what becomes of a ratio above it.
        ratios: their logarithms, `log_ratios`.
    """
    weights = [raw.exp().float() for raw in _of_level(cfg, ratios)]
    if cfg.above_cap == "mask":
        return [weight.masked_fill(weight > cfg.cap, 0.0) for weight in weights]
    return [weight.clamp(max=cfg.cap) for weight in weights]


def importance_metrics(cfg: ImportanceConfig, ratios: Sequence[Tensor]) -> dict[str, float]:
    """Describes the weights that were applied, over response tokens; nothing while they are off.

    - `oreal/importance_mean`: mean weight, after the cap.
    - `oreal/importance_above_cap_share`: share of tokens whose ratio is above the cap.
    """
    if cfg.level == "none" or not ratios:
        return {}
    raw = torch.cat(_of_level(cfg, ratios)).exp()
    return {
        "oreal/importance_mean": float(torch.cat(importance_weights(cfg, ratios)).double().mean()),
        "oreal/importance_above_cap_share": float((raw > cfg.cap).double().mean()),
    }


def effective_share(log_weights: Tensor) -> float:
    """Returns (sum of w)^2 / (n sum of w^2) of n weights given by their logarithms, `[n]`.

    The effective sample size as a share of n: 1 where all weights are equal, 1 / n where one
    outweighs all others. A common factor of the weights changes nothing.
    """
    weights = (log_weights - log_weights.max()).exp()
    return float(weights.sum().square() / (weights.numel() * weights.square().sum()))


def _of_level(cfg: ImportanceConfig, ratios: Sequence[Tensor]) -> list[Tensor]:
    if cfg.level == "sequence":
        return [ratio.sum().expand_as(ratio) for ratio in ratios]
    return list(ratios)
