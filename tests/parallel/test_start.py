"""Ranks of unlike software refuse to start, all with the same line; and how fast ranks exchange."""

from __future__ import annotations

import pytest

from megatron_oreal.config.errors import UserError
from megatron_oreal.parallel.bandwidth import Rate, rates
from megatron_oreal.parallel.collectives import world_rank
from megatron_oreal.trainer.start import check_versions
from tests.ranks import RankPools

pytestmark = pytest.mark.parallel


def refusal(versions: list[dict[str, str]]) -> str:
    try:
        check_versions(versions[world_rank()], f"node{world_rank()}")
    except UserError as error:
        return str(error)
    return ""


def test_unlike_versions_are_refused_on_every_rank(ranks: RankPools) -> None:
    one, other = {"torch": "2.11.0", "python": "3.12"}, {"torch": "2.13.0", "vllm": "0.26.0"}
    first, second = ranks(2).run(refusal, [one, other])
    assert first == second
    assert "versions differ: python is 3.12 on rank 0 on node0, not installed on rank 1" in first
    assert "(and torch, vllm); install the same everywhere" in first
    assert ranks(2).run(refusal, [one, one]) == ["", ""]


@pytest.mark.parametrize("hosts", [["a", "a"], ["a", "b"]])
def test_rates_are_alike_on_every_rank(ranks: RankPools, hosts: list[str]) -> None:
    first, second = ranks(2).run(rates, hosts)
    assert first == second
    within, across = first
    found: Rate | None = within if hosts[0] == hosts[1] else across
    assert [within is None, across is None] == [hosts[0] != hosts[1], hosts[0] == hosts[1]]
    assert found is not None
    assert (found.ranks, found.nbytes) == (2, 8 << 20)
    assert found.bytes_per_s > 0
