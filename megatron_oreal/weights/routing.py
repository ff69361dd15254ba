"""Who serves whom: tensors cut into atoms, and for each atom the sources that cost least.

An atom lies wholly within or wholly outside of every box that a rank holds or wants, so that one
rank either has all of it or nothing.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from megatron_oreal.weights.geometry import Box

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    Boxes = Mapping[int, Sequence[Box]]  # of one tensor, by rank


class Route(NamedTuple):
    """One delivery of an atom; a relay passes on what it was itself sent, in a second phase."""

    source: int
    target: int
    is_relay: bool = False


@dataclass(frozen=True, slots=True)
class Atom:
    """A box of a tensor, the ranks that hold it and those that want it, each in order."""

    box: Box
    holders: tuple[int, ...]
    wanters: tuple[int, ...]


def cut_into_atoms(shape: tuple[int, ...], held: Boxes, wanted: Boxes) -> list[Atom]:
    """Returns disjoint atoms that cover all that is wanted; pure and deterministic.

    Raises:
        LookupError: No rank holds some box that is wanted; its argument is the box.
    """
    holders, wanters = _ranks_by_box(held), _ranks_by_box(wanted)
    parts = [Box.whole(shape)]
    for box in sorted(holders.keys() | wanters.keys()):
        parts = [piece for part in parts for piece in _split(part, box)]
    atoms = []
    for part in sorted(parts):
        atom = Atom(part, _ranks_around(part, holders), _ranks_around(part, wanters))
        if atom.wanters and not atom.holders:
            raise LookupError(part)
        if atom.wanters:
            atoms.append(atom)
    return atoms


def _ranks_by_box(boxes: Boxes) -> dict[Box, list[int]]:
    found: defaultdict[Box, list[int]] = defaultdict(list)
    for rank, held in boxes.items():
        for box in held:
            found[box].append(rank)
    return found


def _split(part: Box, box: Box) -> list[Box]:
    common = part.intersect(box)
    return [common, *part.subtract(common)] if common else [part]


def _ranks_around(part: Box, ranks: Mapping[Box, Sequence[int]]) -> tuple[int, ...]:
    around = {rank for box, found in ranks.items() if box.intersect(part) for rank in found}
    return tuple(sorted(around))


@dataclass
class Router:
    """Chooses sources: the rank itself, else its node, else another node; the least busy of them.

    What a node lacks enters it once, at one of the ranks that want it, which relays it to the
    others. `nodes[r]` is the node of rank r. The same calls give the same routes.
    """

    nodes: Sequence[int]
    _in_node: defaultdict[int, int] = field(default_factory=lambda: defaultdict(int))
    _across: defaultdict[int, int] = field(default_factory=lambda: defaultdict(int))
    _node_across: defaultdict[int, int] = field(default_factory=lambda: defaultdict(int))
    _entered: defaultdict[int, int] = field(default_factory=lambda: defaultdict(int))

    def routes(self, atom: Atom, nbytes: int) -> tuple[Route, ...]:
        """Returns one route to each rank that wants the atom, and counts its bytes."""
        return tuple(self._routes(atom, nbytes))

    def _routes(self, atom: Atom, nbytes: int) -> Iterator[Route]:
        holders = set(atom.holders)
        at_home = self._by_node(atom.holders)
        for node, wanters in self._by_node(atom.wanters).items():
            yield from (Route(rank, rank) for rank in wanters if rank in holders)
            lacking = [rank for rank in wanters if rank not in holders]
            if not lacking:
                continue
            if node in at_home:
                for rank in lacking:
                    yield Route(self._neighbour(at_home[node], nbytes), rank)
            else:
                yield from self._enter(atom, lacking, nbytes)

    def _enter(self, atom: Atom, wanters: list[int], nbytes: int) -> Iterator[Route]:
        """Yields the way into a node that has nothing of the atom, and on to the other wanters."""
        gate = min(wanters, key=lambda rank: (self._entered[rank], rank))
        source = min(
            atom.holders,
            key=lambda rank: (self._node_across[self.nodes[rank]], self._across[rank], rank),
        )
        self._entered[gate] += nbytes
        self._across[source] += nbytes
        self._node_across[self.nodes[source]] += nbytes
        yield Route(source, gate)
        for rank in wanters:
            if rank != gate:
                self._in_node[gate] += nbytes
                yield Route(gate, rank, is_relay=True)

    def _neighbour(self, holders: Sequence[int], nbytes: int) -> int:
        source = min(holders, key=lambda rank: (self._in_node[rank], rank))
        self._in_node[source] += nbytes
        return source

    def _by_node(self, ranks: Iterable[int]) -> dict[int, list[int]]:
        found: dict[int, list[int]] = {}
        for rank in ranks:
            found.setdefault(self.nodes[rank], []).append(rank)
        return found
