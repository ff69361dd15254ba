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
from megatron_oreal.parallel.bandwidth import Rate, rates
from megatron_oreal.parallel.collectives import all_gather_bytes, barrier, world_rank, world_size
from megatron_oreal.parallel.cuda_on_cpu import has_gpu

CLOCK_SKEW_S = 0.5  # above it, logs of ranks cannot be laid beside each other
# Bus bandwidth in bytes a second below which a network is not what a GPU machine's should be:
# half of what an A100's NVLink reaches, and of one card of 200 Gb/s a GPU.
IN_NODE, ACROSS_NODES = 115e9, 10e9
_AREA = "ranks"
_ONE_ENVIRONMENT = "versions differ: install the same everywhere, from one environment or image"
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
        *differences([values for _, values in gathered], hosts),
        *rate_findings(*rates(hosts), gpus=has_gpu()),
    ]


def rate_findings(within: Rate | None, across: Rate | None, *, gpus: bool) -> list[Finding]:
    """Judges what an all-reduce came to within nodes, and over all of them; pure."""
    findings = []
    for where, rate, least, says in (
        ("in a node", within, IN_NODE, "slower than NVLink: see GPU links above"),
        ("across nodes", across, ACROSS_NODES, "slower than InfiniBand: NCCL_DEBUG=INFO says why"),
    ):
        if rate is not None:
            slow = gpus and rate.bytes_per_s < least
            found = (
                f"{rate.bytes_per_s / 1e9:.2f} GB/s, {rate.nbytes >> 20} MiB over {rate.ranks}"
                f" ranks, {'NCCL' if gpus else 'gloo'}"
            )
            level = Level.NOTE if slow else Level.FINE
            name = f"all-reduce {where}"
            findings.append(Finding(_AREA, name, level, found, says if slow else ""))
    return findings


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


def differences(environments: Sequence[Mapping[str, str]], hosts: Sequence[str]) -> list[Finding]:
    """Names what ranks do not agree on, with the ranks of each value; pure.

    Versions that differ fail the examination: a run refuses to start on them.
    """
    findings = []
    for name in sorted({name for values in environments for name in values}):
        ranks: dict[str, list[int]] = defaultdict(list)
        for rank, values in enumerate(environments):
            ranks[values.get(name, "not set")].append(rank)
        if len(ranks) > 1:
            found = "; ".join(
                f"{value} on {_shown(where, hosts)}" for value, where in ranks.items()
            )
            is_package = name in TESTED or name in VLLM
            level = Level.MISSING if is_package else Level.NOTE
            says = _ONE_ENVIRONMENT if is_package else "ranks differ: set it alike on all nodes"
            findings.append(Finding(_AREA, name, level, found, says))
    return findings or [Finding(_AREA, "environments", Level.FINE, "alike")]


def _shown(ranks: Sequence[int], hosts: Sequence[str]) -> str:
    few = 4
    shown = ", ".join(map(str, ranks[:few])) + (", ..." if len(ranks) > few else "")
    return f"rank {shown} ({hosts[ranks[0]]})"


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
