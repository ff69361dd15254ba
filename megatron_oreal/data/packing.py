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
    depends on the arguments alone. Longest first into the cheapest micro-batch with room, with as
    few micro-batches as that allows; then the dearest micro-batch to the cheapest rank, so that the
    m-th ones of all ranks are alike.

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
    # Ends: with a micro-batch for each sequence the cheapest is an empty one, and has room.
    while (bins := _fill(descending, lengths, per_rank * data_ranks, capacity)) is None:
        per_rank += micro_batch_multiple
    return _deal(bins, [sum(_cost(lengths[i]) for i in indices) for indices in bins], data_ranks)


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _cost(length: int) -> float:
    return length + length * length / ATTENTION_EQUALS_LINEAR_TOKENS


def _fill(descending: list[int], lengths: Sequence[int], count: int, capacity: int) -> Bins | None:
    """Returns `count` bins of indices, or None where one found no room."""
    bins: Bins = [[] for _ in range(count)]
    tokens, costs = [0] * count, [0.0] * count
    for index in descending:
        roomy = (b for b in range(count) if tokens[b] + lengths[index] <= capacity)
        best = min(roomy, key=costs.__getitem__, default=None)
        if best is None:
            return None
        bins[best].append(index)
        tokens[best] += lengths[index]
        costs[best] += _cost(lengths[index])
    return bins


def _deal(
    bins: Bins, costs: list[float], data_ranks: int
) -> tuple[tuple[tuple[int, ...], ...], ...]:
    """Returns the bins dealt out, equally many to each rank."""
    per_rank = len(bins) // data_ranks
    ranks: list[list[tuple[int, ...]]] = [[] for _ in range(data_ranks)]
    totals = [0.0] * data_ranks
    for b in sorted(range(len(bins)), key=lambda b: (-costs[b], b)):
        open_ranks = (r for r in range(data_ranks) if len(ranks[r]) < per_rank)
        rank = min(open_ranks, key=totals.__getitem__)
        ranks[rank].append(tuple(sorted(bins[b])))
        totals[rank] += costs[b]
    return tuple(tuple(micro_batches) for micro_batches in ranks)
