"""What AdamW remembers of each parameter, whichever of Megatron's optimizers keeps it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

MOMENTS = ("exp_avg", "exp_avg_sq")


class OptimizerShard(NamedTuple):
    """This rank's share of a parameter: its flattened elements from `start` on.

    `tensors` are live and fp32, `[length of the share]`: the `weight` as the optimizer keeps it
    and, once it has taken a step, its two `MOMENTS`.
    """

    start: int
    tensors: dict[str, torch.Tensor]


def optimizer_shards(
    optimizer: MegatronOptimizer, parameters: Mapping[str, torch.nn.Parameter]
) -> dict[str, OptimizerShard]:
    """Returns this rank's shares by the parameter's name; not collective.

    Under the distributed optimizer the data-parallel ranks have different shares, and a rank may
    have none of a parameter; else each has the whole.
    """
    shards = {}
    for part in _parts(optimizer):
        state = part.optimizer.state
        for name, kept, start in _kept_weights(part, parameters):
            moments = {key: state[kept][key] for key in MOMENTS if key in state[kept]}
            tensors = {"weight": kept, **moments}
            flat = {key: tensor.detach().view(-1) for key, tensor in tensors.items()}
            shards[name] = OptimizerShard(start, flat)
    return shards


def steps_taken(optimizer: MegatronOptimizer) -> int:
    """Returns how many steps this rank has seen, 0 where it has no share of any parameter."""
    steps = [0]
    for part in _parts(optimizer):
        # torch counts in each parameter's state, Transformer Engine in each group.
        steps += [int(state["step"]) for state in part.optimizer.state.values() if "step" in state]
        steps += [group["step"] for group in part.optimizer.param_groups if "step" in group]
    return max(steps)


def set_steps_taken(optimizer: MegatronOptimizer, steps: int) -> None:
    """Puts an optimizer that has taken none after so many steps, the moments still zero.

    The moments exist afterwards and are to be filled in. With `steps` 0 it does nothing: an
    optimizer that has taken no step has no moments.
    """
    if not steps:
        return
    for part in _parts(optimizer):
        part.init_state_fn(part.optimizer, part.config)
        if isinstance(part.optimizer, torch.optim.Adam):
            for state in part.optimizer.state.values():
                state["step"] = torch.tensor(float(steps))
        else:
            for group in part.optimizer.param_groups:
                group["step"] = steps


def _parts(optimizer: MegatronOptimizer) -> list[Any]:
    """Returns the optimizers that a chained one stands for, or the one itself."""
    return getattr(optimizer, "chained_optimizers", [optimizer])


def _kept_weights(
    part: Any, parameters: Mapping[str, torch.nn.Parameter]
) -> Iterator[tuple[str, torch.Tensor, int]]:
    """Yields name, the tensor that is optimized in the parameter's place, where its share starts.

    That tensor is the parameter itself or a view of it in fp32, and a copy in fp32 of a bf16 one.
    """
    if isinstance(part, DistributedOptimizer):
        names = {id(parameter): name for name, parameter in parameters.items()}
        for parameter, (group, order) in part.model_param_group_index_map.items():
            kept = part.optimizer.param_groups[group]["params"][order]
            share = part._get_model_param_range_map(parameter)["param"]
            yield names[id(parameter)], kept, share.start
        return
    kept_names = {}
    for name, parameter in parameters.items():
        copied = getattr(parameter, "main_param", None)
        kept_names[id(parameter if copied is None else copied)] = name
    for group in part.optimizer.param_groups:
        for kept in group["params"]:
            yield kept_names[id(kept)], kept, 0
