"""What a plan costs: bytes by how far they travel, the least that could do, memory on the way."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from megatron_oreal.weights.plan import Delivery, Plan, Round
    from megatron_oreal.weights.routing import Route

    Distance = Literal["local", "in_node", "across_nodes"]

_MIB = 1 << 20


@dataclass(frozen=True)
class Load:
    """Bytes at the busiest place and in the mean over places."""

    largest: int
    mean: float


@dataclass(frozen=True)
class PlanSummary:
    """Bytes, ranks, rounds; `lower_bound_across_nodes` is what nodes want and do not hold.

    `rank_local`, `rank_in_node` and `rank_across_nodes` are what a rank gets from itself, from its
    node and from others; `rank_sends` and `rank_receives` what leaves and enters it. `node_sends`
    and `node_receives` are to and from other nodes, their means over the nodes that must: those
    that hold what another lacks, or lack something. `largest_round` is one copy of what travels in
    it. `peak_staging` is the largest total of the packed buffers that any rank has at one time,
    relayed bytes included.
    """

    ranks: int
    nodes: int
    rounds: int
    messages: int
    bytes_local: int
    bytes_in_node: int
    bytes_across_nodes: int
    lower_bound_across_nodes: int
    rank_local: Load
    rank_in_node: Load
    rank_across_nodes: Load
    rank_sends: Load
    rank_receives: Load
    node_sends: Load
    node_receives: Load
    largest_round: int
    peak_staging: int

    @property
    def bytes_moved(self) -> int:
        """Bytes that leave their rank."""
        return self.bytes_in_node + self.bytes_across_nodes

    @property
    def ratio(self) -> float:
        """Bytes across nodes over the least possible; 1 where nothing has to cross."""
        least = self.lower_bound_across_nodes
        return self.bytes_across_nodes / least if least else 1.0

    def as_dict(self) -> dict[str, Any]:
        """Returns all numbers by name, bytes as integers but for means."""
        return {**asdict(self), "ratio": self.ratio}

    def table(self) -> str:
        """Returns the numbers as aligned lines for people."""
        lines = [
            ("ranks, nodes", f"{self.ranks}, {self.nodes}"),
            ("rounds", f"{self.rounds} of up to {_mib(self.largest_round)}"),
            ("messages", str(self.messages)),
            ("stay on their rank", _mib(self.bytes_local)),
            ("  of one rank", _shown(self.rank_local)),
            ("within nodes", _mib(self.bytes_in_node)),
            ("  to one rank", _shown(self.rank_in_node)),
            ("across nodes", _mib(self.bytes_across_nodes)),
            ("  at least", f"{_mib(self.lower_bound_across_nodes)} (ratio {self.ratio:.3f})"),
            ("  to one rank", _shown(self.rank_across_nodes)),
            ("a rank sends", _shown(self.rank_sends)),
            ("a rank receives", _shown(self.rank_receives)),
            ("a node sends", _shown(self.node_sends)),
            ("a node receives", _shown(self.node_receives)),
            ("peak staging of a rank", _mib(self.peak_staging)),
        ]
        return "\n".join(f"{name:<24}{value}" for name, value in lines)


def summarise(plan: Plan) -> PlanSummary:
    """Returns what a plan costs; pure."""
    ledger = _Ledger(plan.nodes)
    for round_ in plan.rounds:
        for delivery in round_.deliveries:
            ledger.count(delivery)
    ranks, got = range(len(plan.nodes)), ledger.got
    return PlanSummary(
        ranks=len(plan.nodes),
        nodes=len(set(plan.nodes)),
        rounds=len(plan.rounds),
        messages=sum(_messages(round_) for round_ in plan.rounds),
        bytes_local=got["local"].total(),
        bytes_in_node=got["in_node"].total(),
        bytes_across_nodes=got["across_nodes"].total(),
        lower_bound_across_nodes=ledger.least,
        rank_local=_load(got["local"], ranks),
        rank_in_node=_load(got["in_node"], ranks),
        rank_across_nodes=_load(got["across_nodes"], ranks),
        rank_sends=_load(ledger.sent, ranks),
        rank_receives=_load(got["in_node"] + got["across_nodes"], ranks),
        node_sends=_load(ledger.node_sent, ledger.must_send),
        node_receives=_load(ledger.node_received, ledger.must_receive),
        largest_round=max((sum(d.nbytes for d in r.deliveries) for r in plan.rounds), default=0),
        peak_staging=max((_peak_staging(round_) for round_ in plan.rounds), default=0),
    )


@dataclass
class _Ledger:
    """Bytes by rank and by node; `got` by the distance they came."""

    nodes: Sequence[int]
    least: int = 0
    got: defaultdict[Distance, Counter[int]] = field(default_factory=lambda: defaultdict(Counter))
    sent: Counter[int] = field(default_factory=Counter)
    node_sent: Counter[int] = field(default_factory=Counter)
    node_received: Counter[int] = field(default_factory=Counter)
    must_send: set[int] = field(default_factory=set)
    must_receive: set[int] = field(default_factory=set)

    def count(self, delivery: Delivery) -> None:
        nbytes = delivery.nbytes
        holding = {self.nodes[rank] for rank in delivery.atom.holders}
        lacking = {self.nodes[rank] for rank in delivery.atom.wanters} - holding
        if lacking:
            self.least += nbytes * len(lacking)
            self.must_send |= holding
            self.must_receive |= lacking
        for route in delivery.routes:
            self._count_route(route, nbytes)

    def _count_route(self, route: Route, nbytes: int) -> None:
        if route.source == route.target:
            self.got["local"][route.target] += nbytes
            return
        self.sent[route.source] += nbytes
        here, there = self.nodes[route.source], self.nodes[route.target]
        self.got["in_node" if here == there else "across_nodes"][route.target] += nbytes
        if here != there:
            self.node_sent[here] += nbytes
            self.node_received[there] += nbytes


def _messages(round_: Round) -> int:
    """Returns how many packed buffers travel."""
    routes = {route for delivery in round_.deliveries for route in delivery.routes}
    return sum(route.source != route.target for route in routes)


def _peak_staging(round_: Round) -> int:
    """Returns the most that a rank's packed buffers hold: what it was sent lasts until relayed."""
    direct_out, direct_in = Counter[int](), Counter[int]()
    relayed = Counter[int]()
    for delivery in round_.deliveries:
        for route in delivery.routes:
            if route.source == route.target:
                continue
            if route.is_relay:
                relayed[route.source] += delivery.nbytes
                relayed[route.target] += delivery.nbytes
            else:
                direct_out[route.source] += delivery.nbytes
                direct_in[route.target] += delivery.nbytes
    ranks = direct_out.keys() | direct_in.keys() | relayed.keys()
    totals = (direct_in[rank] + max(direct_out[rank], relayed[rank]) for rank in ranks)
    return max(totals, default=0)


def _load(counts: Counter[int], places: Collection[int]) -> Load:
    return Load(max(counts.values(), default=0), counts.total() / max(1, len(places)))


def _shown(load: Load) -> str:
    return f"at most {_mib(load.largest)}, mean {_mib(load.mean)}"


def _mib(nbytes: float) -> str:
    return f"{nbytes / _MIB:,.1f} MiB"
