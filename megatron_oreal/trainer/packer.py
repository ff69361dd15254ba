"""Turns trajectories into micro-batches; the one place that shards data over ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_oreal.data.packing import pack
from megatron_oreal.parallel.topology import Topology
from megatron_oreal.types import PackedBatch, Trajectory


@dataclass(frozen=True)
class Packer:
    """Packs within a token budget, alike on every rank; see `data.packing.pack`."""

    data_ranks: int
    tokens_per_micro_batch: int
    sequence_multiple: int = 1
    micro_batch_multiple: int = 1

    @classmethod
    def for_layout(cls, topology: Topology, tokens_per_micro_batch: int) -> Packer:
        """Returns the packer whose batches the ranks of this layout can share."""
        return cls(
            topology.dp_size,
            tokens_per_micro_batch,
            topology.cut.sequence_multiple,
            topology.micro_batch_multiple,
        )

    def pack(self, trajectories: Sequence[Trajectory]) -> PackedBatch:
        """Deals the trajectories to data-parallel ranks and micro-batches; not collective."""
        micro_batches = pack(
            [len(trajectory.tokens) for trajectory in trajectories],
            self.data_ranks,
            self.tokens_per_micro_batch,
            sequence_multiple=self.sequence_multiple,
            micro_batch_multiple=self.micro_batch_multiple,
        )
        return PackedBatch(tuple(trajectories), micro_batches)
