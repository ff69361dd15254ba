"""Every family through every kind of layout and back, bitwise: regions alone, no ranks."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_oreal.config.schema import ParallelConfig
from megatron_oreal.models.family import ModelDims
from megatron_oreal.models.registry import find_family
from megatron_oreal.weights.cluster import MegatronLayout
from megatron_oreal.weights.layout import MegatronPlace, megatron_regions
from tests.toy_models import CONFIG_JSON, TOYS

LAYOUTS = [
    ParallelConfig(),
    ParallelConfig(tensor=2),
    ParallelConfig(tensor=4),  # more than there are key-value heads
    ParallelConfig(tensor=2, pipeline=2),
    ParallelConfig(tensor=4, pipeline=3, first_stage_layers=2, last_stage_layers=3),
    ParallelConfig(pipeline=2, last_stage_layers=1),
    ParallelConfig(pipeline=6),
    ParallelConfig(pipeline=3, virtual_pipeline=2),
    ParallelConfig(tensor=2, pipeline=2, virtual_pipeline=2, first_stage_layers=2),
]
NINE_HEADS = [
    ParallelConfig(tensor=3),
    ParallelConfig(tensor=3, pipeline=2, first_stage_layers=5),
]
CASES = [(toy, layout) for toy in TOYS for layout in (NINE_HEADS if toy == "smollm2" else LAYOUTS)]


def dims_of(toy: str) -> ModelDims:
    config = {**CONFIG_JSON, **TOYS[toy], "num_hidden_layers": 6, "intermediate_size": 72}
    return find_family(config).read_dims(config)


def padded(name: str, shape: tuple[int, ...], multiple: int) -> tuple[int, ...]:
    """Rows of the vocabulary are padded as far as one likes, all others not at all."""
    if name not in ("embedding.word_embeddings.weight", "output_layer.weight"):
        return shape
    return (math.ceil(shape[0] / multiple) * multiple, *shape[1:])


@pytest.mark.parametrize(("toy", "layout"), CASES)
@pytest.mark.parametrize("vocab_multiple", [1, 128])
def test_there_and_back_again_is_bitwise(
    toy: str, layout: ParallelConfig, vocab_multiple: int
) -> None:
    dims = dims_of(toy)
    family = find_family({"model_type": dims.family})
    ranks = layout.tensor * layout.pipeline
    cluster = MegatronLayout(family, dims, ranks, layout)
    torch.manual_seed(0)
    hf = {name: torch.randn(shape) for name, shape in family.tensors(dims).items()}
    back = {name: torch.full_like(tensor, torch.nan) for name, tensor in hf.items()}
    for rank in range(ranks):
        stage, tensor_rank = divmod(rank, layout.tensor)
        shapes = {n: padded(n, s, vocab_multiple) for n, s in cluster.shapes(stage).items()}
        place = MegatronPlace(tensor_rank, layout.tensor)
        regions = megatron_regions(family, dims, shapes, place)
        local = {name: torch.zeros(shape) for name, shape in shapes.items()}
        for region in regions:
            local[region.key][region.local.slices] = hf[region.tensor][region.box.slices]
        for region in regions:
            back[region.tensor][region.box.slices] = local[region.key][region.local.slices]
    assert all(torch.equal(back[name], hf[name]) for name in hf)
