"""The two passes over a chunk's logits around which the head is built, in plain torch.

`statistics` reads the logits once, `gradient` turns them into their own gradient; between the two
the statistics of all vocabulary shards are joined. `head_triton.py` has both as GPU kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

FLOOR = -1e30
"""The maximum of no logits: finite, so that a shard without words needs no case of its own."""
_BLOCK = 1 << 16  # logits in fp32 at a time: they stay in a core's cache, and nothing grows


class Passes(NamedTuple):
    """One implementation of both; arithmetic is fp32 whatever the logits are."""

    statistics: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    gradient: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], None]


def passes_on(device: torch.device) -> Passes:
    """Returns the kernels on a GPU, plain torch elsewhere."""
    if device.type == "cuda":
        from megatron_oreal.models import head_triton  # a CPU has no triton

        return head_triton.PASSES
    return PASSES


def statistics(logits: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Returns what log-softmax and entropy need of these logits.

    Args:
        logits: `[c, v]`, a shard of the vocabulary, which may be empty.
        columns: `[c]`, each token's target among them, -1 where another shard has it.

    Returns:
        `[4, c]` fp32: the highest logit m, sum exp(x - m), sum exp(x - m) (x - m), and the target's
        logit, 0 where it lies elsewhere.
    """
    found = logits.new_zeros(4, len(logits), dtype=torch.float32)
    found[0] = FLOOR
    if logits.shape[1]:
        for rows in _blocks(logits):
            found[:, rows] = _statistics(logits[rows].float(), columns[rows])
    return found


def _statistics(logits: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    highest = logits.amax(dim=1)
    target = logits.gather(1, columns.clamp(min=0).unsqueeze(1)).squeeze(1)
    shifted = logits - highest.unsqueeze(1)
    weights = shifted.exp()
    weighted = shifted.mul_(weights).sum(dim=1)
    target = torch.where(columns >= 0, target, 0.0)
    return torch.stack((highest, weights.sum(dim=1), weighted, target))


def gradient(
    logits: torch.Tensor,
    columns: torch.Tensor,
    log_total: torch.Tensor,
    slope: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """Writes slope (onehot(target) - softmax), the gradient by each logit.

    Args:
        logits: `[c, v]`.
        columns: `[c]`, as above.
        log_total: `[c]` fp32, the logarithm of the sum of exp over the whole vocabulary.
        slope: `[c]` fp32, of the loss by the target's log-probability.
        out: `[c, v]`, of any precision; may be `logits`.
    """
    if not logits.shape[1]:
        return
    here = torch.where(columns >= 0, slope, 0.0).unsqueeze(1)
    places = columns.clamp(min=0).unsqueeze(1)
    for rows in _blocks(logits):
        block = torch.sub(logits[rows].float(), log_total[rows].unsqueeze(1)).exp_()
        block.mul_(-slope[rows].unsqueeze(1)).scatter_add_(1, places[rows], here[rows])
        out[rows] = block


def _blocks(logits: torch.Tensor) -> Iterator[slice]:
    rows = max(1, _BLOCK // logits.shape[1])
    for start in range(0, len(logits), rows):
        yield slice(start, start + rows)


PASSES = Passes(statistics, gradient)
