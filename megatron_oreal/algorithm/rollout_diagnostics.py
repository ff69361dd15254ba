"""What the sampled groups look like, and how far the engine's policy is from the trainer's.

The same rules as in `diagnostics`: pure, over the whole iteration, flat names, a quantity of
nothing left out.
"""

from __future__ import annotations

from collections import Counter
from statistics import fmean
from typing import TYPE_CHECKING

import torch

from megatron_oreal.algorithm.importance import effective_share, log_ratios
from megatron_oreal.algorithm.kl import k3
from megatron_oreal.types import Outcome

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from megatron_oreal.types import RolloutGroup, Verdict

TAIL = 0.99  # of the largest quantile of the mismatch but its maximum


def group_metrics(groups: Sequence[RolloutGroup]) -> dict[str, float]:
    """Describes judged groups; call it before groups with many unverified answers are dropped.

    Over questions:

    - `rollout/pass_rate`: mean, over questions with a verified answer, of correct / verified.
    - `rollout/nontrivial_share`, `rollout/all_correct_share`, `rollout/all_incorrect_share`,
      `rollout/undecided_share`: each question is of one kind; undecided = fewer than two verified
      answers. They sum to 1. (A question with more unverified answers than allowed is dropped
      later, whatever its kind.)
    - `rollout/pass_rate_0_20_share` ... `_80_100_share`: of the questions with a verified answer,
      by pass rate in five equal bins, the upper end in the last alone. They sum to 1.

    Over answers:

    - `rollout/unverified_share`: answers nobody could decide.
    - `rollout/truncated_share`: answers cut by the length limit, without the stop token.
    - `rollout/response_length_mean`, `_max`, and `rollout/response_length_correct`, `_incorrect`,
      `_unverified`: tokens, mean over the answers of that outcome.
    """
    if not groups:
        return {}
    answers = [pair for g in groups for pair in zip(g.rollouts, g.verdicts, strict=True)]
    lengths = [len(rollout.tokens) for rollout, _ in answers]
    metrics = {
        **_question_metrics(groups),
        "rollout/unverified_share": fmean(v.outcome is Outcome.UNVERIFIED for _, v in answers),
        "rollout/truncated_share": fmean(not rollout.stopped for rollout, _ in answers),
        "rollout/response_length_mean": fmean(lengths),
        "rollout/response_length_max": float(max(lengths)),
    }
    for outcome in Outcome:
        of_outcome = [len(r.tokens) for r, verdict in answers if verdict.outcome is outcome]
        if of_outcome:
            metrics[f"rollout/response_length_{outcome.value}"] = fmean(of_outcome)
    return metrics


def mismatch_metrics(
    policy_logprobs: Sequence[Tensor], rollout_logprobs: Sequence[Tensor]
) -> dict[str, float]:
    """Compares the trainer's log-probabilities with the engine's of the same tokens.

    Both are of the same weights. With e = policy logp - rollout logp over all response tokens:

    - `rollout/mismatch_mean`, `rollout/mismatch_max`: mean and max of |e|.
    - `rollout/mismatch_p99`: the |e| of rank floor(0.99 (t - 1)), no interpolation.
    - `rollout/mismatch_k3`: mean of exp(e) - e - 1, which estimates KL(engine || trainer), the
      tokens being the engine's.
    - `rollout/ess_token`, `rollout/ess_sequence`: (sum v)^2 / (n sum v^2) of the importance ratios
      v before any cap: exp(e) of each token; exp(sum of e) of each trajectory. Whether weights are
      applied or not.

    Args:
        policy_logprobs: `[response_length]` a trajectory.
        rollout_logprobs: likewise, aligned to the same tokens.
    """
    if not policy_logprobs:
        return {}
    policy = torch.cat(list(policy_logprobs)).detach().double()
    rollout = torch.cat(list(rollout_logprobs)).detach().double()
    ratios = log_ratios(policy_logprobs, rollout_logprobs)
    difference = torch.cat(ratios).abs().sort().values
    return {
        "rollout/mismatch_mean": float(difference.mean()),
        "rollout/mismatch_p99": float(difference[int(TAIL * (difference.numel() - 1))]),
        "rollout/mismatch_max": float(difference[-1]),
        "rollout/mismatch_k3": float(k3(rollout, policy).mean()),
        "rollout/ess_token": effective_share(torch.cat(ratios)),
        "rollout/ess_sequence": effective_share(torch.stack([r.sum() for r in ratios])),
    }


def _question_metrics(groups: Sequence[RolloutGroup]) -> dict[str, float]:
    kinds = Counter(_kind(group.verdicts) for group in groups)
    metrics = {
        f"rollout/{kind}_share": kinds[kind] / len(groups)
        for kind in ("nontrivial", "all_correct", "all_incorrect", "undecided")
    }
    counts = [_count(group.verdicts) for group in groups]
    pass_rates = [correct / (correct + wrong) for correct, wrong in counts if correct + wrong]
    if pass_rates:
        metrics["rollout/pass_rate"] = fmean(pass_rates)
        bins = Counter(min(int(5 * rate), 4) for rate in pass_rates)
        for i in range(5):
            name = f"rollout/pass_rate_{20 * i}_{20 * i + 20}_share"
            metrics[name] = bins[i] / len(pass_rates)
    return metrics


def _kind(verdicts: Sequence[Verdict]) -> str:
    correct, wrong = _count(verdicts)
    if correct + wrong < 2:  # noqa: PLR2004  one answer has no other to be compared with
        return "undecided"
    if correct and wrong:
        return "nontrivial"
    return "all_correct" if correct else "all_incorrect"


def _count(verdicts: Sequence[Verdict]) -> tuple[int, int]:
    outcomes = Counter(verdict.outcome for verdict in verdicts)
    return outcomes[Outcome.CORRECT], outcomes[Outcome.INCORRECT]
