"""Per-token estimators of KL(policy || reference) from tokens the policy sampled.

With d = reference logp - policy logp, the names k1, k2, k3 are those of
http://joschu.net/blog/kl-approx.html. All are elementwise, differentiable in the policy's
log-probability, and exactly 0 where the two models agree.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor


def k1(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """Returns -d, `[t]`: unbiased, of either sign; its gradient does not see the reference."""
    return logprobs - reference_logprobs


def k2(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """Returns d^2 / 2, `[t]`: biased, never negative."""
    return (reference_logprobs - logprobs).square() / 2


def k3(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """Returns exp(d) - d - 1, `[t]`: unbiased, never negative."""
    difference = reference_logprobs - logprobs
    return torch.expm1(difference) - difference  # expm1 keeps the digits of a small d


ESTIMATORS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"k1": k1, "k2": k2, "k3": k3}
