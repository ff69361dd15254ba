"""OREAL once more, from the paper: one function over whole padded tensors in float64.

It shares no line with `megatron_oreal.algorithm`: rows of a table instead of lists of responses,
probabilities instead of log-probabilities, pairs counted instead of ranks summed. Names of the
result are those of a run's metrics. Equation numbers are those of arXiv:2502.06781.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_oreal.config.schema import OrealConfig, VerifierConfig


@dataclass(frozen=True)
class Answers:
    """Every answer of an iteration, `[b]` of them, question by question; token tables are `[b, t]`.

    `outcome` is "+", "-" or "?", `question` counts from 0. `response` marks the tokens of the
    answers in the table of questions and answers `tokens`, padded at the end with whatever.
    """

    question: Tensor
    outcome: list[str]
    stopped: Tensor
    tokens: Tensor
    response: Tensor
    rollout_logprobs: Tensor


@dataclass(frozen=True)
class Result:
    """Both losses with their graphs, and every metric.

    `size` is the sum of the absolute terms of the policy's loss were every token weight 1: rounding
    of a token weight is relative to 1, not to the weight. Where a response is weighed by the
    product of its ratios, the rounding of each of them counts.
    """

    policy_loss: Tensor
    token_rm_loss: Tensor
    size: float
    metrics: dict[str, float]


def plain_oreal(
    cfg: OrealConfig,
    verifier: VerifierConfig,
    answers: Answers,
    *,
    pairs: Tensor,
    logits: Tensor,
    reference_logits: Tensor,
    scores: Tensor,
) -> Result:
    """Computes one iteration of Algorithm 1.

    Args:
        cfg: the switches.
        verifier: what becomes of unverified answers.
        answers: of all questions.
        pairs: `[b]` bool, one correct and one incorrect answer of each non-trivial question, for
            `selection: pairs`: which ones is a matter of luck, not of mathematics.
        logits: of the policy, `[b, t, v]`; position t - 1 predicts token t.
        reference_logits: likewise.
        scores: of the token reward model, `[b, t]`: at t of what has been read up to t included.
    """
    reward, advantage, kept, metrics = _judge(cfg, verifier, answers)
    chosen = _choose(cfg, answers, reward, kept, pairs)
    plus, minus = chosen & (reward > 0), chosen & (reward < 0)
    mask = answers.response & chosen[:, None]
    total_plus, total_minus = (int((answers.response & s[:, None]).sum()) for s in (plus, minus))

    policy, reference = logits.softmax(2), reference_logits.softmax(2)
    pi, ref = _of_tokens(policy, answers.tokens), _of_tokens(reference, answers.tokens)
    score = _shift(scores) if cfg.token_score == "before" else scores
    weight = _weights(cfg, score.detach(), mask, plus)

    scale = advantage[:, None] if cfg.positive_times_advantage else torch.ones_like(pi)
    cloning = torch.where(mask & plus[:, None], -pi.log() * scale, 0.0)
    ratio = pi / pi.detach()
    pushing = torch.where(mask & minus[:, None], -ratio * advantage[:, None], 0.0)
    odds = ref / pi
    estimators = {"k1": -odds.log(), "k2": odds.log() ** 2 / 2, "k3": odds - 1 - odds.log()}
    terms = {
        "positive": cfg.positive_factor * cloning / max(total_plus, 1),
        "negative": cfg.negative_factor * pushing / max(total_minus, 1),
        "kl": cfg.kl_coefficient * estimators[cfg.kl] * mask / (total_plus + total_minus),
    }
    odds_of_engine = torch.where(mask, pi.detach() / answers.rollout_logprobs.exp(), 1.0)
    importance = _importance(cfg, odds_of_engine)
    terms["positive"], terms["negative"] = (terms[s] * importance for s in ("positive", "negative"))
    unweighed = torch.ones_like(weight)
    by_term = {"positive": weight, "negative": weight, "kl": unweighed}
    sums = {name: (term * by_term[name]).sum() for name, term in terms.items()}
    entropy = -(_shift(policy * policy.clamp_min(1e-300).log())).sum(2)
    metrics |= {f"oreal/{name}_loss": term.item() for name, term in sums.items()} | {
        "oreal/loss": sum(term.item() for term in sums.values()),
        "oreal/kl_k1": estimators["k1"][mask].mean().item(),
        "oreal/kl_k3": estimators["k3"][mask].mean().item(),
        "oreal/reference_difference_max": odds[mask].log().abs().max().item(),
        "oreal/logprob": pi[mask].log().mean().item(),
        "oreal/entropy": entropy[mask].mean().item(),
        "oreal/positive_tokens": float(total_plus),
        "oreal/negative_tokens": float(total_minus),
        "oreal/trajectories": float(chosen.sum()),
        "oreal/skipped_iterations": 0.0,
        "oreal/skipped_steps": 0.0,
    }
    metrics |= _weight_metrics(weight, mask, plus, minus)
    metrics |= _mismatch_metrics(cfg, odds_of_engine, importance, mask)
    mean_score = (score * mask).sum(1) / mask.sum(1).clamp_min(1)
    token_rm_loss = _bce(mean_score[chosen], reward[chosen])
    if cfg.token_weights.kind != "none":
        metrics |= _token_rm_metrics(mean_score[chosen].detach(), reward[chosen] > 0)
    roundings = mask.sum(1, keepdim=True) if cfg.importance.level == "sequence" else 1
    size = sum((term.abs() * roundings).sum().item() for term in terms.values())
    return Result(torch.stack(list(sums.values())).sum(), token_rm_loss, size, metrics)


def _shift(values: Tensor) -> Tensor:
    """Puts at t what stands at t - 1; what comes in at 0 belongs to no response."""
    return torch.roll(values, 1, dims=1)


def _of_tokens(probabilities: Tensor, tokens: Tensor) -> Tensor:
    return _shift(probabilities).gather(2, tokens[:, :, None])[:, :, 0]


def _judge(
    cfg: OrealConfig, verifier: VerifierConfig, answers: Answers
) -> tuple[Tensor, Tensor, Tensor, dict[str, float]]:
    """Rewards `[b]` (0: none), advantages `[b]`, which answers have one `[b]`, metrics."""
    lost = -1.0 if verifier.unverified_is_incorrect else 0.0
    reward = torch.tensor([{"+": 1.0, "-": -1.0, "?": lost}[o] for o in answers.outcome]).double()
    unknown = torch.tensor([o == "?" for o in answers.outcome])
    advantage, kept = torch.zeros_like(reward), torch.zeros_like(unknown)
    dropped = 0
    for q in range(int(answers.question.max()) + 1):
        own = answers.question == q
        if not verifier.unverified_is_incorrect:
            if unknown[own].double().mean() > verifier.max_unverified_share:
                dropped += 1
                continue
            own &= ~unknown
        kept |= own
        advantage[own] = _advantages(cfg.shaping, reward[own])
    alarm = unknown.double().mean() > verifier.unverified_alarm_share
    metrics = _rollout_metrics(answers) | {
        "rollout/dropped_groups": float(dropped),
        "rollout/unverified_alarm": float(alarm),
    }
    return reward, advantage, kept, metrics


def _advantages(shaping: str, reward: Tensor) -> Tensor:
    n = len(reward)
    if shaping == "none":
        return reward
    if n < 2:
        return torch.zeros_like(reward)
    centred = reward - reward.sum() / n
    if shaping == "rloo":
        return centred * n / (n - 1)  # r - (sum - r) / (n - 1)
    return centred / ((centred @ centred / (n - 1)).sqrt() + 1e-8)


def _choose(
    cfg: OrealConfig, answers: Answers, reward: Tensor, kept: Tensor, pairs: Tensor
) -> Tensor:
    mixed = torch.zeros_like(kept)
    for q in range(int(answers.question.max()) + 1):
        own = kept & (answers.question == q)
        if (reward[own] > 0).any() and (reward[own] < 0).any():
            mixed |= own
    if cfg.selection == "pairs":
        for q in range(int(answers.question.max()) + 1):
            own = pairs & (answers.question == q)
            assert sorted(reward[own].tolist()) == ([-1, 1] if mixed[own].any() else [])
        assert pairs.sum() == 2 * len(set(answers.question[mixed].tolist()))
        assert not (pairs & ~mixed).any()
        return pairs
    return mixed if cfg.selection == "all_nontrivial" else kept


def _weights(cfg: OrealConfig, score: Tensor, mask: Tensor, plus: Tensor) -> Tensor:
    """Section 3.3: w+ from q, w- from 1 - q, q the sigmoid of the mean score so far."""
    table = torch.ones_like(score)
    chosen = cfg.token_weights
    for row in mask.any(1).nonzero()[:, 0].tolist():
        where, positive = mask[row].nonzero()[:, 0], bool(plus[row])
        own = score[row, where]
        so_far = torch.stack([own[: i + 1].mean() for i in range(len(own))])
        q = 1 / (1 + torch.exp(-so_far))
        v = q if positive else 1 - q
        if chosen.kind == "threshold":
            c = chosen.c_pos if positive else chosen.c_neg
            table[row, where] = torch.clip((v - c) / (1 - c), 0.0, 1.0)
        elif chosen.kind == "topk":
            ratio = chosen.ratio_pos if positive else chosen.ratio_neg
            table[row, where] = _largest(v, max(1, int(len(v) * ratio)))
    return table


def _importance(cfg: OrealConfig, odds: Tensor) -> Tensor:
    """Weight of each place, `[b, t]`, from policy over engine probability, 1 where none is."""
    if cfg.importance.level == "none":
        return torch.ones_like(odds)
    if cfg.importance.level == "sequence":
        odds = odds.prod(1, keepdim=True).expand_as(odds)
    allowed = odds <= cfg.importance.cap
    beyond = {"truncate": cfg.importance.cap, "mask": 0.0}[cfg.importance.above_cap]
    return torch.where(allowed, odds, beyond)


def _mismatch_metrics(
    cfg: OrealConfig, odds: Tensor, importance: Tensor, mask: Tensor
) -> dict[str, float]:
    own, rows = odds[mask], odds[mask.any(1)].prod(1)
    off = sorted(own.log().abs().tolist())
    metrics = {
        "rollout/mismatch_mean": sum(off) / len(off),
        "rollout/mismatch_p99": off[(len(off) - 1) * 99 // 100],
        "rollout/mismatch_max": off[-1],
        "rollout/mismatch_k3": (own - 1 - own.log()).mean().item(),
    }
    for name, v in (("token", own), ("sequence", rows)):
        metrics[f"rollout/ess_{name}"] = (v.mean() ** 2 / (v**2).mean()).item()
    if cfg.importance.level != "none":
        whole = odds.prod(1, keepdim=True).expand_as(odds)[mask]
        ratio = whole if cfg.importance.level == "sequence" else own
        metrics["oreal/importance_mean"] = importance[mask].mean().item()
        metrics["oreal/importance_above_cap_share"] = (
            (ratio > cfg.importance.cap).double().mean().item()
        )
    return metrics


def _largest(v: Tensor, k: int) -> Tensor:
    values = v.tolist()
    best = sorted(range(len(values)), key=lambda i: -values[i])[:k]
    low, high = values[best[-1]], values[best[0]]
    rescaled = [0.0] * len(values)
    for i in best:
        rescaled[i] = (values[i] - low) / (high - low) if high > low else 1.0
    return torch.tensor(rescaled, dtype=torch.float64)


def _bce(logit: Tensor, reward: Tensor) -> Tensor:
    """Eq. 12."""
    p = 1 / (1 + torch.exp(-logit))
    y = (reward > 0).double()
    return -(y * p.log() + (1 - y) * (1 - p).log()).mean()


def _rollout_metrics(answers: Answers) -> dict[str, float]:
    length = answers.response.sum(1).double()
    kinds = dict.fromkeys(("nontrivial", "all_correct", "all_incorrect", "undecided"), 0)
    rates = []
    questions = int(answers.question.max()) + 1
    for q in range(questions):
        own = [o for o, i in zip(answers.outcome, answers.question.tolist(), strict=True) if i == q]
        good, bad = own.count("+"), own.count("-")
        if good + bad < 2:
            kind = "undecided"
        else:
            kind = "nontrivial" if good and bad else "all_correct" if good else "all_incorrect"
        kinds[kind] += 1
        rates += [good / (good + bad)] if good + bad else []
    metrics = {f"rollout/{kind}_share": count / questions for kind, count in kinds.items()} | {
        "rollout/pass_rate": sum(rates) / len(rates),
        "rollout/unverified_share": answers.outcome.count("?") / len(answers.outcome),
        "rollout/truncated_share": float((~answers.stopped).double().mean()),
        "rollout/response_length_mean": float(length.mean()),
        "rollout/response_length_max": float(length.max()),
    }
    for low in (0, 20, 40, 60, 80):
        own = [low <= 100 * rate < low + 20 or (low == 80 and rate == 1) for rate in rates]
        metrics[f"rollout/pass_rate_{low}_{low + 20}_share"] = sum(own) / len(own)
    for name, letter in (("correct", "+"), ("incorrect", "-"), ("unverified", "?")):
        own = length[torch.tensor([o == letter for o in answers.outcome])]
        if len(own):
            metrics[f"rollout/response_length_{name}"] = float(own.mean())
    return metrics


def _weight_metrics(weight: Tensor, mask: Tensor, plus: Tensor, minus: Tensor) -> dict[str, float]:
    metrics = {}
    for name, side in (("positive", plus), ("negative", minus)):
        own = sorted(weight[mask & side[:, None]].tolist())
        if not own:
            continue
        metrics[f"token_weight/{name}_mean"] = sum(own) / len(own)
        metrics[f"token_weight/{name}_zero_share"] = own.count(0.0) / len(own)
        for percent in (10, 50, 90):
            metrics[f"token_weight/{name}_p{percent}"] = own[(len(own) - 1) * percent // 100]
    return metrics


def _token_rm_metrics(logit: Tensor, correct: Tensor) -> dict[str, float]:
    good, bad = logit[correct].tolist(), logit[~correct].tolist()
    metrics = {
        "token_rm/loss": float(_bce(logit, correct.double() - 0.5)),
        "token_rm/accuracy": (sum(x > 0 for x in good) + sum(x <= 0 for x in bad)) / len(logit),
    }
    if good and bad:
        won = sum((x > y) + (x == y) / 2 for x in good for y in bad)
        metrics["token_rm/auc"] = won / (len(good) * len(bad))
    for name, side in (("positive", good), ("negative", bad)):
        if side:
            metrics[f"token_rm/score_{name}"] = sum(side) / len(side)
    error = 0.0
    p = 1 / (1 + torch.exp(-logit))
    for low in range(10):
        inside = (p >= low / 10) & (p < (low + 1) / 10 if low < 9 else p <= 1)
        if inside.any():
            gap = p[inside].mean() - correct[inside].double().mean()
            error += float(inside.double().mean() * gap.abs())
    metrics["token_rm/calibration_error"] = error
    assert math.isfinite(error)
    return metrics
