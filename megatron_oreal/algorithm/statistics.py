"""How sure a rate over questions is, and whether two models differ: seeded resampling.

Questions are what is resampled, not responses: the responses of one question are no independent
evidence of another, and a suite is itself a sample of the questions it could have held.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

DRAWS = 10_000
LEVEL = 0.95
_CHUNK_DRAWS = 500
_EXACT_PAIRS = 13  # 2^13 sign patterns are fewer than the draws


@dataclass(frozen=True, slots=True)
class Interval:
    """A percentile bootstrap interval."""

    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Difference:
    """Mean of b - a over the same questions.

    Attributes:
        mean: of b less that of a.
        interval: of that, questions resampled in pairs.
        p_value: two-sided, of a permutation test in which each question's two values may change
            places: how often chance alone makes a difference this large.
    """

    mean: float
    interval: Interval
    p_value: float


def bootstrap_interval(
    values: Sequence[float], *, level: float = LEVEL, draws: int = DRAWS, seed: int = 0
) -> Interval:
    """Returns the interval that holds the middle `level` of the means of resampled questions.

    Args:
        values: One a question, `[n]`; not empty.
        level: Share of the resampled means inside.
        draws: How many resampled sets.
        seed: The same seed draws the same sets for the same n.
    """
    found = np.asarray(values, dtype=np.float64)
    rng = np.random.default_rng(seed)
    means = _in_chunks(
        draws, lambda count: found[rng.integers(0, len(found), (count, len(found)))].mean(axis=1)
    )
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(low), float(high))


def paired_difference(
    a: Sequence[float], b: Sequence[float], *, draws: int = DRAWS, seed: int = 0
) -> Difference:
    """Compares two models on the same questions, `[n]` each, in the same order.

    All sign patterns are tried where few questions differ; else `draws` random ones, and the
    observed one is counted among them, so that p is never 0.
    """
    differences = np.asarray(b, dtype=np.float64) - np.asarray(a, dtype=np.float64)
    mean = float(differences.mean())
    interval = bootstrap_interval(differences.tolist(), draws=draws, seed=seed)
    return Difference(mean, interval, _sign_flips(differences, draws, seed))


def _sign_flips(differences: NDArray[np.float64], draws: int, seed: int) -> float:
    moved = differences[differences != 0]  # a sign changes nothing of the others
    observed = abs(moved.sum()) - 1e-9  # sums in another order may differ in the last bits
    if len(moved) <= _EXACT_PAIRS:
        patterns = np.arange(2 ** len(moved))[:, None] >> np.arange(len(moved)) & 1
        return float((np.abs((2 * patterns - 1) @ moved) >= observed).mean())
    rng = np.random.default_rng(seed)
    sums = _in_chunks(draws, lambda n: (2 * rng.integers(0, 2, (n, len(moved))) - 1) @ moved)
    return float((1 + (np.abs(sums) >= observed).sum()) / (draws + 1))


def _in_chunks(draws: int, draw: Callable[[int], NDArray[np.float64]]) -> NDArray[np.float64]:
    """Draws a bounded number at a time: suites of thousands of questions need no gigabytes."""
    starts = range(0, draws, _CHUNK_DRAWS)
    return np.concatenate([draw(min(_CHUNK_DRAWS, draws - start)) for start in starts])
