"""The weights of a whole cluster from a model's dimensions alone: no rank, no model, no GPU."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from megatron_oreal.config.stages import layers_of_stages
from megatron_oreal.config.validate import check_engines, check_layout, check_model
from megatron_oreal.models.registry import read_model
from megatron_oreal.weights.layout import MegatronPlace, hf_regions, megatron_regions
from megatron_oreal.weights.plan import Plan, TensorSpec, make_plan
from megatron_oreal.weights.vllm_layout import vllm_regions

if TYPE_CHECKING:
    from megatron_oreal.config.schema import Config, ParallelConfig, Precision
    from megatron_oreal.models.family import Family, ModelDims, Row
    from megatron_oreal.weights.geometry import Region

_DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}
_MIB = 1 << 20


@dataclass(frozen=True)
class MegatronLayout:
    """A model on `ranks` ranks in Megatron's order: tensor parallel innermost, stages outermost.

    `parallel` must be able to cut the model, as `config.validate` checks.
    """

    family: Family
    dims: ModelDims
    ranks: int
    parallel: ParallelConfig

    @cached_property
    def stores(self) -> list[list[Region]]:
        """The regions of each rank; replicas share them."""
        parts = {
            (stage, rank): self._regions(stage, rank)
            for stage in range(self.parallel.pipeline)
            for rank in range(self.parallel.tensor)
        }
        tensor, per_stage = self.parallel.tensor, self.ranks // self.parallel.pipeline
        return [parts[rank // per_stage, rank % tensor] for rank in range(self.ranks)]

    def shapes(self, stage: int) -> dict[str, tuple[int, ...]]:
        """Returns the shapes of the parameters that each rank of a pipeline stage holds.

        Their names count layers over the whole model.
        """
        layers = self._layers(stage)
        shapes = {}
        for row in self.family.rows:
            shape = self._local_shape(row)
            name = row.megatron[0]
            if "{i}" in name:
                shapes |= {name.replace("{i}", str(layer)): shape for layer in layers}
            elif self._stands_at(row, stage):
                shapes[name] = shape
        return shapes

    def _regions(self, stage: int, rank: int) -> list[Region]:
        place = MegatronPlace(rank, self.parallel.tensor)
        return megatron_regions(self.family, self.dims, self.shapes(stage), place)

    def _stands_at(self, row: Row, stage: int) -> bool:
        """Whether a row outside the layers has a parameter of its own on this stage."""
        if row.hf[0].name == self.family.embedding:
            return stage == 0
        stages = self.parallel.pipeline
        shared = self.dims.tied_embeddings and stages == 1
        return stage == stages - 1 and not (shared and row.hf[0].name == self.family.output)

    def _local_shape(self, row: Row) -> tuple[int, ...]:
        shapes = [self.dims.shape(tensor.sizes) for tensor in row.hf]
        (lines, *others), tensor = shapes[0], self.parallel.tensor
        if row.kind == "replicated":
            return shapes[0]
        if row.kind == "row":
            return (lines, others[0] // tensor)
        return (math.ceil(sum(shape[0] for shape in shapes) / tensor), *others)

    def _layers(self, stage: int) -> list[int]:
        """Returns a stage's layers: one block of them for each virtual stage, interleaved."""
        virtual = self.parallel.virtual_pipeline
        blocks = [held // virtual for held in layers_of_stages(self.parallel, self.dims.layers)]
        starts = [turn * sum(blocks) + sum(blocks[:stage]) for turn in range(virtual)]
        return [layer for start in starts for layer in range(start, start + blocks[stage])]


def plan_sync(
    layout: MegatronLayout,
    engine_tensor: int,
    *,
    dtype: torch.dtype,
    round_bytes: int,
    ranks_per_node: int,
    whole_tensors: bool = False,
    rollout_ranks: int = 0,
) -> Plan:
    """Plans how a policy's weights reach the engines; pure.

    Args:
        layout: The policy's.
        engine_tensor: Ranks of one engine; neighbours, which fill the policy's ranks or their own.
        dtype: Precision of the weights.
        round_bytes: Bound on one copy of what travels in a round.
        ranks_per_node: Neighbours that share a node.
        whole_tensors: An engine's rank wants every tensor whole, and cuts its part out itself.
        rollout_ranks: Ranks of the engines, on nodes of their own after the policy's; 0: they are
            the policy's.
    """
    shapes = layout.family.tensors(layout.dims)
    parts = (
        [hf_regions(shapes)] * engine_tensor
        if whole_tensors
        else [
            vllm_regions(layout.family, layout.dims, rank, engine_tensor)
            for rank in range(engine_tensor)
        ]
    )
    engines = [parts[rank % engine_tensor] for rank in range(rollout_ranks or layout.ranks)]
    nodes = [rank // ranks_per_node for rank in range(layout.ranks)]
    apart = [nodes[-1] + 1 + rank // ranks_per_node for rank in range(rollout_ranks)]
    nothing: list[Region] = []
    return make_plan(
        [TensorSpec(name, shape, dtype) for name, shape in shapes.items()],
        layout.stores + [nothing] * rollout_ranks,
        [nothing] * layout.ranks + engines if rollout_ranks else engines,
        round_bytes,
        nodes + apart,
    )


def plan_of_run(
    config: Config,
    *,
    ranks: int,
    ranks_per_node: int,
    whole_tensors: bool = False,
    rollout_ranks: int = 0,
) -> Plan:
    """Plans the weight sync of a run on a cluster; only the model's `config.json` need exist.

    Engines are inside the `ranks` of the policy, or on `rollout_ranks` of their own.

    Raises:
        UserError: An impossible layout, or a folder that describes no model of a known family.
    """
    check_layout(config, ranks)
    check_engines(config, rollout_ranks)
    family, dims = read_model(config.model.path)
    check_model(config, dims)
    return plan_sync(
        MegatronLayout(family, dims, ranks, config.parallel),
        config.rollout.tensor_parallel,
        dtype=_DTYPES[config.model.precision],
        round_bytes=config.rollout.sync_round_mib * _MIB,
        ranks_per_node=ranks_per_node,
        whole_tensors=whole_tensors,
        rollout_ranks=rollout_ranks,
    )
