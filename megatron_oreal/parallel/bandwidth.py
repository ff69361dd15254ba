"""How fast ranks exchange tensors: the bus bandwidth of an all-reduce, over NCCL or gloo."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist

from megatron_oreal.parallel.collectives import all_gather_bytes, world_rank, world_size
from megatron_oreal.parallel.cuda_on_cpu import compute_device, has_gpu

_MIB = 1 << 20
_REPEATS = 5


class Rate(NamedTuple):
    """Bytes per second of the slowest group of ranks: of 2 (n - 1) / n times what is reduced."""

    ranks: int
    nbytes: int
    bytes_per_s: float


def rates(hosts: Sequence[str]) -> tuple[Rate | None, Rate | None]:
    """Measures within nodes, all at once, then over all ranks; collective over the world.

    Args:
        hosts: Of every rank.

    Returns:
        Alike on every rank; None where there is no node of several ranks, no second node.
    """
    nodes = [[r for r, host in enumerate(hosts) if host == name] for name in dict.fromkeys(hosts)]
    within = across = None
    if max(map(len, nodes)) > 1:
        mine = [dist.new_group(node) for node in nodes][nodes.index(_node_of(nodes))]
        assert isinstance(mine, dist.ProcessGroup), "every rank is in the group of its node"
        within = _slowest(mine)
        dist.destroy_process_group(mine)
    if len(nodes) > 1:
        across = _slowest(None)
    return within, across


def _node_of(nodes: Sequence[list[int]]) -> list[int]:
    return next(node for node in nodes if world_rank() in node)


def _slowest(group: dist.ProcessGroup | None) -> Rate:
    """Every rank measures its group; collective over the world."""
    size = world_size() if group is None else dist.get_world_size(group)
    nbytes = (256 if has_gpu() else 8) * _MIB
    seconds = _measure(group, nbytes)
    moved = 2 * (size - 1) / size * nbytes
    found = [
        part.decode().split() for part in all_gather_bytes(f"{size} {moved / seconds}".encode())
    ]
    several = [(int(ranks), float(rate)) for ranks, rate in found if int(ranks) > 1]
    ranks, rate = min(several, key=lambda each: each[1])
    return Rate(ranks, nbytes, rate)


def _measure(group: dist.ProcessGroup | None, nbytes: int) -> float:
    """Seconds of one all-reduce, the median of a few; the first, which connects, is left out."""
    values = torch.zeros(nbytes // 4, device=compute_device())
    taken = []
    for _ in range(_REPEATS + 1):
        started = time.perf_counter()
        dist.all_reduce(values, group=group)
        if has_gpu():
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken[1:])
