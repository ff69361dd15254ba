"""Regions of Megatron ranks against shards cut by hand, for every layout that the toy fits into."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megatron_oreal.models.family import ModelDims
from megatron_oreal.models.qwen2 import QWEN2
from megatron_oreal.weights.geometry import Box
from megatron_oreal.weights.layout import MegatronPlace, hf_regions, megatron_regions
from tests.unit.weights.toy import DIMS, TIED, megatron_shard, random_hf

STAGES = [[3], [2, 1], [1, 1, 1]]


def shapes_of(tensors: dict[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


@pytest.mark.parametrize("dims", [DIMS, TIED], ids=["untied", "tied"])
@pytest.mark.parametrize("tensor_size", [1, 2, 4])
@pytest.mark.parametrize("stages", STAGES, ids=str)
@pytest.mark.parametrize("fused_norms", [False, True], ids=["local", "fused"])
def test_regions_say_where_every_element_lies(
    dims: ModelDims, tensor_size: int, stages: list[int], fused_norms: bool
) -> None:
    hf = random_hf(dims)
    back = {name: torch.full_like(tensor, torch.nan) for name, tensor in hf.items()}
    for stage, layers in enumerate(stages):
        for rank in range(tensor_size):
            place = MegatronPlace(rank, tensor_size, sum(stages[:stage]))
            shard = megatron_shard(hf, dims, place, layers, fused_norms=fused_norms)
            rebuilt = {name: torch.zeros_like(tensor) for name, tensor in shard.items()}
            for region in megatron_regions(QWEN2, dims, shapes_of(shard), place):
                values = hf[region.tensor][region.box.slices]
                rebuilt[region.key][region.local.slices] = values
                back[region.tensor][region.box.slices] = shard[region.key][region.local.slices]
            assert all(torch.equal(rebuilt[name], shard[name]) for name in shard)
    assert all(torch.equal(back[name], hf[name]) for name in hf)


def test_a_rank_of_four_holds_half_a_kv_group_of_two() -> None:
    """A group is 4 x 4 query rows, 4 key rows, 4 value rows; rank 1 begins at its row 12 of 24."""
    shapes = {"decoder.layers.0.self_attention.linear_qkv.bias": (12,)}
    regions = megatron_regions(QWEN2, DIMS, shapes, MegatronPlace(1, 4, 2))
    prefix = "model.layers.2.self_attn."
    assert [(r.tensor.removeprefix(prefix), r.box, r.local) for r in regions] == [
        ("q_proj.bias", Box((12,), (16,)), Box((0,), (4,))),
        ("k_proj.bias", Box((0,), (4,)), Box((4,), (8,))),
        ("v_proj.bias", Box((0,), (4,)), Box((8,), (12,))),
    ]


def test_a_rank_with_padding_alone_has_no_region() -> None:
    shapes = {"embedding.word_embeddings.weight": (32, 16)}
    assert megatron_regions(QWEN2, DIMS, shapes, MegatronPlace(1, 2)) == []


def test_a_store_of_whole_tensors_has_one_region_each() -> None:
    (region,) = hf_regions({"norm": (3,)})
    assert (region.tensor, region.key, region.box, region.local) == (
        "norm",
        "norm",
        Box.whole((3,)),
        Box.whole((3,)),
    )


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("decoder.layers.0.mlp.linear_fc9.weight", (4, 4), "no parameter of the qwen2 family"),
        ("decoder.layers.3.pre_mlp_layernorm.weight", (16,), "3 layers has no"),
        ("decoder.layers.0.pre_mlp_layernorm.weight", (8,), "does not fit"),
        ("decoder.layers.0.mlp.linear_fc1.weight", (23, 16), "does not fit"),
        ("decoder.layers.0.mlp.linear_fc2.weight", (16,), "does not fit"),
        ("embedding.word_embeddings.weight", (14, 16), "does not fit"),
        ("embedding.word_embeddings.weight", (16, 15), "does not fit"),
    ],
)
def test_a_parameter_that_does_not_belong_is_named(
    name: str, shape: tuple[int, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=f"{name}: .*{message}"):
        megatron_regions(QWEN2, DIMS, {name: shape}, MegatronPlace(0, 2))


def test_an_ffn_that_does_not_divide_is_refused() -> None:
    odd = replace(DIMS, ffn=23)
    shapes = {"decoder.layers.0.mlp.linear_fc1.weight": (23, 16)}
    with pytest.raises(ValueError, match=r"linear_fc1\.weight: .* does not fit"):
        megatron_regions(QWEN2, odd, shapes, MegatronPlace(0, 2))
