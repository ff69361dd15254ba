"""Bytes, sums and refusals across the world: what one rank has, all get alike."""

from __future__ import annotations

import pytest
import torch

from megatron_oreal.config.errors import UserError
from megatron_oreal.parallel import collectives
from tests.ranks import RankPools

pytestmark = pytest.mark.parallel

PAYLOADS = (b"a", b"", bytes(range(256)) * 300, b"\x00\xff")
SIZES = [1, 2, 4]


def gather() -> list[bytes]:
    return collectives.all_gather_bytes(PAYLOADS[collectives.world_rank()])


def gather_nothing() -> list[bytes]:
    return collectives.all_gather_bytes(b"")


def broadcast(source: int) -> bytes:
    return collectives.broadcast_bytes(PAYLOADS[collectives.world_rank()], source)


def total() -> tuple[torch.Tensor, torch.Tensor]:
    mine = torch.tensor([[1.0, 10.0]]) * (collectives.world_rank() + 1)
    return collectives.all_reduce_sum(mine), mine


def refuse_on(refusing: dict[int, str]) -> str | None:
    """Returns what this rank raised, and proves with a last exchange that all are in step."""
    rank, caught = collectives.world_rank(), None
    try:
        with collectives.agree():
            if rank in refusing:
                raise UserError(refusing[rank])
    except UserError as error:
        caught = str(error)
    assert len(collectives.all_gather_bytes(b"still here")) == collectives.world_size()
    return caught


def break_on_every_rank() -> None:
    with pytest.raises(KeyError), collectives.agree():
        raise KeyError("a bug")


@pytest.mark.parametrize("size", SIZES)
def test_payloads_of_any_length_arrive_in_order_of_rank(ranks: RankPools, size: int) -> None:
    assert ranks(size).run(gather) == [list(PAYLOADS[:size])] * size


@pytest.mark.parametrize("size", SIZES)
def test_nothing_at_all_is_gathered_as_nothing(ranks: RankPools, size: int) -> None:
    assert ranks(size).run(gather_nothing) == [[b""] * size] * size


@pytest.mark.parametrize("source", [0, 1, 2])
def test_a_broadcast_is_the_payload_of_its_source(ranks: RankPools, source: int) -> None:
    assert ranks(4).run(broadcast, source) == [PAYLOADS[source]] * 4


@pytest.mark.parametrize(("size", "factor"), [(1, 1.0), (2, 3.0), (4, 10.0)])
def test_a_sum_is_alike_everywhere_and_leaves_its_input(
    ranks: RankPools, size: int, factor: float
) -> None:
    for rank, (summed, mine) in enumerate(ranks(size).run(total)):
        assert summed.tolist() == [[factor, 10 * factor]]
        assert mine.tolist() == [[rank + 1, 10 * (rank + 1)]]


@pytest.mark.parametrize(
    ("refusing", "expected"),
    [
        ({}, None),
        ({1: "run.seed=-1: set 0 or more"}, "run.seed=-1: set 0 or more"),
        ({0: "déjà vu: 数学", 1: "other"}, "déjà vu: 数学"),
    ],
    ids=["none", "one", "both"],
)
def test_what_one_rank_refuses_all_refuse_alike(
    ranks: RankPools, refusing: dict[int, str], expected: str | None
) -> None:
    assert ranks(2).run(refuse_on, refusing) == [expected] * 2


def test_a_bug_is_not_taken_for_a_refusal(ranks: RankPools) -> None:
    assert ranks(2).run(break_on_every_rank) == [None, None]
