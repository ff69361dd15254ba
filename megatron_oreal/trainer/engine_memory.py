"""A run's plan on its own GPUs: the cache that its engines get, and the memory of each phase."""

from __future__ import annotations

import torch

from megatron_oreal.config.device import check_engine_device
from megatron_oreal.config.schema import Config
from megatron_oreal.models.kernels import device_here, kernels_for
from megatron_oreal.models.registry import read_model
from megatron_oreal.monitor.device_memory import DeviceMemory
from megatron_oreal.parallel import topology
from megatron_oreal.parallel.collectives import agree, all_gather_bytes, world_size
from megatron_oreal.planner.engine_memory import FreeMemory, cache_bytes
from megatron_oreal.planner.hardware import GIB, Cluster, Gpu
from megatron_oreal.planner.memory import plan_stage, planned_phases
from megatron_oreal.planner.models import resident_models
from megatron_oreal.trainer.journal import Journal


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
        check_engine_device(config, device_here())
    if not torch.cuda.is_available():
        return None
    with agree():
        _, dims = read_model(config.model.path)
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info()
        to_come = 0
        if trains:
            stage = topology.current().pp_rank
            planned = resident_models(config, dims, world_size(), stage, "generate")
            to_come = max(0, sum(planned.values()) - torch.cuda.memory_allocated())
        found = cache_bytes(config, dims, FreeMemory(free, total, to_come))
    return min(int(text) for text in all_gather_bytes(str(found).encode()))


def watch_memory(config: Config, journal: Journal) -> None:
    """Plans each phase on this rank's GPU and has the journal compare; not collective.

    Does nothing on a CPU, or where engines are not in the training ranks.
    """
    if not torch.cuda.is_available() or config.rollout.backend != "vllm" or config.rollout.replay:
        return
    _, dims = read_model(config.model.path)
    gpu = Gpu(torch.cuda.get_device_name(), _device_total(), 0.0, 0.0, 0.0, 0.0)
    modules = (
        "transformer_engine" if kernels_for(config.model.precision).transformer_engine else "torch"
    )
    cluster = Cluster(gpu, world_size(), modules)
    memory = plan_stage(config, dims, cluster, topology.current().pp_rank)
    phases = {phase: f"{memory.total(phase) / GIB:.1f}" for phase in memory.phases}
    shown = ", ".join(f"{phase} {gib}" for phase, gib in phases.items())
    journal.say(f"planned, GiB of {gpu.memory / GIB:.1f}: {shown}")
    if memory.peak > gpu.memory:
        journal.say(f"phase {memory.peak_phase} may run out of memory: `megatron-oreal plan`")
    planned = planned_phases(memory, sleeps=config.rollout.sleep)
    journal.device_memory = DeviceMemory(planned, _device_used)


def _device_total() -> int:
    return torch.cuda.mem_get_info()[1]


def _device_used() -> int:
    free, total = torch.cuda.mem_get_info()
    return total - free
