"""What a measured run says of the planner's assumptions; docs/planner.md has the arithmetic.

A phase is an assumption's part, divided by the assumption, and a rest: planned twice, both are
known, and with the measured seconds the assumption is.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import NormalDist, fmean, median
from typing import TYPE_CHECKING, Any

from megatron_oreal.config.errors import UserError
from megatron_oreal.monitor.metrics import read_metrics
from megatron_oreal.planner.duration import (
    Assumptions,
    Duration,
    assumptions_for,
    plan_duration,
)
from megatron_oreal.planner.hardware import Cluster, Gpu, Modules
from megatron_oreal.planner.memory import plan_memory

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from megatron_oreal.config.schema import Config
    from megatron_oreal.planner.sizes import Dims

# The assumption that each phase's seconds are inversely proportional to, but for a rest that only
# those before it decide.
SHARES = {"generate": "decode_share", "sync": "network_share", "policy": "train_share"}

_LEAST_SIGMA = 0.01  # where all responses are of one length


@dataclass(frozen=True)
class MeasuredRun:
    """What a run's folder says: its ranks, one record an iteration, seconds by phase of all."""

    config: Config
    ranks: int
    iterations: Sequence[dict[str, Any]]
    seconds: dict[str, float]


@dataclass(frozen=True)
class Calibration:
    """Assumptions as a run has them, and the names of those that it says something of."""

    given: Assumptions
    measured: tuple[str, ...]


def read_run(folder: Path, config: Config) -> MeasuredRun:
    """Reads `summary.json` and `metrics.jsonl` of a run that has ended.

    Raises:
        UserError: One of them is not there, or holds no iteration.
    """
    try:
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        ranks, seconds = int(summary["ranks"]), dict(summary["seconds"])
        lines = read_metrics(folder / "metrics.jsonl")
    except (OSError, ValueError, KeyError, TypeError) as error:
        fix = "name the folder of a training run that has ended"
        raise UserError(f"--calibrate={folder}: {type(error).__name__}: {error}; {fix}") from error
    iterations = [line for line in lines if line["kind"] == "train" and "time/policy_s" in line]
    if not iterations:
        raise UserError(f"--calibrate={folder}: no iteration that trained; name another run")
    return MeasuredRun(config, ranks, iterations, seconds)


def calibrate(run: MeasuredRun, dims: Dims, gpu: Gpu, modules: Modules) -> Calibration:
    """Returns what the run says, the defaults where it says nothing; pure.

    Args:
        run: What was measured.
        dims: The dimensions of its model.
        gpu: What each of its ranks had.
        modules: What its layers were made of.
    """
    cluster = Cluster(gpu, run.ranks, modules)
    kv_tokens = plan_memory(run.config, dims, cluster).kv_tokens

    def plan(given: Assumptions) -> Duration:
        return plan_duration(run.config, dims, cluster, kv_tokens, given)

    found = _counted(run)
    given = replace(assumptions_for(run.config), **found)
    for phase, name in SHARES.items():
        share = _share(run, plan, given, phase, name)
        if share:
            found[name] = share
            given = replace(given, **found)
    verify = _median(run.iterations, "time/verify_s")
    if verify is not None:
        found["verify_s"] = verify / plan(replace(given, verify_s=1.0)).phases["verify"]
    written, planned = run.seconds.get("checkpoint", 0.0), plan(replace(given, storage=1.0))
    if written and planned.checkpoints:
        found["storage"] = planned.checkpoints / written
    if "start" in run.seconds:
        found["start_s"] = run.seconds["start"]
    return Calibration(replace(given, **found), tuple(found))


def _counted(run: MeasuredRun) -> dict[str, float]:
    """What iterations count: lengths, their spread, and questions that are worth training on."""
    mean = fmean(line["rollout/response_length_mean"] for line in run.iterations)
    longest = max(line["rollout/response_length_max"] for line in run.iterations)
    cut = fmean(line["rollout/truncated_share"] for line in run.iterations)
    config = run.config
    answers = config.data.questions_per_iteration * config.sampling.samples_per_question
    # The longest of n is at the quantile 1 - 1/2n; where some were cut, the limit is at theirs.
    beyond = cut or 0.5 / (answers * len(run.iterations))
    return {
        "mean_response_tokens": mean,
        "length_sigma": _sigma(longest / mean, beyond),
        "mixed_questions": fmean(line["rollout/nontrivial_share"] for line in run.iterations),
    }


def _sigma(ratio: float, beyond: float) -> float:
    """Returns the spread of a log-normal of which a share lies beyond `ratio` times its mean.

    log(ratio) = sigma z - sigma^2 / 2, z of the normal distribution: the smaller root.
    """
    z = NormalDist().inv_cdf(1 - min(beyond, 0.5))
    sigma = z - math.sqrt(max(0.0, z * z - 2 * math.log(max(1.0, ratio))))
    return max(_LEAST_SIGMA, sigma)


def _share(
    run: MeasuredRun,
    plan: Callable[[Assumptions], Duration],
    given: Assumptions,
    phase: str,
    name: str,
) -> float | None:
    """Returns the share at which a phase comes to what was measured, None where none does.

    Planned seconds are a / share + b. While the policy is frozen it only scores, as the reference.
    """
    trained = [line for line in run.iterations if line.get("oreal/learning_rate")]
    if phase == "policy" and not trained:
        phase = "reference"
    measured = _median(trained or run.iterations, f"time/{phase}_s")
    whole, half = (plan(replace(given, **{name: share})).phases[phase] for share in (1.0, 0.5))
    inverse = half - whole
    rest = whole - inverse
    return inverse / (measured - rest) if measured and measured > rest and inverse > 0 else None


def _median(lines: Sequence[dict[str, Any]], name: str) -> float | None:
    """Of the iterations that have it: the first is slow, since it compiles."""
    values = [float(line[name]) for line in lines if name in line]
    return median(values) if values else None
