"""Turns trajectories into micro-batches; the one place that shards data over ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_oreal.data.packing import pack
from megatron_oreal.types import PackedBatch, Trajectory


@dataclass(frozen=True)
class Packer:
    """Packs within a token budget, alike on every rank."""

    data_ranks: int
    tokens_per_micro_batch: int

    def pack(self, trajectories: Sequence[Trajectory]) -> PackedBatch:
        """Deals the trajectories to data-parallel ranks and micro-batches; not collective."""
        lengths = [len(trajectory.tokens) for trajectory in trajectories]
        micro_batches = pack(lengths, self.data_ranks, self.tokens_per_micro_batch)
        return PackedBatch(tuple(trajectories), micro_batches)
