"""How much of a GPU is an engine's cache, of what the models of a run leave free; pure."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_oreal.config.errors import UserError
from megatron_oreal.planner.hardware import GIB
from megatron_oreal.planner.memory import engine_parts, kv_bytes

if TYPE_CHECKING:
    from megatron_oreal.config.schema import Config
    from megatron_oreal.planner.sizes import Dims

KEPT_BACK = GIB  # for communicators that are not there yet, and for fragments
_BLOCK = 16  # tokens of the cache that vLLM gives out at a time; one more block stays empty


@dataclass(frozen=True)
class FreeMemory:
    """Bytes of a GPU as `mem_get_info` gives them, and of what training has yet to take and keep.

    `to_come` is gradients and optimizer states that are planned and not allocated so far.
    """

    free: int
    total: int
    to_come: int = 0


def cache_bytes(config: Config, dims: Dims, memory: FreeMemory) -> int:
    """Returns the bytes of the cache of an engine's rank on this GPU.

    They are what `rollout.gpu_memory_utilization`, or less where less is free, leaves beside the
    engine's weights, work space and CUDA graphs.

    Raises:
        UserError: It would not hold one sequence of `sampling.max_total_tokens`, or the engine
            does not fit; says by how much, and what to change.
    """
    share = config.rollout.gpu_memory_utilization
    asked, left = int(share * memory.total), memory.free - memory.to_come - KEPT_BACK
    taken = sum(engine_parts(config, dims).values())
    sequence = _sequence_bytes(config, dims)
    cache = min(asked, left) - taken
    if cache >= sequence:
        return cache
    needed = taken + sequence
    why = f"needs {_gib(needed)} GiB ({_shown(config, dims)}), and gets"
    if needed > left:
        raise UserError(
            f"rollout.gpu_memory_utilization={share}: the engine {why} {_gib(max(left, 0))}: of"
            f" {_gib(memory.total)} GiB {_gib(memory.free)} are free, {_gib(memory.to_come)} of"
            " them the training's; raise rollout.tensor_parallel, parallel.tensor or"
            " parallel.pipeline, or lower sampling.max_total_tokens"
        )
    fits = math.ceil(100 * needed / memory.total) / 100
    raise UserError(
        f"rollout.gpu_memory_utilization={share}: the engine {why} {_gib(asked)} of"
        f" {_gib(memory.total)} GiB; set {fits:.2f} or more, raise rollout.tensor_parallel, or"
        " lower sampling.max_total_tokens"
    )


def _sequence_bytes(config: Config, dims: Dims) -> int:
    blocks = math.ceil(config.sampling.max_total_tokens / _BLOCK) + 1
    return blocks * _BLOCK * kv_bytes(config, dims)


def _shown(config: Config, dims: Dims) -> str:
    parts = {part: size for part, size in engine_parts(config, dims).items() if size}
    parts[f"one sequence of {config.sampling.max_total_tokens} tokens"] = _sequence_bytes(
        config, dims
    )
    return ", ".join(f"{part} {_gib(size)}" for part, size in parts.items())


def _gib(size: int) -> str:
    return f"{size / GIB:.1f}"
