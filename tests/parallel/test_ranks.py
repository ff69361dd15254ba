"""The rank pool itself: real collectives, fresh layouts, and failures that name their rank."""

from __future__ import annotations

import os

import pytest
import torch
import torch.distributed as dist

from megatron_oreal.parallel import topology
from tests.ranks import RankError, RankPool, RankPools

pytestmark = pytest.mark.parallel


def add_ranks(start: float) -> torch.Tensor:
    total = torch.tensor([start + dist.get_rank()])
    dist.all_reduce(total)
    return total


def place() -> tuple[int, int, int]:
    here = topology.current()
    return here.tp_rank, here.pp_rank, here.dp_rank


def fail_on(rank: int) -> None:
    if dist.get_rank() == rank:
        raise ValueError(f"rank {rank} is out of cheese")
    dist.barrier()


def die_on(rank: int) -> None:
    if dist.get_rank() == rank:
        os._exit(7)


def test_collectives_reach_every_rank(ranks: RankPools) -> None:
    assert [x.item() for x in ranks(2).run(add_ranks, 10.0)] == [21.0, 21.0]


def test_every_call_gets_the_layout_it_asks_for(ranks: RankPools) -> None:
    pool = ranks(4)
    assert pool.run(place, tp=2, pp=2) == [(0, 0, 0), (1, 0, 0), (0, 1, 0), (1, 1, 0)]
    assert pool.run(place, tp=2) == [(0, 0, 0), (1, 0, 0), (0, 0, 1), (1, 0, 1)]


def test_the_pool_stays_warm(ranks: RankPools) -> None:
    assert ranks(2).run(os.getpid) == ranks(2).run(os.getpid)


def test_a_failing_rank_raises_with_its_traceback_and_the_pool_is_replaced() -> None:
    pools = RankPools()
    with pytest.raises(RankError, match=r"(?s)--- rank 1 ---.*fail_on.*out of cheese"):
        pools(2).run(fail_on, 1)
    assert pools(2).run(place) == [(0, 0, 0), (0, 0, 1)]
    pools.close()


def test_a_dead_rank_is_named() -> None:
    pool = RankPool(1)
    with pytest.raises(RankError, match="died with exit code 7"):
        pool.run(die_on, 0)
    assert not pool.alive
