"""Where this process stands in the layout; the only user of Megatron's parallel_state."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import cast

import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from megatron_oreal.parallel.context import SequenceCut
from megatron_oreal.parallel.cuda_on_cpu import cuda_on_cpu


@dataclass(frozen=True)
class Topology:
    """The coordinates of this rank and the process groups that the models talk over."""

    tp_rank: int
    tp_size: int
    pp_rank: int
    pp_size: int
    vpp_size: int
    dp_rank: int
    dp_size: int
    cp_rank: int
    cp_size: int
    tp_group: dist.ProcessGroup
    pp_group: dist.ProcessGroup
    cp_group: dist.ProcessGroup

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank holds the head."""
        return self.pp_rank == self.pp_size - 1

    def has_embedding(self, stage: int) -> bool:
        """Whether a stage of this rank, of which it has `vpp_size`, is the first of all."""
        return self.pp_rank == 0 and stage == 0

    def has_head(self, stage: int) -> bool:
        """Whether a stage of this rank is the last of all."""
        return self.is_last_stage and stage == self.vpp_size - 1

    @property
    def reports_scores(self) -> bool:
        """Whether this rank hands out the per-token results of the tokens it holds."""
        return self.is_last_stage and self.tp_rank == 0

    @property
    def micro_batch_multiple(self) -> int:
        """What the number of micro-batches of a step is a multiple of: interleaving asks for it."""
        return self.pp_size if self.vpp_size > 1 else 1

    @property
    def cut(self) -> SequenceCut:
        """Which tokens of a packed batch this rank holds."""
        return SequenceCut(self.tp_size, self.cp_size, self.cp_rank)


def initialize(
    tensor: int = 1,
    pipeline: int = 1,
    context: int = 1,
    virtual_pipeline: int = 1,
    *,
    seed: int = 1,
    timeout_s: float = 1800.0,
) -> Topology:
    """Builds Megatron's process groups; collective over the world.

    Data parallelism fills what tensor * pipeline * context leaves of the world. Each rank has
    `virtual_pipeline` stages of the pipeline. An exchange of theirs fails after `timeout_s`.
    """
    with cuda_on_cpu():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=tensor,
            pipeline_model_parallel_size=pipeline,
            virtual_pipeline_model_parallel_size=virtual_pipeline if virtual_pipeline > 1 else None,
            context_parallel_size=context,
            distributed_timeout_minutes=math.ceil(timeout_s / 60),
        )
        model_parallel_cuda_manual_seed(seed)
    return current()


def current() -> Topology:
    """Returns this rank's coordinates; not collective.

    Raises:
        AssertionError: Megatron's groups are not initialised.
    """
    return Topology(
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        tp_size=parallel_state.get_tensor_model_parallel_world_size(),
        pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
        pp_size=parallel_state.get_pipeline_model_parallel_world_size(),
        vpp_size=parallel_state.get_virtual_pipeline_model_parallel_world_size() or 1,
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp_size=parallel_state.get_data_parallel_world_size(),
        cp_rank=parallel_state.get_context_parallel_rank(),
        cp_size=parallel_state.get_context_parallel_world_size(),
        tp_group=cast("dist.ProcessGroup", parallel_state.get_tensor_model_parallel_group()),
        pp_group=cast("dist.ProcessGroup", parallel_state.get_pipeline_model_parallel_group()),
        cp_group=cast("dist.ProcessGroup", parallel_state.get_context_parallel_group()),
    )


def destroy() -> None:
    """Ends Megatron's process groups; every rank must do it at the same point.

    Megatron itself only forgets them: gloo's threads would go on, and spin.
    """
    for group in parallel_state._global_process_group_list or ():
        if group is not None:  # None stands for the world, which stays
            dist.destroy_process_group(group)
    parallel_state.destroy_model_parallel()
