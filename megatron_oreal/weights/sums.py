"""Checksums of both ends of a transfer, each counted on the device where the values lie."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from megatron_oreal.weights.checksum import tensor_checksum
from megatron_oreal.weights.geometry import Box
from megatron_oreal.weights.plan import TensorSpec, owned_parts
from megatron_oreal.weights.transport import region_view

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from megatron_oreal.weights.geometry import Region

Checksums = dict[str, int]
"""The checksum of each tensor, or of the part of it that some layout has."""


@dataclass(frozen=True)
class SourceSums:
    """What the checksums of one or more layouts are to be, counted by the ranks that hold a model.

    Holds this rank's live parameters: each count reads what they are then. `parts` are the regions
    that this rank answers for, with the numbers of the layouts that want them.
    """

    tensors: tuple[TensorSpec, ...]
    parts: tuple[tuple[Region, tuple[int, ...]], ...]
    layouts: int
    params: Mapping[str, torch.Tensor]

    def count(self) -> list[Checksums]:
        """Returns the checksums of each layout; collective over the world.

        Each element is read on one of the ranks that hold it.
        """
        position = {spec.name: index for index, spec in enumerate(self.tensors)}
        device = next(iter(self.params.values())).device
        totals = torch.zeros(self.layouts, len(position), dtype=torch.int64, device=device)
        view = region_view(self.params)
        for region, wanters in self.parts:
            index = position[region.tensor]
            share = tensor_checksum(view(region), region.box, self.tensors[index].shape)
            for layout in wanters:
                totals[layout, index] += share
        dist.all_reduce(totals)
        return [dict(zip(position, sums, strict=True)) for sums in totals.tolist()]


def source_sums(
    tensors: Sequence[TensorSpec],
    sources: Sequence[Sequence[Region]],
    layouts: Sequence[Sequence[Region]],
    *,
    rank: int,
    params: Mapping[str, torch.Tensor],
) -> SourceSums:
    """Shares out who counts what; pure, the same sharing on every rank.

    Args:
        tensors: What travels.
        sources: The regions each rank holds, by rank.
        layouts: The regions of each layout that will be compared.
        rank: This rank.
        params: This rank's parameters, by the local names of its regions.
    """
    parts = owned_parts(tensors, sources, layouts)[rank]
    return SourceSums(tuple(tensors), tuple(parts), len(layouts), params)


def held_sums(
    tensors: Sequence[TensorSpec],
    regions: Sequence[Region],
    held: Mapping[str, torch.Tensor],
) -> Checksums:
    """Returns the checksums of what this rank holds of each tensor; not collective."""
    shapes = {spec.name: spec.shape for spec in tensors}
    view = region_view(held)
    totals: dict[str, torch.Tensor] = {}
    for region in regions:
        share = tensor_checksum(view(region), region.box, shapes[region.tensor])
        totals[region.tensor] = totals.get(region.tensor, torch.zeros_like(share)) + share
    sums = torch.stack(list(totals.values())).tolist() if totals else []
    return {spec.name: 0 for spec in tensors} | dict(zip(totals, sums, strict=True))


def whole_sum(tensor: torch.Tensor) -> int:
    """Returns the checksum of a whole tensor; not collective."""
    shape = tuple(tensor.shape)
    return int(tensor_checksum(tensor, Box.whole(shape), shape))


def wrapped(total: int) -> int:
    """Returns a sum of checksums as the int64 that adding them on a device would give; pure."""
    return (total + (1 << 63)) % (1 << 64) - (1 << 63)


def differing(expected: Mapping[str, int], found: Mapping[str, int]) -> list[str]:
    """Returns the names of tensors whose checksum is missing or another one."""
    return [name for name, value in expected.items() if found.get(name) != value]
