"""What only several ranks can show: clocks that disagree, environments that differ."""

from __future__ import annotations

import os
import statistics
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence

import msgspec

from megatron_oreal.doctor.packages import TESTED, VLLM, installed
from megatron_oreal.doctor.report import Finding, Level
from megatron_oreal.doctor.variables import shared_variables
from megatron_oreal.parallel.collectives import all_gather_bytes, barrier, world_rank, world_size

CLOCK_SKEW_S = 0.5  # above it, logs of ranks cannot be laid beside each other
_AREA = "ranks"
_ROUNDS = 7


def check_ranks(host: str) -> list[Finding]:
    """Compares all ranks; collective over the world, the same result on each."""
    mine = shared_variables(os.environ) | {
        name: installed(name) or "not installed" for name in (*TESTED, *VLLM)
    }
    payload = msgspec.json.encode((host, mine))
    gathered = [
        msgspec.json.decode(part, type=tuple[str, dict[str, str]])
        for part in all_gather_bytes(payload)
    ]
    hosts = [name for name, _ in gathered]
    ranks = f"{world_size()} on {len(set(hosts))} hosts"
    return [
        Finding(_AREA, "world", Level.FINE, ranks),
        clock_finding(_offsets(), hosts),
        *differences([values for _, values in gathered]),
    ]


def gather_findings(findings: Sequence[Finding]) -> list[Finding]:
    """Returns rank 0's findings and those of other ranks that are not also rank 0's.

    Collective over the world. Two that differ in what was measured alone are the same.
    """
    parts = all_gather_bytes(msgspec.json.encode(list(findings)))
    all_findings = [msgspec.json.decode(part, type=list[Finding]) for part in parts]
    first = {(finding.name, finding.level) for finding in all_findings[0]}
    others = [
        finding
        for part in all_findings[1:]
        for finding in part
        if (finding.name, finding.level) not in first and finding.level is not Level.FINE
    ]
    return [*(msgspec.structs.replace(f, where="") for f in all_findings[0]), *others]


def clock_finding(offsets: Sequence[float], hosts: Sequence[str]) -> Finding:
    """Judges how far the ranks' clocks, in seconds, are from rank 0's; pure."""
    worst = max(range(len(offsets)), key=lambda rank: abs(offsets[rank]))
    skew = abs(offsets[worst])
    found = f"within {skew * 1e3:.1f} ms"
    if skew <= CLOCK_SKEW_S:
        return Finding(_AREA, "clocks", Level.FINE, found)
    says = f"rank {worst} on {hosts[worst]} is {offsets[worst]:+.1f} s off: start chrony or ntpd"
    return Finding(_AREA, "clocks", Level.NOTE, found, says)


def differences(environments: Sequence[Mapping[str, str]]) -> list[Finding]:
    """Names what ranks do not agree on, with the ranks of each value; pure."""
    findings = []
    for name in sorted({name for values in environments for name in values}):
        ranks: dict[str, list[int]] = defaultdict(list)
        for rank, values in enumerate(environments):
            ranks[values.get(name, "not set")].append(rank)
        if len(ranks) > 1:
            found = "; ".join(f"{value} on {_shown(where)}" for value, where in ranks.items())
            says = "ranks differ: set it alike on all nodes"
            findings.append(Finding(_AREA, name, Level.NOTE, found, says))
    return findings or [Finding(_AREA, "environments", Level.FINE, "alike")]


def _shown(ranks: Sequence[int]) -> str:
    few = 4
    return "rank " + ", ".join(map(str, ranks[:few])) + (", ..." if len(ranks) > few else "")


def _offsets() -> list[float]:
    """Returns how far each rank's clock is from rank 0's, in seconds; collective over the world.

    Ranks leave a barrier together but for the network's delay: the median of a few says the rest.
    """
    readings = []
    for _ in range(_ROUNDS):
        barrier()
        readings.append(time.time())
    parts = all_gather_bytes(msgspec.json.encode(readings))
    clocks = [msgspec.json.decode(part, type=list[float]) for part in parts]
    return [
        statistics.median(mine - first for mine, first in zip(clock, clocks[0], strict=True))
        for clock in clocks
    ]


def speaks_for_its_node() -> bool:
    """Whether this rank looks at its machine, for the others there; not collective."""
    return os.environ.get("LOCAL_RANK", str(world_rank())) == "0"
