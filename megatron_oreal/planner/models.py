"""Bytes of policy, reference and token_rm on a rank: what is offloaded is there in its phase."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal, NamedTuple

from megatron_oreal.config.schema_precision import ROLES
from megatron_oreal.config.stages import layers_of_stages
from megatron_oreal.planner.sizes import (
    FP32,
    Dims,
    element_bytes,
    layer_matrices,
    stage_parameters,
)

if TYPE_CHECKING:
    from megatron_oreal.config.schema import Config
    from megatron_oreal.config.schema_precision import Role

Phase = Literal["generate", "reference", "token_rm", "policy", "sync"]
Parts = dict[str, int]

MOMENTS = 2 * FP32


class _Held(NamedTuple):
    """Bytes of one model on a rank while it is all there; `fp8` are rounded copies of matrices."""

    weights: int
    gradients: int
    optimizer: int
    fp8: int


def model_copies(config: Config, ranks: int) -> int:
    """How often the ranks hold each model: context-parallel ranks have copies, too."""
    return ranks // (config.parallel.tensor * config.parallel.pipeline)


def resident_models(config: Config, dims: Dims, ranks: int, stage: int, phase: Phase) -> Parts:
    """Weights, gradients and optimizers that are on a GPU in a phase; pure.

    An optimizer that comes for its step alone is in `stepping_optimizer` instead.
    """
    away = config.offload
    held: dict[Role, _Held] = {
        role: _held(config, dims, ranks, stage, role) for role in _roles(config)
    }
    leaves: dict[Role, bool] = {"reference": away.reference, "token_rm": away.token_rm}
    parts = {
        "weights": sum(
            m.weights for role, m in held.items() if role == phase or not leaves.get(role)
        ),
        "gradients": sum(
            m.gradients for role, m in held.items() if role == phase or not away.gradients
        ),
        "optimizer": 0 if away.optimizer else sum(m.optimizer for m in held.values()),
    }
    copies = sum(m.fp8 for m in held.values())
    return parts | ({"FP8 copies": copies} if copies else {})


def stepping_optimizer(config: Config, dims: Dims, ranks: int, stage: int, phase: Phase) -> int:
    """Bytes of the optimizer that is on a GPU for the step at the end of a phase alone; pure."""
    if not config.offload.optimizer:
        return 0
    stepping: list[Role] = [role for role in _roles(config) if role == phase]
    return sum(_held(config, dims, ranks, stage, role).optimizer for role in stepping)


def _roles(config: Config) -> list[Role]:
    return [r for r in ROLES if r != "token_rm" or config.oreal.token_weights.kind != "none"]


def _held(config: Config, dims: Dims, ranks: int, stage: int, role: Role) -> _Held:
    layout, size = config.parallel, element_bytes(config)
    count = stage_parameters(dims, layout, stage, "scalar" if role == "token_rm" else "vocab")
    trained = role != "reference"
    shards = model_copies(config, ranks) if layout.distributed_optimizer else 1
    # fp32 weights need no copy of theirs.
    state = MOMENTS + (FP32 if config.model.precision == "bf16" else 0)
    return _Held(
        weights=size * count,
        gradients=FP32 * count if trained else 0,
        optimizer=math.ceil(state * count / shards) if trained else 0,
        fp8=_fp8_copies(config, dims, stage, role),
    )


def _fp8_copies(config: Config, dims: Dims, stage: int, role: Role) -> int:
    """TE keeps a byte an element from a step's first micro-batch on; a second, turned, to train."""
    if config.fp8.role(role).recipe == "none":
        return 0
    layers = layers_of_stages(config.parallel, dims.layers)[stage]
    copies = 1 if role == "reference" else 2
    return copies * layers * layer_matrices(dims, config.parallel.tensor)
