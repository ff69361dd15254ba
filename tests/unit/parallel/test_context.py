from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_oreal.parallel.context import SequenceCut, round_up


def cuts(cp_size: int, tp_size: int = 1) -> list[SequenceCut]:
    return [SequenceCut(tp_size, cp_size, rank) for rank in range(cp_size)]


def test_a_rank_holds_an_early_and_a_late_chunk_of_each_sequence():
    held = [cut.positions([8, 4]).tolist() for cut in cuts(2)]
    assert held == [[0, 1, 6, 7, 8, 11], [2, 3, 4, 5, 9, 10]]


def test_one_rank_holds_everything():
    assert SequenceCut().positions([3, 2]).tolist() == [0, 1, 2, 3, 4]
    assert SequenceCut().chunks(5) == ((0, 5),)


@pytest.mark.parametrize(
    ("tp", "cp", "sequence", "total"),
    [(1, 1, 1, 1), (4, 1, 1, 4), (1, 2, 4, 4), (2, 2, 4, 4), (3, 2, 4, 12), (4, 2, 4, 8)],
)
def test_multiples(tp: int, cp: int, sequence: int, total: int):
    cut = SequenceCut(tp, cp)
    assert (cut.sequence_multiple, cut.total_multiple) == (sequence, total)
    assert total % sequence == 0
    assert total // cp % tp == 0


@given(st.integers(1, 5), st.lists(st.integers(1, 30), min_size=1, max_size=6))
def test_the_ranks_together_hold_each_token_once(cp_size: int, lengths: list[int]):
    padded = [round_up(length, 2 * cp_size) for length in lengths]
    held = [cut.positions(padded) for cut in cuts(cp_size)]
    assert len({len(positions) for positions in held}) == 1
    together = torch.cat(held)
    order = SequenceCut(cp_size=cp_size).sequence_order(padded)
    assert together[order].tolist() == list(range(sum(padded)))


@given(st.integers(1, 5), st.integers(1, 10))
def test_causal_attention_costs_all_ranks_the_same(cp_size: int, chunk: int):
    # A token at position p attends to p + 1 tokens.
    length = 2 * cp_size * chunk
    assert len({int((cut.positions([length]) + 1).sum()) for cut in cuts(cp_size)}) == 1
