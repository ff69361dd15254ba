from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_oreal.config.schema_precision import TOKEN_MULTIPLE
from megatron_oreal.engine.micro_batch import lay_out
from megatron_oreal.parallel.context import SequenceCut
from megatron_oreal.types import PackedBatch
from tests.unit.trajectories import trajectory

LONG = trajectory(11, 12, 13, 14, 15, prompt=2)
SHORT = trajectory(21, 22, 23, prompt=1, reward=-1.0)
BATCH = PackedBatch(
    trajectories=(LONG, SHORT),
    micro_batches=(((0, 1),),),
    fields={"weight": [torch.tensor([1.0, 2.0, 3.0]), torch.tensor([4.0, 5.0])]},
)


def test_trajectories_lie_end_to_end_in_the_order_asked_for():
    laid = lay_out(BATCH, [1, 0], SequenceCut(tp_size=4))
    assert laid.tokens.tolist() == [21, 22, 23, 11, 12, 13, 14, 15]
    assert laid.packed.cu_seqlens_q.tolist() == [0, 3, 8]
    assert laid.packed.cu_seqlens_kv.tolist() == [0, 3, 8]
    assert laid.packed.max_seqlen_q == laid.packed.max_seqlen_kv == 5
    assert laid.targets.tolist() == [22, 23, 13, 14, 15]
    assert laid.sequence.tolist() == [0, 0, 1, 1, 1]
    assert laid.rewards.tolist() == [-1.0, 1.0]
    assert laid.fields["weight"].tolist() == [4.0, 5.0, 1.0, 2.0, 3.0]


@pytest.mark.parametrize(
    ("score_position", "positions"), [("before", [0, 1, 4, 5, 6]), ("at", [1, 2, 5, 6, 7])]
)
def test_a_response_token_is_scored_before_it_or_at_it(score_position, positions):
    laid = lay_out(BATCH, [1, 0], SequenceCut(tp_size=1), score_position=score_position)
    assert laid.positions.tolist() == positions


def test_padding_is_a_last_sequence_that_is_scored_nowhere():
    plain = lay_out(BATCH, [0, 1], SequenceCut(tp_size=1))
    padded = lay_out(BATCH, [0, 1], SequenceCut(tp_size=5))
    assert padded.tokens.tolist() == [*plain.tokens.tolist(), 0, 0]
    assert padded.packed.cu_seqlens_q.tolist() == [0, 5, 8, 10]
    assert padded.positions.tolist() == plain.positions.tolist()
    assert padded.targets.tolist() == plain.targets.tolist()


@pytest.mark.parametrize("multiple", [1, 4])
def test_without_trajectories_it_is_padding_only(multiple):
    laid = lay_out(BATCH, [], SequenceCut(tp_size=multiple))
    assert laid.tokens.tolist() == [0] * multiple
    assert laid.packed.cu_seqlens_q.tolist() == [0, multiple]
    parts = [laid.positions, laid.targets, laid.sequence, laid.rewards, laid.fields["weight"]]
    assert [part.shape for part in parts] == [(0,)] * 5


def test_indices_are_integers_and_fields_single_precision():
    for laid in (
        lay_out(BATCH, [0], SequenceCut(tp_size=1)),
        lay_out(BATCH, [], SequenceCut(tp_size=1)),
    ):
        integers = (laid.tokens, laid.positions, laid.targets, laid.sequence)
        assert {part.dtype for part in integers} == {torch.int64}
        assert laid.packed.cu_seqlens_q.dtype == torch.int32
        assert laid.rewards.dtype == laid.fields["weight"].dtype == torch.float32


@given(
    st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5)), min_size=1, max_size=6),
    st.integers(1, 8),
)
def test_the_token_after_each_position_is_its_target(lengths, multiple):
    count = iter(range(100, 200))
    trajectories = tuple(
        trajectory(*(next(count) for _ in range(prompt + response)), prompt=prompt)
        for prompt, response in lengths
    )
    batch = PackedBatch(trajectories, micro_batches=())
    laid = lay_out(batch, range(len(trajectories)), SequenceCut(tp_size=multiple))
    assert torch.equal(laid.tokens[laid.positions + 1], laid.targets)
    assert len(laid.tokens) % multiple == 0
    assert int(laid.packed.cu_seqlens_q[-1]) == len(laid.tokens)


def test_context_parallel_ranks_share_the_tokens_and_what_is_scored():
    # LONG is padded from 5 to 8, SHORT from 3 to 4: chunks of 2 and of 1.
    first, second = (lay_out(BATCH, [0, 1], SequenceCut(cp_size=2, cp_rank=r)) for r in (0, 1))
    assert first.tokens.tolist() == [11, 12, 0, 0, 21, 0]
    assert second.tokens.tolist() == [13, 14, 15, 0, 22, 23]
    for laid in (first, second):
        assert laid.packed.cu_seqlens_q.tolist() == [0, 8, 12]
        assert laid.packed.max_seqlen_q == 8
        assert laid.rewards.tolist() == [1.0, -1.0]
        assert laid.response_lengths.tolist() == [3, 2]
    # Scored at 12 and 21 here, at 13, 14 and 22 there.
    assert (first.positions.tolist(), first.targets.tolist()) == ([1, 4], [13, 22])
    assert (second.positions.tolist(), second.targets.tolist()) == ([0, 1, 4], [14, 15, 23])
    assert (first.slots.tolist(), second.slots.tolist()) == ([0, 3], [1, 2, 4])
    assert (first.sequence.tolist(), second.sequence.tolist()) == ([0, 1], [0, 0, 1])
    assert first.fields["weight"].tolist() == [1.0, 4.0]
    assert second.fields["weight"].tolist() == [2.0, 3.0, 5.0]


def test_it_is_filled_up_with_padding():
    laid = lay_out(BATCH, [1], SequenceCut(tp_size=4), fill_to=9)
    assert laid.tokens.tolist() == [21, 22, 23, *[0] * 9]
    assert laid.packed.cu_seqlens_q.tolist() == [0, 3, 12]
    assert laid.packed.max_seqlen_q == 9


@pytest.mark.parametrize("multiple", TOKEN_MULTIPLE.values())
@pytest.mark.parametrize(("tp", "cp"), [(1, 1), (8, 1), (1, 2), (2, 4)])
def test_each_rank_has_the_tokens_that_fp8_multiplies(multiple: int, tp: int, cp: int) -> None:
    cuts = [SequenceCut(tp, cp, rank, token_multiple=multiple) for rank in range(cp)]
    ranks = [lay_out(BATCH, [0, 1], cut) for cut in cuts]
    for laid in ranks:
        assert len(laid.tokens) % (tp * multiple) == 0
        bounds = laid.packed.cu_seqlens_q
        assert int(bounds[-1]) == cp * len(laid.tokens)
        # TE cuts every sequence, padding's own too, into two chunks a rank.
        assert not (bounds % cuts[0].sequence_multiple).any()
        assert laid.packed.max_seqlen_q == int(bounds.diff().max())
        if cp > 1:  # the same: to TE padding is part of a sequence
            assert torch.equal(laid.packed.cu_seqlens_q_padded, bounds)
    scored = torch.cat([laid.slots for laid in ranks])
    assert sorted(scored.tolist()) == [0, 1, 2, 3, 4]
    if (tp, cp) == (1, 1):
        assert len(ranks[0].tokens) == max(8, multiple)


def test_slots_count_over_the_whole_batch():
    assert lay_out(BATCH, [1], SequenceCut()).slots.tolist() == [3, 4]
    assert lay_out(BATCH, [1, 0], SequenceCut()).slots.tolist() == [3, 4, 0, 1, 2]
