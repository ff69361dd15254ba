"""Deals sequences to data-parallel ranks and micro-batches: within budget, with like work."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_oreal.config.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Sequence

# At this length a sequence's causal attention costs as much as its matrix products: a layer takes
# 24 h^2 n FLOP for these and 2 h n^2 for attention, so n = 12 h; the hidden size here is 2.7k, and
# the balance hardly depends on it.
ATTENTION_EQUALS_LINEAR_TOKENS = 32768

Bins = list[list[int]]


def pack(
    lengths: Sequence[int],
    data_ranks: int,
    tokens_per_micro_batch: int,
    *,
    sequence_multiple: int = 1,
    micro_batch_multiple: int = 1,
) -> tuple[tuple[tuple[int, ...], ...], ...]:
    """Returns `[data_rank][micro_batch]` -> indices into `lengths`, each index exactly once.

    Every rank gets the same number of micro-batches, at least one; some may be empty. The result
    depends on the arguments alone, and but for the indices not on the order of lengths. Longest
    first to the rank that has least to compute so far, into its cheapest micro-batch with room;
    with as few micro-batches as that allows. A rank's dearest comes first.

    Args:
        lengths: Tokens of each sequence, at least 1.
        data_ranks: Data-parallel ranks.
        tokens_per_micro_batch: The budget, never exceeded but for being rounded up to the multiple
            of a sequence; padding counts.
        sequence_multiple: What each sequence is padded to a multiple of.
        micro_batch_multiple: What a rank's number of micro-batches is a multiple of.

    Raises:
        UserError: A sequence alone is longer than the budget.
    """
    longest = max(lengths, default=0)
    if longest > tokens_per_micro_batch:
        raise UserError(
            f"engine.tokens_per_micro_batch={tokens_per_micro_batch} does not hold a sequence of"
            f" {longest} tokens: raise it to {longest} or more, or lower sampling.max_total_tokens"
        )
    capacity = _round_up(tokens_per_micro_batch, sequence_multiple)
    lengths = [_round_up(length, sequence_multiple) for length in lengths]
    descending = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    fewest = -(-sum(lengths) // (capacity * data_ranks))
    per_rank = _round_up(max(1, fewest), micro_batch_multiple)
    # Ends: with a micro-batch for each sequence every rank has an empty one, and room.
    while (bins := _fill(descending, lengths, (data_ranks, per_rank), capacity)) is None:
        per_rank += micro_batch_multiple
    return tuple(
        tuple(
            tuple(sorted(indices))
            for indices in sorted(rank, key=lambda b: -sum(_cost(lengths[i]) for i in b))
        )
        for rank in bins
    )


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _cost(length: int) -> float:
    return length + length * length / ATTENTION_EQUALS_LINEAR_TOKENS


def _fill(
    descending: list[int], lengths: Sequence[int], counts: tuple[int, int], capacity: int
) -> list[Bins] | None:
    """Returns bins of indices, `counts` ranks of as many bins; None where one found no room."""
    ranks, per_rank = counts
    bins: list[Bins] = [[[] for _ in range(per_rank)] for _ in range(ranks)]
    tokens = [[0] * per_rank for _ in range(ranks)]
    costs = [[0.0] * per_rank for _ in range(ranks)]
    for index in descending:
        most = capacity - lengths[index]
        roomy = (r for r in range(ranks) if min(tokens[r]) <= most)
        rank = min(roomy, key=lambda r: sum(costs[r]), default=None)
        if rank is None:
            return None
        fitting = (b for b in range(per_rank) if tokens[rank][b] <= most)
        best = min(fitting, key=costs[rank].__getitem__)
        bins[rank][best].append(index)
        tokens[rank][best] += lengths[index]
        costs[rank][best] += _cost(lengths[index])
    return bins
