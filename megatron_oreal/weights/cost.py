"""What a plan costs: bytes by how far they travel, the least that could do, memory on the way."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_oreal.weights.plan import Plan, Round

_MIB = 1 << 20


@dataclass(frozen=True)
class PlanSummary:
    """Bytes, ranks, rounds; `lower_bound_across_nodes` is what nodes want and do not hold.

    `peak_staging` is the largest total of the packed buffers that any rank has at one time,
    relayed bytes included; `busiest_*` are of one rank, or of one node to and from others.
    """

    ranks: int
    nodes: int
    rounds: int
    messages: int
    bytes_local: int
    bytes_in_node: int
    bytes_across_nodes: int
    lower_bound_across_nodes: int
    busiest_rank_sends: int
    busiest_rank_receives: int
    busiest_node_sends: int
    busiest_node_receives: int
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
        """Returns all numbers by name, bytes as integers."""
        return {**asdict(self), "ratio": self.ratio}

    def table(self) -> str:
        """Returns the numbers as aligned lines for people."""
        lines = [
            ("ranks, nodes", f"{self.ranks}, {self.nodes}"),
            ("rounds", f"{self.rounds} of up to {_mib(self.largest_round)} of whole tensors"),
            ("messages", str(self.messages)),
            ("stay on their rank", _mib(self.bytes_local)),
            ("within nodes", _mib(self.bytes_in_node)),
            ("across nodes", _mib(self.bytes_across_nodes)),
            ("  at least", f"{_mib(self.lower_bound_across_nodes)} (ratio {self.ratio:.3f})"),
            ("busiest node sends", _mib(self.busiest_node_sends)),
            ("busiest node receives", _mib(self.busiest_node_receives)),
            ("busiest rank sends", _mib(self.busiest_rank_sends)),
            ("busiest rank receives", _mib(self.busiest_rank_receives)),
            ("peak staging of a rank", _mib(self.peak_staging)),
        ]
        return "\n".join(f"{name:<24}{value}" for name, value in lines)


def summarise(plan: Plan) -> PlanSummary:
    """Returns what a plan costs; pure."""
    nodes = plan.nodes
    local = in_node = across = least = messages = peak = 0
    sent, received = Counter[int](), Counter[int]()
    node_sent, node_received = Counter[int](), Counter[int]()
    for round_ in plan.rounds:
        pairs = set()
        for delivery in round_.deliveries:
            nbytes = delivery.nbytes
            lacking = {nodes[r] for r in delivery.atom.wanters}
            lacking -= {nodes[r] for r in delivery.atom.holders}
            least += nbytes * len(lacking)
            for route in delivery.routes:
                if route.source == route.target:
                    local += nbytes
                    continue
                pairs.add(route)
                sent[route.source] += nbytes
                received[route.target] += nbytes
                here, there = nodes[route.source], nodes[route.target]
                if here == there:
                    in_node += nbytes
                else:
                    across += nbytes
                    node_sent[here] += nbytes
                    node_received[there] += nbytes
        messages += len(pairs)
        peak = max(peak, _peak_staging(round_))
    return PlanSummary(
        ranks=len(nodes),
        nodes=len(set(nodes)),
        rounds=len(plan.rounds),
        messages=messages,
        bytes_local=local,
        bytes_in_node=in_node,
        bytes_across_nodes=across,
        lower_bound_across_nodes=least,
        busiest_rank_sends=_most(sent),
        busiest_rank_receives=_most(received),
        busiest_node_sends=_most(node_sent),
        busiest_node_receives=_most(node_received),
        largest_round=max((sum(s.nbytes for s in r.tensors) for r in plan.rounds), default=0),
        peak_staging=peak,
    )


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


def _most(counts: Counter[int]) -> int:
    return max(counts.values(), default=0)


def _mib(nbytes: int) -> str:
    return f"{nbytes / _MIB:,.1f} MiB"
