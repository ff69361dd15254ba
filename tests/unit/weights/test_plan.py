"""Plans: every wanted element is written once with its value, from a fair choice of sources."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_oreal.weights.cost import Load
from megatron_oreal.weights.geometry import Box, Region
from megatron_oreal.weights.layout import hf_regions
from megatron_oreal.weights.plan import (
    Exchange,
    RankRound,
    TensorSpec,
    Transfer,
    make_plan,
    owned_regions,
)

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


class Process:
    """Runs all ranks' parts in this process; what is written twice or never shows as -1."""

    def __init__(self, truth: torch.Tensor, targets: Layout) -> None:
        self.truth = truth
        self.got = [{r.key: torch.full(r.local.stop, -1) for r in regions} for regions in targets]

    def run(self, parts: list[RankRound]) -> None:
        for rank, part in enumerate(parts):
            for transfer in part.copies:
                self.deliver(rank, transfer, self.truth[transfer.box.slices])
        arrived: dict[tuple[int, Box], torch.Tensor] = {}
        for _, rank, transfer in pairs([part.direct for part in parts]):
            arrived[rank, transfer.box] = self.truth[transfer.box.slices]
            self.deliver(rank, transfer, arrived[rank, transfer.box])
        for peer, rank, transfer in pairs([part.relayed for part in parts]):
            self.deliver(rank, transfer, arrived[peer, transfer.box])

    def deliver(self, rank: int, transfer: Transfer, values: torch.Tensor) -> None:
        for target in transfer.targets:
            slot = self.got[rank][target.key][target.local.slices]
            assert (slot == -1).all(), "written twice"
            slot.copy_(values)


def pairs(exchanges: list[Exchange]) -> Iterator[tuple[int, int, Transfer]]:
    """Yields `(sender, receiver, transfer)`, both ends of a pair compared."""
    for rank, exchange in enumerate(exchanges):
        for peer, transfers in exchange.receives.items():
            sends = exchanges[peer].sends[rank]
            assert [t.box for t in transfers] == [t.box for t in sends]
            for transfer in transfers:
                yield peer, rank, transfer


@st.composite
def any_layout(draw: st.DrawFn, shape: tuple[int, int], ranks: int) -> Layout:
    """One, two or three grids over each other, whose cells some ranks hold: cuts need not agree."""
    found: Layout = [[] for _ in range(ranks)]
    for number in range(draw(st.integers(1, 3))):
        for rank, regions in enumerate(draw(layouts(shape, ranks))):
            for region in regions:
                key = f"{number}/{region.key}"
                found[rank].append(Region("w", region.box, key, region.local))
    return found


@given(st.data())
def test_every_wanted_element_is_written_once_with_its_value(data: st.DataObject) -> None:
    ranks = data.draw(st.integers(1, 6))
    shape = (data.draw(st.integers(2, 7)), data.draw(st.integers(2, 7)))
    nodes = data.draw(st.lists(st.integers(0, 2), min_size=ranks, max_size=ranks))
    truth = torch.arange(shape[0] * shape[1]).reshape(shape)
    sources = data.draw(any_layout(shape, ranks))
    targets = data.draw(any_layout(shape, ranks))
    limit = data.draw(st.integers(1, 500))
    plan = make_plan([TensorSpec("w", shape, torch.int64)], sources, targets, limit, nodes)
    process = Process(truth, targets)
    parts = [plan.part_of(rank) for rank in range(ranks)]
    for number in range(len(plan.rounds)):
        process.run([part[number] for part in parts])
    for rank, regions in enumerate(targets):
        for region in regions:
            held = process.got[rank][region.key][region.local.slices]
            assert torch.equal(held, truth[region.box.slices])
    cost = plan.summary()
    assert (
        cost.bytes_across_nodes
        == cost.lower_bound_across_nodes
        == needed(shape, sources, targets, nodes)
    )
    assert make_plan([TensorSpec("w", shape, torch.int64)], sources, targets, limit, nodes) == plan


def needed(shape: tuple[int, int], sources: Layout, targets: Layout, nodes: list[int]) -> int:
    """Counts the bytes that each node wants and does not hold, element by element."""
    total = 0
    for node in set(nodes):
        has, wants = (torch.zeros(shape, dtype=torch.bool) for _ in range(2))
        for mask, layout in ((has, sources), (wants, targets)):
            for rank, regions in enumerate(layout):
                for region in regions if nodes[rank] == node else []:
                    mask[region.box.slices] = True
        total += int((wants & ~has).sum()) * 8
    return total


@given(st.data())
def test_senders_hold_what_they_send(data: st.DataObject) -> None:
    sources, targets = (data.draw(any_layout((4, 5), 4)) for _ in range(2))
    spec = TensorSpec("w", (4, 5), torch.int64)
    plan = make_plan([spec], sources, targets, 1, [0, 0, 1, 1])
    for rank, regions in enumerate(sources):
        for part in plan.part_of(rank):
            sent = [t for transfers in part.direct.sends.values() for t in transfers]
            for transfer in sent + part.copies:
                assert any(
                    held.narrow(transfer.box) == transfer.source
                    for held in regions
                    if transfer.source and held.key == transfer.source.key
                )
            relayed = {t.box for sends in part.relayed.sends.values() for t in sends}
            received = {t.box for found in part.direct.receives.values() for t in found}
            assert relayed <= received


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
    assert (summary.rank_sends, summary.rank_receives) == (Load(8, 8.0), Load(8, 8.0))
    assert (summary.rounds, summary.largest_round) == (1, 16)


def test_rounds_hold_whole_tensors_within_the_bound() -> None:
    specs = [
        TensorSpec(name, (size,), torch.float32)
        for name, size in zip("abcd", (1, 2, 9, 1), strict=True)
    ]
    store = hf_regions({spec.name: spec.shape for spec in specs})
    plan = make_plan(specs, [store], [store], 12)
    rounds = [[spec.name for spec in r.tensors] for r in plan.rounds]
    assert rounds == [["a", "b"], ["c"], ["c"], ["c"], ["d"]]
    assert plan.summary().largest_round == 12


def test_a_larger_tensor_takes_rounds_with_a_share_of_every_rank_in_each() -> None:
    """Two ranks hold two rows of four bytes each and want all of them, eight bytes at a time."""
    spec = TensorSpec("a", (4, 1), torch.float32)
    sources = [[rows("a", 0, 2, 1)], [rows("a", 2, 4, 1)]]
    plan = make_plan([spec], sources, [[whole("a", (4, 1))]] * 2, 8)
    boxes = [[delivery.atom.box for delivery in r.deliveries] for r in plan.rounds]
    assert boxes == [
        [Box((0, 0), (1, 1)), Box((2, 0), (3, 1))],
        [Box((1, 0), (2, 1)), Box((3, 0), (4, 1))],
    ]
    assert plan.summary().peak_staging == 8


@given(st.data())
def test_no_round_is_above_its_bound(data: st.DataObject) -> None:
    """Up to seven bands of rows, of each of which a line of 32 bytes must fit."""
    sources, targets = (data.draw(layouts((9, 4), 3)) for _ in range(2))
    limit = data.draw(st.integers(7 * 32, 9 * 32))
    plan = make_plan([TensorSpec("w", (9, 4), torch.float64)], sources, targets, limit)
    assert plan.summary().largest_round <= limit


def test_both_ends_of_a_pair_list_the_same_transfers() -> None:
    specs = [TensorSpec(name, (4, 1), torch.float32) for name in "ab"]
    sources = [[rows(n, 0, 2, 1) for n in "ab"], [rows(n, 2, 4, 1) for n in "ab"]]
    plan = make_plan(specs, sources, [[whole(n, (4, 1)) for n in "ab"], []], 100)
    receiver, sender = plan.part_of(0)[0], plan.part_of(1)[0]
    sent, received = sender.direct.sends[0], receiver.direct.receives[1]
    assert [(t.spec, t.box) for t in sent] == [(t.spec, t.box) for t in received]
    assert (len(receiver.copies), sender.copies, sender.tensors) == (2, [], ())


def test_what_a_node_lacks_enters_it_once_at_ranks_by_turns() -> None:
    """Two nodes of two; the first holds two 8-byte tensors, all four ranks want both."""
    specs = [TensorSpec(name, (2, 1), torch.float32) for name in "ab"]
    store = [whole(spec.name, spec.shape) for spec in specs]
    plan = make_plan(specs, [store, store, [], []], [store] * 4, 100, nodes=[0, 0, 1, 1])
    routes = [delivery.routes for round_ in plan.rounds for delivery in round_.deliveries]
    assert [[tuple(route) for route in found if route.target > 1] for found in routes] == [
        [(0, 2, False), (2, 3, True)],
        [(1, 3, False), (3, 2, True)],
    ]
    cost = plan.summary()
    assert (cost.bytes_local, cost.bytes_in_node, cost.bytes_across_nodes) == (32, 16, 16)
    assert (cost.ratio, cost.node_sends, cost.node_receives) == (1.0, Load(16, 16), Load(16, 16))
    assert (cost.rank_sends, cost.rank_across_nodes) == (Load(8, 8.0), Load(8, 4.0))
    assert cost.peak_staging == 8 + 16  # a rank was sent one tensor, relays it and gets the other


def test_a_tensor_wanted_in_two_places_of_a_rank_travels_once() -> None:
    spec = TensorSpec("a", (2, 1), torch.float32)
    tied = [Region("a", Box.whole((2, 1)), key, Box.whole((2, 1))) for key in ("in", "out")]
    plan = make_plan([spec], [[whole("a", (2, 1))], []], [[], tied], 100)
    (transfer,) = plan.part_of(1)[0].direct.receives[0]
    assert [target.key for target in transfer.targets] == ["in", "out"]
    assert plan.summary().bytes_moved == 8


def test_a_plan_explains_itself() -> None:
    spec = TensorSpec("a", (1 << 18, 1), torch.float32)
    store = [whole("a", spec.shape)]
    plan = make_plan([spec], [store, []], [[], store], 1 << 20, nodes=[0, 1])
    text = plan.explain()
    assert "across nodes            1.0 MiB\n  at least              1.0 MiB (ratio 1.000)" in text
    assert "a node receives         at most 1.0 MiB, mean 1.0 MiB" in text
    assert plan.summary().as_dict()["bytes_across_nodes"] == 1 << 20


def test_a_box_that_nobody_holds_is_named() -> None:
    spec = TensorSpec("q_proj", (4, 1), torch.float32)
    with pytest.raises(ValueError, match=r"q_proj: no rank holds .*\(3, 0\)"):
        make_plan([spec], [[rows("q_proj", 0, 3, 1)]], [[whole("q_proj", (4, 1))]], 100)
