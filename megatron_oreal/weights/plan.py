"""Which rank sends which box to whom, and when: from the layouts alone, alike on every rank."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, TypeVar

from megatron_oreal.weights.cost import PlanSummary, summarise
from megatron_oreal.weights.geometry import Box, Region
from megatron_oreal.weights.routing import Atom, Route, Router, cut_into_atoms

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

Stores = Mapping[str, Mapping[int, Sequence[Region]]]
"""The regions of each tensor by rank."""


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
class Parcel:
    """What of a tensor travels in one round: disjoint atoms."""

    spec: TensorSpec
    atoms: tuple[Atom, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of one copy of all."""
        return sum(atom.box.size for atom in self.atoms) * self.spec.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Delivery:
    """An atom of a tensor, and how it reaches each rank that wants it."""

    spec: TensorSpec
    atom: Atom
    routes: tuple[Route, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of one copy."""
        return self.atom.box.size * self.spec.dtype.itemsize


Sized = TypeVar("Sized", TensorSpec, Parcel)


@dataclass(frozen=True, slots=True)
class Transfer:
    """One box on its way to all places that it has on the receiving rank.

    `source` says where it lies on the sending rank; None: it is what that rank was sent itself, in
    the round's first phase.
    """

    spec: TensorSpec
    box: Box
    source: Region | None
    targets: tuple[Region, ...]

    @property
    def nbytes(self) -> int:
        """Bytes that travel."""
        return self.box.size * self.spec.dtype.itemsize


@dataclass(frozen=True)
class Exchange:
    """What one rank sends to and receives from each peer, both ends of a pair in the same order."""

    sends: dict[int, list[Transfer]] = field(default_factory=lambda: defaultdict(list))
    receives: dict[int, list[Transfer]] = field(default_factory=lambda: defaultdict(list))


@dataclass(frozen=True)
class RankRound:
    """One rank's part of a round: copies within it, what holders send, then what ranks relay."""

    tensors: tuple[TensorSpec, ...]  # of which this rank receives something
    copies: list[Transfer]
    direct: Exchange
    relayed: Exchange


@dataclass(frozen=True)
class Round:
    """Tensors, or parts of one, that travel together."""

    tensors: tuple[TensorSpec, ...]
    deliveries: tuple[Delivery, ...]


@dataclass(frozen=True)
class Plan:
    """All rounds of a transfer between the layouts of ranks; `nodes[r]` is the node of rank r."""

    nodes: tuple[int, ...]
    rounds: tuple[Round, ...]
    sources: Stores
    targets: Stores

    def part_of(self, rank: int) -> list[RankRound]:
        """Returns what one rank does in each round."""
        return [self._part_of(round_, rank) for round_ in self.rounds]

    def summary(self) -> PlanSummary:
        """Returns what the plan costs."""
        return summarise(self)

    def explain(self) -> str:
        """Returns what the plan costs as a table for people."""
        return self.summary().table()

    def _part_of(self, round_: Round, rank: int) -> RankRound:
        part = RankRound((), [], Exchange(), Exchange())
        names = set()
        for delivery in round_.deliveries:
            for route in delivery.routes:
                if rank not in (route.source, route.target):
                    continue
                transfer = self._transfer(delivery, route)
                exchange = part.relayed if route.is_relay else part.direct
                if route.target == rank:
                    names.add(delivery.spec.name)
                if route.source == route.target:
                    part.copies.append(transfer)
                elif route.source == rank:
                    exchange.sends[route.target].append(transfer)
                else:
                    exchange.receives[route.source].append(transfer)
        tensors = tuple(spec for spec in round_.tensors if spec.name in names)
        return RankRound(tensors, part.copies, part.direct, part.relayed)

    def _transfer(self, delivery: Delivery, route: Route) -> Transfer:
        name, box = delivery.spec.name, delivery.atom.box
        source = None
        if not route.is_relay:
            source = _places(self.sources[name][route.source], box)[0]
        return Transfer(delivery.spec, box, source, _places(self.targets[name][route.target], box))


def make_plan(
    tensors: Sequence[TensorSpec],
    sources: Sequence[Sequence[Region]],
    targets: Sequence[Sequence[Region]],
    round_bytes: int,
    nodes: Sequence[int] | None = None,
) -> Plan:
    """Plans how every target region gets its values; pure and deterministic.

    Each box comes from the rank itself where it can, else from its node, else from the least busy
    node that holds it; a byte that a node lacks enters it once and is relayed within it.

    Args:
        tensors: What travels, in this order.
        sources: The regions each rank holds, by rank; they may replicate each other.
        targets: The regions each rank wants, by rank.
        round_bytes: Bound on one copy of what travels in a round; larger tensors take several.
        nodes: The node of each rank; None: all are on one.

    Raises:
        ValueError: No rank holds some box that is wanted; names the tensor.
    """
    nodes = tuple(nodes or (0 for _ in sources))
    held, wanted = _by_tensor(sources), _by_tensor(targets)
    router = Router(nodes)
    cutter = _Cutter()
    parcels = [
        parcel
        for spec in tensors
        for parcel in _parcels(
            spec, cutter.atoms(spec, held[spec.name], wanted[spec.name]), round_bytes
        )
    ]
    rounds = []
    for group in group_by_bytes(parcels, round_bytes):
        deliveries = tuple(_deliveries(group, router))
        rounds.append(Round(tuple(parcel.spec for parcel in group), deliveries))
    return Plan(nodes, tuple(rounds), held, wanted)


def owned_regions(
    tensors: Sequence[TensorSpec], sources: Sequence[Sequence[Region]]
) -> list[list[Region]]:
    """Returns regions by rank that cover each tensor once, replicas shared out evenly; pure.

    Raises:
        ValueError: No rank holds some box of a tensor; names it.
    """
    whole = [
        Region(spec.name, Box.whole(spec.shape), spec.name, Box.whole(spec.shape))
        for spec in tensors
    ]
    parts = owned_parts(tensors, sources, [whole])
    return [[region for region, _ in owned] for owned in parts]


def owned_parts(
    tensors: Sequence[TensorSpec],
    sources: Sequence[Sequence[Region]],
    targets: Sequence[Sequence[Region]],
) -> list[list[tuple[Region, tuple[int, ...]]]]:
    """Returns by rank what it answers for of all that the targets want, each box once; pure.

    Replicas are shared out evenly. With each region come the indices of the targets that want it,
    all of it.

    Raises:
        ValueError: No rank holds some box that is wanted; names the tensor.
    """
    held, wanted = _by_tensor(sources), _by_tensor(targets)
    owned: list[list[tuple[Region, tuple[int, ...]]]] = [[] for _ in sources]
    bytes_of = [0] * len(sources)
    cutter = _Cutter()
    for spec in tensors:
        for atom in cutter.atoms(spec, held[spec.name], wanted[spec.name]):
            owner = min(atom.holders, key=lambda rank: (bytes_of[rank], rank))
            bytes_of[owner] += atom.box.size * spec.dtype.itemsize
            region = _places(held[spec.name][owner], atom.box)[0]
            owned[owner].append((region, atom.wanters))
    return owned


class _Cutter:
    """Cuts tensors into atoms; tensors that lie alike, as those of most layers do, only once."""

    def __init__(self) -> None:
        self._known: dict[object, list[Atom]] = {}

    def atoms(
        self,
        spec: TensorSpec,
        held: Mapping[int, Sequence[Region]],
        wanted: Mapping[int, Sequence[Region]],
    ) -> list[Atom]:
        """Returns the atoms of a tensor; raises `ValueError` where one has no holder."""
        boxes = [
            {rank: tuple(region.box for region in regions) for rank, regions in side.items()}
            for side in (held, wanted)
        ]
        pattern = (spec.shape, *(tuple(side.items()) for side in boxes))
        if pattern not in self._known:
            try:
                self._known[pattern] = cut_into_atoms(spec.shape, *boxes)
            except LookupError as error:
                raise ValueError(f"{spec.name}: no rank holds {error.args[0]}") from error
        return self._known[pattern]


def _deliveries(parcels: Sequence[Parcel], router: Router) -> Iterator[Delivery]:
    for parcel in parcels:
        for atom in parcel.atoms:
            nbytes = atom.box.size * parcel.spec.dtype.itemsize
            yield Delivery(parcel.spec, atom, router.routes(atom, nbytes))


def _parcels(spec: TensorSpec, atoms: Sequence[Atom], limit: int) -> Iterator[Parcel]:
    """Yields the fewest parcels of at most `limit` bytes, each with its share of every atom.

    A share of each, so that all holders have something to send in every round. A parcel has a line
    of an atom at least, whatever the limit.
    """
    most = max((atom.box.shape[0] for atom in atoms), default=0)
    count = max(1, sum(atom.box.size for atom in atoms) * spec.dtype.itemsize // limit)
    while count < most and _largest(atoms, count) * spec.dtype.itemsize > limit:
        count += 1
    for number in range(count):
        shares = [(atom, atom.box.part(number, count)) for atom in atoms]
        found = tuple(replace(atom, box=share) for atom, share in shares if share)
        if found:
            yield Parcel(spec, found)


def _largest(atoms: Sequence[Atom], count: int) -> int:
    """Returns the most elements that one of `count` parcels may hold."""
    return sum(
        -(-atom.box.shape[0] // count) * (atom.box.size // atom.box.shape[0]) for atom in atoms
    )


def _places(regions: Sequence[Region], box: Box) -> tuple[Region, ...]:
    """Returns every part of the regions that lies at `box`, an atom of their tensor."""
    return tuple(region.narrow(box) for region in regions if region.box.intersect(box))


def _by_tensor(stores: Sequence[Sequence[Region]]) -> Stores:
    found: defaultdict[str, dict[int, list[Region]]] = defaultdict(dict)
    for rank, regions in enumerate(stores):
        for region in regions:
            found[region.tensor].setdefault(rank, []).append(region)
    return found


def group_by_bytes(things: Sequence[Sized], limit: int) -> Iterator[tuple[Sized, ...]]:
    """Yields runs of things of at most `limit` bytes; a larger one comes alone."""
    group: list[Sized] = []
    total = 0
    for thing in things:
        if group and total + thing.nbytes > limit:
            yield tuple(group)
            group, total = [], 0
        group.append(thing)
        total += thing.nbytes
    if group:
        yield tuple(group)
