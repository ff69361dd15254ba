"""What a run comes to, in words: did it learn, where did the time go, what is to be blamed."""

from __future__ import annotations

import math
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_oreal.monitor.transcripts import running_q

if TYPE_CHECKING:
    from collections.abc import Sequence

    from megatron_oreal.monitor.report.read import RunData

_STRETCH = 10  # iterations at each end that are compared
_NOTICEABLE = 0.01  # of a rate: less is called unchanged
_CHANCE_AUC = 0.6  # below it the reward model hardly tells right from wrong
_CONTEXT = 12  # tokens shown around a blamed one
_EVAL_NAMES = (("eval/pass_at_1", "pass@1"), ("eval/greedy", "Greedy accuracy"))


def learned(run: RunData) -> list[str]:
    """Answers whether the run learned: from held-out questions, else from those it sampled."""
    said = []
    if len(run.evaluations) > 1:
        first, last = run.evaluations[0], run.evaluations[-1]
        for name, label in _EVAL_NAMES:
            if name in first and name in last:
                change = _change(first[name], last[name])
                said.append(f"{label} on held-out questions {change}.")
    sampled = _ends(run.train, "rollout/pass_rate")
    if sampled:
        change = _change(*sampled)
        said.append(f"The pass rate of the questions it sampled {change}, last against first.")
    loss = _ends(run.train, "sft/loss")
    if loss:
        said.append(f"The loss of fine-tuning went from {loss[0]:.3g} to {loss[1]:.3g}.")
    if not said:
        said.append("Nothing measured says so: no evaluation, and no pass rate.")
    return said


def verdict(run: RunData) -> str:
    """Returns `Yes`, `No`, `It got worse`, or `Unknown`, by the best measure there is."""
    pairs = [
        (run.evaluations[0].get(name), run.evaluations[-1].get(name))
        for name, _ in _EVAL_NAMES
        if len(run.evaluations) > 1
    ]
    pairs.append(_ends(run.train, "rollout/pass_rate") or (None, None))
    known = [(a, b) for a, b in pairs if a is not None and b is not None]
    if not known:
        return "Unknown"
    before, after = known[0]
    if abs(after - before) < _NOTICEABLE:
        return "No"
    return "Yes" if after > before else "It got worse"


def time_spent(run: RunData) -> list[str]:
    """Answers where the time went: the whole, and the phases that took the most."""
    total = sum(run.phases.values())
    if not total:
        return ["No clock was read."]
    shares = [f"{name} {100 * s / total:.0f}%" for name, s in run.phases.items()][:4]
    said = [f"{duration(total)} on the first rank's clock: {', '.join(shares)}."]
    rates = [line["time/iteration_s"] for line in run.train if "time/iteration_s" in line]
    if rates:
        said.append(f"An iteration took {duration(fmean(rates))} in the mean.")
    left = _time_left(run, rates)
    return said + ([left] if left else [])


def reward_model(run: RunData) -> list[str]:
    """Says how far the token reward model tells correct from incorrect answers."""
    auc = _ends(run.train, "token_rm/auc")
    if not auc:
        return ["There is no token reward model."]
    said = [f"Its AUC went from {auc[0]:.2f} to {auc[1]:.2f}; 0.5 is chance."]
    if auc[1] < _CHANCE_AUC:
        said.append("It hardly tells right from wrong, so whom it blames says little.")
    return said


def blamed_token(scores: np.ndarray, *, score_is_before: bool) -> tuple[int, float, float] | None:
    """Returns (index, q before, q after) of the token with the largest fall of q; None without.

    Where s_t has read the tokens before t, what token t did is q_{t+1} - q_t; where it has read
    token t too, q_t - q_{t-1}.
    """
    if len(scores) < 2 or not np.isfinite(scores).all():  # noqa: PLR2004  a fall takes two
        return None
    _, q = running_q(scores)
    fall = int(np.argmin(np.diff(q)))
    return (fall if score_is_before else fall + 1), float(q[fall]), float(q[fall + 1])


def context(pieces: Sequence[bytes], index: int) -> tuple[str, str, str]:
    """Returns the text before a token, the token's own, and that after it."""
    parts = (pieces[max(0, index - _CONTEXT) : index], pieces[index : index + 1])
    rest = pieces[index + 1 : index + 1 + _CONTEXT // 2]
    before, own, after = (b"".join(p).decode("utf-8", "replace") for p in (*parts, rest))
    return before, own, after


def calibration(pairs: Sequence[tuple[float, bool]], bins: int = 10) -> list[dict[str, float]]:
    """Returns, for each bin of p = sigmoid(mean score) that has any, its means and its count."""
    rows: list[list[tuple[float, bool]]] = [[] for _ in range(bins)]
    for score, correct in pairs:
        p = 1 / (1 + math.exp(-score))
        rows[min(int(p * bins), bins - 1)].append((p, correct))
    return [
        {"p": fmean(p for p, _ in row), "correct": fmean(c for _, c in row), "count": len(row)}
        for row in rows
        if row
    ]


def duration(seconds: float) -> str:
    """Returns seconds as a person says them: `8.2 s`, `5.4 minutes`, `3.1 hours`."""
    for unit, name in ((3600, "hours"), (60, "minutes")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:.1f} {name}"
    return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"  # noqa: PLR2004


def _time_left(run: RunData, rates: list[float]) -> str | None:
    if run.finished or not rates or run.iterations_planned is None:
        return None
    done = run.train[-1]["iteration"] + 1
    left = (run.iterations_planned - done) * fmean(rates[-_STRETCH:])
    return f"{done} of {run.iterations_planned} iterations are done; {duration(left)} are left."


def _change(before: float, after: float) -> str:
    points = 100 * (after - before)
    rose = "rose" if points > 0 else "fell"
    if abs(after - before) < _NOTICEABLE:
        rose = "stayed"
    return f"{rose} from {100 * before:.1f} to {100 * after:.1f} percent ({points:+.1f})"


def _ends(lines: list[dict[str, Any]], name: str) -> tuple[float, float] | None:
    """Returns the means over the first and the last iterations; None of too few."""
    values = [line[name] for line in lines if isinstance(line.get(name), float | int)]
    if len(values) < 2:  # noqa: PLR2004  two ends
        return None
    n = min(_STRETCH, len(values) // 2)
    return fmean(values[:n]), fmean(values[-n:])
