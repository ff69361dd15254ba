"""The losses: functions of one token's log-probability or one sequence's mean score (Eq. 11, 12).

The engine adds up what an objective returns over all tokens, micro-batches and ranks, with no
factor of its own: an objective is already divided by the global denominators. N+ and N- are the
response tokens of all positive and all negative trajectories of the update, over all ranks. Per
token t of a response with reward r and advantage A, weight w:

    positive, r > 0:   -logp w v [A] / N+                             x positive_factor
    negative, r < 0:   -exp(logp - stopgrad(logp)) A w v / N-         x negative_factor
    kl, either:        k(logp, reference logp) / (N+ + N-)            x kl_coefficient

v is the importance weight of `algorithm/importance.py`, 1 while `importance.level` is none.

The sign of the reward alone decides the term, also under `selection: all`, where a trivial
question brings trajectories of zero advantage (unless `shaping: none`): they count in N+, N- and
the KL term, and are cloned only without `positive_times_advantage`. A token with reward 0 is
padding and has no loss. A side without a token has no loss either.

Departures from the paper:

1. Rewards are +1 and -1, not 1 and 0: advantages are twice the paper's. The reference does so, and
   its coefficients are tuned to it.
2. `positive_times_advantage` (on) multiplies behaviour cloning by A, so that a rare correct answer
   weighs more than an expected one. The paper clones without it; the reference's recipes have it
   on. Off reproduces Eq. 11.
3. Expectations over trajectories are means over tokens of each side: a long answer weighs more
   than a short one. The reference's `per_token` loss, kept because its factors are tuned to it.
4. The KL term is a per-token estimator on sampled tokens (k3 by default), of positives and
   negatives alike, not the exact divergence; top-p < 1 biases it, as it does every term, since the
   tokens come from another distribution.
5. Questions with 0 < p < 1 are kept; the paper's line 8 says "filter out".
6. With `importance.level` (off) both sides of Eq. 11 are weighed by policy over engine probability:
   the paper takes engine and policy for the same. N+ and N- count tokens, not weights. Left alone
   are the KL term, which is to hold every sampled token near the reference, and Eq. 12, which
   learns to tell apart the answers that were sampled.

Departures from the reference, the authors' training code. Its numbers are reproduced wherever none
of these applies, and `configs/reference.yaml` takes back 7 and 8:

7. A judge that fails or runs out of time makes an answer unverified, not wrong: it leaves the
   statistics of its group, since a server that is down says nothing of an answer
   (`verifier.unverified_is_incorrect` brings the old rule back).
8. Only `</think>` ends a response's thinking. The reference also judges what follows the words
   `<conclude>` and `**Final Answer**`, which its own fine-tuned models write
   (`verifier.thinking_end_markers`).
9. A pair is drawn by (seed, iteration, question), alike on all ranks, not by the global generator
   of each rank: the same run on other ranks trains on the same trajectories.
10. No trajectory is dropped to make the batch divide by the ranks while N+ and N- still count it: N
   counts what is trained on.
11. KL `k1` is logp - reference logp. The reference's `kl` has the opposite sign and rewards leaving
    the reference.
12. top-k weights keep at least one token; the reference fails on a response with int(n ratio) = 0.
13. The entropy reported is that of the policy's distribution; the reference reports the mean of
    -logp.
14. Text of a model is never evaluated, and every answer has a deadline; the reference hands it to
    a parser that calls `eval`, in the trainer's process and for as long as it takes.
15. A judge is asked for the word that its reply is searched for; the reference asks for CORRECT or
    INCORRECT and looks for A or B.
16. A run resumes; the reference's starts anew.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from megatron_oreal.algorithm.kl import ESTIMATORS

if TYPE_CHECKING:
    from megatron_oreal.config.schema import OrealConfig
    from megatron_oreal.types import Trajectory

Fields = Mapping[str, Tensor]
TokenObjective = Callable[[Tensor, Fields], Tensor]
SequenceObjective = Callable[[Tensor, Tensor], Tensor]


def count_tokens(trajectories: Sequence[Trajectory]) -> tuple[int, int]:
    """Returns (N+, N-): response tokens of the positive and of the negative trajectories."""
    positive = sum(item.response_length for item in trajectories if item.reward > 0)
    negative = sum(item.response_length for item in trajectories if item.reward < 0)
    return positive, negative


def policy_fields(
    trajectories: Sequence[Trajectory],
    token_weights: list[Tensor],
    reference_logprobs: list[Tensor],
) -> dict[str, list[Tensor]]:
    """Lays out what the policy's objective reads: `[response_length]` a trajectory and field."""
    return {
        "reward": [_repeat(item.reward, item.response_length) for item in trajectories],
        "advantage": [_repeat(item.advantage, item.response_length) for item in trajectories],
        "token_weight": token_weights,
        "reference_logprobs": reference_logprobs,
    }


def policy_objective(
    cfg: OrealConfig, positive_tokens: int, negative_tokens: int
) -> TokenObjective:
    """Makes the policy's loss of Eq. 11 for an update with N+ and N- response tokens in all.

    Returns:
        `(logp [t], fields) -> loss [t]`, elementwise; `fields` are `reward`, `advantage`,
        `token_weight` and `reference_logprobs`, with importance weights also
        `importance_weight`, each `[t]` at the response token it scores.
    """

    def objective(logprobs: Tensor, fields: Fields) -> Tensor:
        terms = policy_loss_terms(cfg, positive_tokens, negative_tokens, logprobs, fields)
        return terms["positive"] + terms["negative"] + terms["kl"]

    return objective


def policy_loss_terms(
    cfg: OrealConfig,
    positive_tokens: int,
    negative_tokens: int,
    logprobs: Tensor,
    fields: Fields,
) -> dict[str, Tensor]:
    """Returns the parts of Eq. 11, `positive`, `negative` and `kl`, each `[t]`.

    Factors and denominators are included: the policy's loss is their sum.
    """
    reward, advantage, weight = fields["reward"], fields["advantage"], fields["token_weight"]
    if cfg.importance.level != "none":
        weight = weight * fields["importance_weight"]
    zero = torch.zeros_like(logprobs)
    cloning = -logprobs * weight * (advantage if cfg.positive_times_advantage else 1.0)
    ratio = torch.exp(logprobs - logprobs.detach())  # 1, with the gradient of logp
    divergence = ESTIMATORS[cfg.kl](logprobs, fields["reference_logprobs"])
    return {
        "positive": torch.where(reward > 0, cloning, zero)
        * (cfg.positive_factor / max(1, positive_tokens)),
        "negative": torch.where(reward < 0, -ratio * advantage * weight, zero)
        * (cfg.negative_factor / max(1, negative_tokens)),
        "kl": torch.where(reward != 0, divergence, zero)
        * (cfg.kl_coefficient / max(1, positive_tokens + negative_tokens)),
    }


def token_rm_objective(sequences: int) -> SequenceObjective:
    """Makes the token_rm's loss of Eq. 12 for an update of so many trajectories over all ranks.

    Returns:
        `(mean_scores [n], rewards [n]) -> loss [n]`: binary cross-entropy of the mean score of a
        response, as a logit, against 1 for a positive reward and 0 for a negative one, divided by
        `sequences`.
    """

    def objective(mean_scores: Tensor, rewards: Tensor) -> Tensor:
        labels = (rewards > 0).to(mean_scores.dtype)
        losses = functional.binary_cross_entropy_with_logits(mean_scores, labels, reduction="none")
        return losses / max(1, sequences)

    return objective


def sft_objective(response_tokens: int) -> TokenObjective:
    """Makes the loss of fine-tuning: -logp over all response tokens of all ranks, no field."""

    def objective(logprobs: Tensor, fields: Fields) -> Tensor:
        del fields
        return -logprobs / max(1, response_tokens)

    return objective


def _repeat(value: float, length: int) -> Tensor:
    return torch.full((length,), value, dtype=torch.float32)
