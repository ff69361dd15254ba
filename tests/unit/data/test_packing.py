from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_oreal.config.errors import UserError
from megatron_oreal.data.packing import _cost, pack


def test_one_rank_one_micro_batch() -> None:
    assert pack([3, 4, 5], 1, 12) == (((0, 1, 2),),)


def test_longest_are_parted() -> None:
    # 8 + 2 and 7 + 3 fill both ranks alike.
    assert pack([8, 7, 3, 2], 2, 16) == (((0, 3),), ((1, 2),))


def test_as_few_micro_batches_as_the_budget_allows() -> None:
    packed = pack([6, 6, 4, 4], 1, 10)
    assert sorted(packed[0]) == [(0, 2), (1, 3)]


def test_dearest_micro_batches_go_first() -> None:
    assert pack([1, 9, 5, 5], 2, 9) == (((1,), (0,)), ((2,), (3,)))


@pytest.mark.parametrize("ranks", [1, 3])
def test_no_sequences_leave_one_empty_micro_batch(ranks: int) -> None:
    assert pack([], ranks, 8) == (((),),) * ranks


def test_fewer_sequences_than_ranks() -> None:
    assert pack([5], 3, 8) == (((0,),), ((),), ((),))


def test_attention_counts_more_than_tokens() -> None:
    # The long one costs 65,536, each short one 1,056: 65,536 + 17 x 1,056 = 83,488 against
    # 79 x 1,056 = 83,424. By tokens alone it would be 32 short ones against 64.
    first, second = pack([32768, *[1024] * 96], 2, 131072)
    assert (len(first[0]), len(second[0])) == (18, 79)


def test_too_long_for_the_budget() -> None:
    with pytest.raises(
        UserError,
        match=r"engine\.tokens_per_micro_batch=8 does not hold .* 9 tokens: raise it to 9",
    ):
        pack([1, 9], 2, 8)


def test_padding_of_a_sequence_counts():
    # 3 and 5 are padded to 4 and 8: together more than 8, though not bare.
    assert pack([3, 5], 1, 8) == (((0, 1),),)
    assert pack([3, 5], 1, 8, sequence_multiple=4) == (((1,), (0,)),)


def test_a_sequence_as_long_as_the_budget_may_be_padded_beyond_it():
    assert pack([7], 1, 7, sequence_multiple=4) == (((0,),),)


def test_the_number_of_micro_batches_is_a_multiple():
    assert pack([5, 3], 1, 8, micro_batch_multiple=2) == (((0,), (1,)),)
    assert pack([5], 1, 8, micro_batch_multiple=2) == (((0,), ()),)


@given(
    lengths=st.lists(st.integers(1, 100), max_size=60),
    ranks=st.integers(1, 9),
    budget=st.integers(100, 400),
    sequence_multiple=st.sampled_from([1, 4, 6, 8]),
    micro_batch_multiple=st.integers(1, 4),
)
def test_properties(
    lengths: list[int], ranks: int, budget: int, sequence_multiple: int, micro_batch_multiple: int
) -> None:
    multiples = {
        "sequence_multiple": sequence_multiple,
        "micro_batch_multiple": micro_batch_multiple,
    }
    packed = pack(lengths, ranks, budget, **multiples)
    assert len(packed) == ranks
    (count,) = {len(micro_batches) for micro_batches in packed}
    assert count >= 1
    assert count % micro_batch_multiple == 0
    dealt = [index for rank in packed for micro_batch in rank for index in micro_batch]
    assert sorted(dealt) == list(range(len(lengths)))
    padded = [-(-length // sequence_multiple) * sequence_multiple for length in lengths]
    capacity = -(-budget // sequence_multiple) * sequence_multiple
    assert all(sum(padded[i] for i in m) <= capacity for rank in packed for m in rank)
    assert pack(list(lengths), ranks, budget, **multiples) == packed
    # Half full on average is the worst that longest-first does; one more micro-batch by rounding.
    assert count <= micro_batch_multiple + 2 * sum(padded) / (ranks * capacity)


@given(
    lengths=st.lists(st.integers(1, 100), max_size=40),
    order=st.randoms(use_true_random=False),
    ranks=st.integers(1, 5),
    micro_batch_multiple=st.integers(1, 3),
)
def test_the_order_of_sequences_changes_nothing_but_their_numbers(
    lengths: list[int], order: random.Random, ranks: int, micro_batch_multiple: int
) -> None:
    def shape(given: list[int]) -> list[list[list[int]]]:
        packed = pack(given, ranks, 128, micro_batch_multiple=micro_batch_multiple)
        return [[sorted(given[i] for i in m) for m in rank] for rank in packed]

    shuffled = list(lengths)
    order.shuffle(shuffled)
    assert shape(shuffled) == shape(lengths)


@given(st.lists(st.integers(1, 64), min_size=40, max_size=120), st.integers(2, 5))
def test_ranks_carry_like_loads(lengths: list[int], ranks: int) -> None:
    costs = [sum(_cost(lengths[i]) for m in rank for i in m) for rank in pack(lengths, ranks, 512)]
    assert max(costs) - min(costs) <= 2 * _cost(max(lengths))


@pytest.mark.parametrize("ranks", [2, 4])
def test_one_of_16k_among_many_of_100_leaves_the_others_to_other_ranks(ranks: int) -> None:
    lengths = [16384] + [100] * 400
    packed = pack(lengths, ranks, 16384)
    costs = [sum(_cost(lengths[i]) for m in rank for i in m) for rank in packed]
    assert any((0,) in rank for rank in packed)  # the long one fills a micro-batch
    shared = sorted(costs)[: ranks - 1] if ranks == 4 else costs  # of 4 it is a rank's whole work
    assert max(shared) - min(shared) <= _cost(100)
    assert max(costs) <= max(_cost(16384), sum(costs) / ranks + _cost(100))
