"""`megatron-oreal doctor`: whether this machine, or every node of a job, can carry a run."""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING

import msgspec

from megatron_oreal.doctor.judges import check_judges
from megatron_oreal.doctor.machine import check_machine, gpu_lines
from megatron_oreal.doctor.packages import check_packages, installed
from megatron_oreal.doctor.report import Finding
from megatron_oreal.doctor.storage import check_folder, check_inputs
from megatron_oreal.doctor.variables import check_variables

if TYPE_CHECKING:
    from megatron_oreal.config.schema import Config


def examine(config: Config, *, with_inputs: bool) -> list[Finding]:
    """Looks at everything and returns the findings.

    Collective over the world where torchrun or srun started several ranks: one rank of each node
    looks at it, and every rank returns all findings.

    Args:
        config: The run that is asked about; its folder is looked at in any case.
        with_inputs: Whether its model and data should be there.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or installed("torch") is None:
        return _look(config, with_inputs=with_inputs)
    from megatron_oreal.doctor.ranks import check_ranks, gather_findings, speaks_for_its_node
    from megatron_oreal.parallel.collectives import start_world, stop_world

    start_world()
    try:
        host = socket.gethostname()
        mine = _look(config, with_inputs=with_inputs) if speaks_for_its_node() else []
        found = gather_findings([msgspec.structs.replace(f, where=host) for f in mine])
        return found + check_ranks(host)
    finally:
        stop_world()


def _look(config: Config, *, with_inputs: bool) -> list[Finding]:
    gpus = gpu_lines()
    findings = check_packages(bool(gpus)) + check_machine(gpus)
    findings += check_variables(os.environ, gpus=bool(gpus))
    if with_inputs:
        findings += check_inputs(config) + check_judges(config.judge)
    return findings + check_folder(config)
