"""The weights of a whole cluster from a model's dimensions alone: no rank, no model, no GPU."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from megatron_oreal.config.validate import check_layout, check_model
from megatron_oreal.models.registry import read_model
from megatron_oreal.weights.layout import MegatronPlace, hf_regions, megatron_regions
from megatron_oreal.weights.plan import Plan, TensorSpec, make_plan
from megatron_oreal.weights.vllm_layout import vllm_regions

if TYPE_CHECKING:
    from megatron_oreal.config.schema import Config, Precision
    from megatron_oreal.models.family import Family, ModelDims, Row
    from megatron_oreal.weights.geometry import Region

_DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}
_MIB = 1 << 20


@dataclass(frozen=True)
class MegatronLayout:
    """A model on `ranks` ranks in Megatron's order: tensor parallel innermost, stages outermost.

    Its sizes must divide the model, as `config.validate` checks.
    """

    family: Family
    dims: ModelDims
    ranks: int
    tensor: int
    pipeline: int

    @cached_property
    def stores(self) -> list[list[Region]]:
        """The regions of each rank; replicas share them."""
        parts = {
            (stage, rank): self._regions(stage, rank)
            for stage in range(self.pipeline)
            for rank in range(self.tensor)
        }
        ranks_per_stage = self.ranks // self.pipeline
        return [parts[rank // ranks_per_stage, rank % self.tensor] for rank in range(self.ranks)]

    def shapes(self, stage: int) -> dict[str, tuple[int, ...]]:
        """Returns the shapes of the parameters that each rank of a pipeline stage holds."""
        layers = self.dims.layers // self.pipeline
        shapes = {}
        for row in self.family.rows:
            shape = self._local_shape(row)
            name = row.megatron[0]
            if "{i}" in name:
                shapes |= {name.replace("{i}", str(layer)): shape for layer in range(layers)}
            elif self._stands_at(row, stage):
                shapes[name] = shape
        return shapes

    def _regions(self, stage: int, rank: int) -> list[Region]:
        place = MegatronPlace(rank, self.tensor, stage * (self.dims.layers // self.pipeline))
        return megatron_regions(self.family, self.dims, self.shapes(stage), place)

    def _stands_at(self, row: Row, stage: int) -> bool:
        """Whether a row outside the layers has a parameter of its own on this stage."""
        if row.hf[0].name == self.family.embedding:
            return stage == 0
        shared = self.dims.tied_embeddings and self.pipeline == 1
        return stage == self.pipeline - 1 and not (shared and row.hf[0].name == self.family.output)

    def _local_shape(self, row: Row) -> tuple[int, ...]:
        shapes = [self.dims.shape(tensor.sizes) for tensor in row.hf]
        lines, *others = shapes[0]
        if row.kind == "replicated":
            return shapes[0]
        if row.kind == "row":
            return (lines, others[0] // self.tensor)
        return (math.ceil(sum(shape[0] for shape in shapes) / self.tensor), *others)


def plan_sync(
    layout: MegatronLayout,
    engine_tensor: int,
    *,
    dtype: torch.dtype,
    round_bytes: int,
    ranks_per_node: int,
    whole_tensors: bool = False,
) -> Plan:
    """Plans how a policy's weights reach the engines inside its ranks; pure.

    Args:
        layout: The policy's.
        engine_tensor: Ranks of one engine; neighbours, which fill the world.
        dtype: Precision of the weights.
        round_bytes: Bound on the whole tensors of a round.
        ranks_per_node: Neighbours that share a node.
        whole_tensors: Every rank wants every tensor whole, and cuts its part out itself.
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
    return make_plan(
        [TensorSpec(name, shape, dtype) for name, shape in shapes.items()],
        layout.stores,
        [parts[rank % engine_tensor] for rank in range(layout.ranks)],
        round_bytes,
        [rank // ranks_per_node for rank in range(layout.ranks)],
    )


def plan_of_run(
    config: Config, *, ranks: int, ranks_per_node: int, whole_tensors: bool = False
) -> Plan:
    """Plans the weight sync of a run on a cluster; only the model's `config.json` need exist.

    Raises:
        UserError: An impossible layout, or a folder that describes no model of a known family.
    """
    check_layout(config, ranks)
    family, dims = read_model(config.model.path)
    check_model(
        config, heads=dims.heads, kv_heads=dims.kv_heads, layers=dims.layers, vocab=dims.vocab
    )
    parallel = config.parallel
    return plan_sync(
        MegatronLayout(family, dims, ranks, parallel.tensor, parallel.pipeline),
        config.rollout.tensor_parallel,
        dtype=_DTYPES[config.model.precision],
        round_bytes=config.rollout.sync_round_mib * _MIB,
        ranks_per_node=ranks_per_node,
        whole_tensors=whole_tensors,
    )
