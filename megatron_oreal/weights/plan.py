"""Which rank sends which box to whom, and when: from the layouts alone, alike on every rank."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_oreal.weights.geometry import Box, Region

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import torch

    Holders = dict[Box, dict[int, Region]]  # who holds each box of a tensor, and where


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A Hugging Face tensor in the precision its holders keep it in."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Transfer:
    """One box on its way; `source` and `target` say where the box lies on either rank."""

    source_rank: int
    source: Region
    target_rank: int
    target: Region
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes that travel."""
        return self.target.box.size * self.dtype.itemsize


@dataclass(frozen=True)
class Round:
    """Whole tensors that travel together."""

    tensors: tuple[TensorSpec, ...]
    transfers: tuple[Transfer, ...]


@dataclass(frozen=True)
class RankRound:
    """One rank's part of a round; both ends of a pair list their transfers in the same order."""

    tensors: tuple[TensorSpec, ...]  # of which this rank receives something
    copies: tuple[Transfer, ...]
    sends: dict[int, tuple[Transfer, ...]]
    receives: dict[int, tuple[Transfer, ...]]


@dataclass(frozen=True)
class PlanSummary:
    """What a plan costs: bytes that stay on their rank, bytes that travel, rounds."""

    bytes_local: int
    bytes_moved: int
    largest_sent_by_rank: int
    largest_received_by_rank: int
    largest_round: int
    rounds: int


@dataclass(frozen=True)
class Plan:
    """All rounds of a transfer between the layouts of `ranks` ranks."""

    ranks: int
    rounds: tuple[Round, ...]

    def part_of(self, rank: int) -> list[RankRound]:
        """Returns what one rank does in each round."""
        return [_part_of(round_, rank) for round_ in self.rounds]

    def summary(self) -> PlanSummary:
        """Returns what the plan costs."""
        sent, received = [0] * self.ranks, [0] * self.ranks
        local = 0
        for transfer in (transfer for round_ in self.rounds for transfer in round_.transfers):
            if transfer.source_rank == transfer.target_rank:
                local += transfer.nbytes
            else:
                sent[transfer.source_rank] += transfer.nbytes
                received[transfer.target_rank] += transfer.nbytes
        return PlanSummary(
            bytes_local=local,
            bytes_moved=sum(sent),
            largest_sent_by_rank=max(sent),
            largest_received_by_rank=max(received),
            largest_round=max((_total_bytes(r.tensors) for r in self.rounds), default=0),
            rounds=len(self.rounds),
        )


def make_plan(
    tensors: Sequence[TensorSpec],
    sources: Sequence[Sequence[Region]],
    targets: Sequence[Sequence[Region]],
    round_bytes: int,
) -> Plan:
    """Plans how every target region gets its values; pure and deterministic.

    Each box comes from one source: the rank itself where it can, else of the ranks that hold it
    the one that sends least so far.

    Args:
        tensors: What travels, in this order.
        sources: The regions each rank holds, by rank; they may replicate each other.
        targets: The regions each rank wants, by rank.
        round_bytes: Bound on the whole tensors of a round; a larger tensor is a round of its own.

    Raises:
        ValueError: No rank holds some box that is wanted; names the tensor.
    """
    holders = _holders(sources)
    wanted = _by_tensor(targets)
    sent = [0] * len(sources)
    rounds = []
    for group in group_by_bytes(tensors, round_bytes):
        transfers = [
            transfer
            for spec in group
            for rank, region in wanted[spec.name]
            for transfer in _fetch(rank, region, holders[spec.name], spec.dtype, sent)
        ]
        rounds.append(Round(group, tuple(transfers)))
    return Plan(len(sources), tuple(rounds))


def owned_regions(
    tensors: Sequence[TensorSpec], sources: Sequence[Sequence[Region]]
) -> list[list[Region]]:
    """Returns regions by rank that cover each tensor once, replicas shared out evenly; pure.

    Raises:
        ValueError: No rank holds some box of a tensor; names it.
    """
    holders = _holders(sources)
    owned: list[list[Region]] = [[] for _ in sources]
    sent = [0] * len(sources)
    for spec in tensors:
        whole = Region(spec.name, Box.whole(spec.shape), spec.name, Box.whole(spec.shape))
        for transfer in _fetch(-1, whole, holders[spec.name], spec.dtype, sent):
            owned[transfer.source_rank].append(transfer.source)
    return owned


def _fetch(
    rank: int, wanted: Region, holders: Holders, dtype: torch.dtype, sent: list[int]
) -> Iterator[Transfer]:
    """Yields the transfers that fill one wanted region, and counts what they make others send."""
    missing = [wanted.box]
    for box, held in sorted(holders.items(), key=lambda item: (rank not in item[1], item[0])):
        found = [common for part in missing if (common := part.intersect(box))]
        if not found:
            continue
        source_rank = _choose_source(rank, held, sent)
        for common in found:
            source = held[source_rank].narrow(common)
            transfer = Transfer(source_rank, source, rank, wanted.narrow(common), dtype)
            sent[source_rank] += transfer.nbytes if source_rank != rank else 0
            yield transfer
        missing = [rest for part in missing for rest in part.subtract(box)]
        if not missing:
            return
    raise ValueError(f"{wanted.tensor}: no rank holds {missing[0]}")


def _choose_source(rank: int, held: dict[int, Region], sent: list[int]) -> int:
    """Returns the holder that serves `rank`; a nearer one (same node) would be preferred here."""
    return rank if rank in held else min(held, key=lambda holder: (sent[holder], holder))


def _holders(sources: Sequence[Sequence[Region]]) -> defaultdict[str, Holders]:
    holders: defaultdict[str, Holders] = defaultdict(dict)
    for rank, regions in enumerate(sources):
        for region in regions:
            holders[region.tensor].setdefault(region.box, {})[rank] = region
    return holders


def _by_tensor(
    targets: Sequence[Sequence[Region]],
) -> defaultdict[str, list[tuple[int, Region]]]:
    wanted: defaultdict[str, list[tuple[int, Region]]] = defaultdict(list)
    for rank, regions in enumerate(targets):
        for region in regions:
            wanted[region.tensor].append((rank, region))
    return wanted


def group_by_bytes(tensors: Sequence[TensorSpec], limit: int) -> Iterator[tuple[TensorSpec, ...]]:
    """Yields runs of whole tensors of at most `limit` bytes; a larger tensor comes alone."""
    group: list[TensorSpec] = []
    for spec in tensors:
        if group and _total_bytes(group) + spec.nbytes > limit:
            yield tuple(group)
            group = []
        group.append(spec)
    if group:
        yield tuple(group)


def _total_bytes(tensors: Sequence[TensorSpec]) -> int:
    return sum(spec.nbytes for spec in tensors)


def _part_of(round_: Round, rank: int) -> RankRound:
    copies: list[Transfer] = []
    sends: defaultdict[int, list[Transfer]] = defaultdict(list)
    receives: defaultdict[int, list[Transfer]] = defaultdict(list)
    for transfer in round_.transfers:
        if transfer.source_rank == transfer.target_rank == rank:
            copies.append(transfer)
        elif transfer.source_rank == rank:
            sends[transfer.target_rank].append(transfer)
        elif transfer.target_rank == rank:
            receives[transfer.source_rank].append(transfer)
    names = {t.target.tensor for t in round_.transfers if t.target_rank == rank}
    return RankRound(
        tensors=tuple(spec for spec in round_.tensors if spec.name in names),
        copies=tuple(copies),
        sends={peer: tuple(transfers) for peer, transfers in sends.items()},
        receives={peer: tuple(transfers) for peer, transfers in receives.items()},
    )
