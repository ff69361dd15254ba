"""The unbiased pass@k of arXiv:2107.03374: the chance that k of n samples hold a correct one."""

from __future__ import annotations

import math


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Returns 1 - C(n - c, k) / C(n, k) for n samples of one question, c of them correct.

    As a product, 1 - prod_{j = 0}^{k - 1} (n - c - j) / (n - j), so that no large number is
    formed; k = 1 gives c / n.

    Raises:
        ValueError: unless 0 <= correct <= samples and 1 <= k <= samples.
    """
    if not 0 <= correct <= samples or not 1 <= k <= samples:
        raise ValueError(f"pass@{k} of {correct} correct among {samples} samples is not defined")
    wrong = samples - correct
    if wrong < k:
        return 1.0
    return 1.0 - math.prod((wrong - j) / (samples - j) for j in range(k))
