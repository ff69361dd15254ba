"""How much cache the engines of a run get on its own GPUs, found out once its models are there."""

from __future__ import annotations

import torch

from megatron_oreal.config.schema import Config
from megatron_oreal.models.registry import read_model
from megatron_oreal.parallel import topology
from megatron_oreal.parallel.collectives import agree, all_gather_bytes, world_size
from megatron_oreal.planner.engine_memory import FreeMemory, cache_bytes, check_fp8
from megatron_oreal.planner.memory import resident_models


def agree_on_cache(config: Config, trains: bool) -> int | None:
    """Returns the bytes of each rank's cache, alike everywhere; collective over the world.

    The fullest GPU decides: engines of one size keep pace with each other. None on a CPU.

    Args:
        config: The run.
        trains: Whether policy and token_rm are in these ranks, and have yet to take memory.

    Raises:
        UserError: A GPU has no room for an engine, or no FP8 where it is asked for; on every rank.
    """
    with agree():
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "a CPU"
        capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else None
        check_fp8(config, device, capability)
    if not torch.cuda.is_available():
        return None
    with agree():
        _, dims = read_model(config.model.path)
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info()
        to_come = 0
        if trains:
            stage = topology.current().pp_rank
            planned = resident_models(config, dims, world_size(), stage)
            to_come = max(0, sum(planned.values()) - torch.cuda.memory_allocated())
        found = cache_bytes(config, dims, FreeMemory(free, total, to_come))
    return min(int(text) for text in all_gather_bytes(str(found).encode()))
