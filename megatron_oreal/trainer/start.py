"""What is asked of all ranks before a command reads or builds anything."""

from __future__ import annotations

import socket
from collections.abc import Mapping

import msgspec

from megatron_oreal.checkpoint.run_state import library_versions
from megatron_oreal.config.errors import UserError
from megatron_oreal.config.schema import Config
from megatron_oreal.parallel.collectives import agree, all_gather_bytes, world_rank


def check_start(config: Config, *, judges: bool) -> None:
    """Refuses to start on ranks of unlike software, or with a judge that cannot be asked.

    Collective over the world.

    Args:
        config: The run.
        judges: Whether the command has answers judged.

    Raises:
        UserError: On every rank alike.
    """
    check_versions(library_versions(), socket.gethostname())
    if not (judges and config.judge.hosts) or config.rollout.replay:
        return
    from megatron_oreal.verify.judge_check import check_judges  # with it a client of a second

    with agree():
        if world_rank() == 0:
            check_judges(config.judge)


def check_versions(mine: Mapping[str, str], host: str) -> None:
    """Refuses ranks of different versions; collective over the world.

    Args:
        mine: Version by library, on this rank.
        host: This rank's node.

    Raises:
        UserError: Names the libraries, and for the first each version with a rank that has it.
    """
    parts = all_gather_bytes(msgspec.json.encode((host, dict(mine))))
    ranks = [msgspec.json.decode(part, type=tuple[str, dict[str, str]]) for part in parts]
    names = sorted({name for _, versions in ranks for name in versions})
    unlike = [name for name in names if len({v.get(name) for _, v in ranks}) > 1]
    if not unlike:
        return
    first: dict[str, str] = {}
    for rank, (node, versions) in enumerate(ranks):
        first.setdefault(versions.get(unlike[0], "not installed"), f"rank {rank} on {node}")
    found = ", ".join(f"{version} on {where}" for version, where in first.items())
    others = f" (and {', '.join(unlike[1:])})" if unlike[1:] else ""
    raise UserError(
        f"versions differ: {unlike[0]} is {found}{others}; install the same everywhere, from one"
        " environment or image that all nodes see: `megatron-oreal doctor` on all ranks compares"
    )
