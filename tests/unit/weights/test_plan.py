"""Plans: every wanted element is written once with its value, from a fair choice of sources."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_oreal.weights.geometry import Box, Region
from megatron_oreal.weights.layout import hf_regions
from megatron_oreal.weights.plan import TensorSpec, make_plan, owned_regions

Layout = list[list[Region]]


def whole(name: str, shape: tuple[int, ...]) -> Region:
    return Region(name, Box.whole(shape), name, Box.whole(shape))


def rows(name: str, low: int, high: int, width: int) -> Region:
    return Region(name, Box((low, 0), (high, width)), name, Box.whole((high - low, width)))


@st.composite
def layouts(draw: st.DrawFn, shape: tuple[int, int], ranks: int) -> Layout:
    """Cuts the tensor into a grid and gives each cell to one or more ranks."""
    cuts = [
        [0, *sorted(draw(st.sets(st.integers(1, length - 1), max_size=3))), length]
        for length in shape
    ]
    layout: Layout = [[] for _ in range(ranks)]
    for top, bottom in zip(cuts[0], cuts[0][1:], strict=False):
        for left, right in zip(cuts[1], cuts[1][1:], strict=False):
            box = Box((top, left), (bottom, right))
            for rank in draw(st.sets(st.integers(0, ranks - 1), min_size=1)):
                key = f"{top}-{left}"
                layout[rank].append(Region("w", box, key, Box.whole(box.shape)))
    return layout


@given(st.data())
def test_every_wanted_element_is_written_once_with_its_value(data: st.DataObject) -> None:
    shape, ranks = (6, 7), 3
    truth = torch.arange(42).reshape(shape)
    sources = data.draw(layouts(shape, ranks))
    targets = data.draw(layouts(shape, ranks))
    plan = make_plan([TensorSpec("w", shape, torch.int64)], sources, targets, 1)

    held = [{r.key: truth[r.box.slices] for r in regions} for regions in sources]
    got = [{r.key: torch.full(r.box.shape, -1) for r in regions} for regions in targets]
    for transfer in plan.rounds[0].transfers:
        slot = got[transfer.target_rank][transfer.target.key][transfer.target.local.slices]
        assert (slot == -1).all()
        value = held[transfer.source_rank][transfer.source.key][transfer.source.local.slices]
        slot.copy_(value)
    for rank, regions in enumerate(targets):
        for region in regions:
            assert torch.equal(got[rank][region.key], truth[region.box.slices])


@given(st.data())
def test_owned_regions_cover_every_element_once(data: st.DataObject) -> None:
    shape = (6, 7)
    sources = data.draw(layouts(shape, 3))
    count = torch.zeros(shape)
    for rank, regions in enumerate(owned_regions([TensorSpec("w", shape, torch.int64)], sources)):
        for region in regions:
            count[region.box.slices] += 1
            assert any(
                held.narrow(region.box) == region
                for held in sources[rank]
                if held.key == region.key
            )
    assert (count == 1).all()


def test_a_rank_takes_its_own_and_replicas_share_the_rest() -> None:
    """Four ranks, tp 2 x dp 2, all want two whole 8-byte tensors: each sends two halves."""
    shape = (2, 1)
    specs = [TensorSpec(name, shape, torch.float32) for name in "ab"]
    halves = [[rows(name, half, half + 1, 1) for name in "ab"] for half in (0, 1)]
    sources = [halves[0], halves[1], halves[0], halves[1]]
    targets = [[whole(name, shape) for name in "ab"]] * 4
    summary = make_plan(specs, sources, targets, 100).summary()
    assert (summary.bytes_local, summary.bytes_moved) == (4 * 2 * 4, 4 * 2 * 4)
    assert (summary.largest_sent_by_rank, summary.largest_received_by_rank) == (8, 8)
    assert (summary.rounds, summary.largest_round) == (1, 16)


def test_rounds_hold_whole_tensors_within_the_bound() -> None:
    specs = [
        TensorSpec(name, (size,), torch.float32)
        for name, size in zip("abcd", (1, 2, 9, 1), strict=True)
    ]
    store = hf_regions({spec.name: spec.shape for spec in specs})
    plan = make_plan(specs, [store], [store], 12)
    assert [[spec.name for spec in r.tensors] for r in plan.rounds] == [["a", "b"], ["c"], ["d"]]
    assert plan.summary().largest_round == 36


def test_both_ends_of_a_pair_list_the_same_transfers() -> None:
    specs = [TensorSpec(name, (4, 1), torch.float32) for name in "ab"]
    sources = [[rows(n, 0, 2, 1) for n in "ab"], [rows(n, 2, 4, 1) for n in "ab"]]
    plan = make_plan(specs, sources, [[whole(n, (4, 1)) for n in "ab"], []], 100)
    receiver, sender = plan.part_of(0)[0], plan.part_of(1)[0]
    assert sender.sends == {0: receiver.receives[1]}
    assert (len(receiver.copies), sender.copies, sender.tensors) == (2, (), ())


def test_a_box_that_nobody_holds_is_named() -> None:
    spec = TensorSpec("q_proj", (4, 1), torch.float32)
    with pytest.raises(ValueError, match=r"q_proj: no rank holds .*\(3, 0\)"):
        make_plan([spec], [[rows("q_proj", 0, 3, 1)]], [[whole("q_proj", (4, 1))]], 100)
