"""A policy's weights into the plain parameters of engines, over real ranks, bitwise."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
import torch.distributed as dist

from megatron_oreal.models.qwen2 import QWEN2
from megatron_oreal.parallel import topology
from megatron_oreal.rollout.weight_sync import open_sync
from megatron_oreal.weights.in_place import answered_sums
from megatron_oreal.weights.layout import MegatronPlace
from megatron_oreal.weights.sums import whole_sum, wrapped
from megatron_oreal.weights.vllm_layout import LiveShard
from tests.unit.rollout.test_weight_sync import KeepingEngine
from tests.unit.weights.toy import DIMS, TIED, megatron_shard, random_hf

if TYPE_CHECKING:
    from megatron_oreal.models.family import ModelDims
    from tests.ranks import RankPools

pytestmark = pytest.mark.parallel

# ranks, the policy's tp and pp, the engines' tp: 4 is more than the key-value heads, and two of its
# four ranks have nothing but padding of the vocabulary
LAYOUTS = [(1, 1, 1, 1), (2, 2, 1, 1), (2, 1, 2, 2), (4, 4, 1, 2), (4, 2, 2, 4), (4, 1, 2, 4)]
STAGES = {1: [3], 2: [2, 1]}
ROUND = 4096  # bytes: several rounds
DAMAGED = "model.layers.1.mlp.up_proj.weight"
PADDED_VOCAB = 64
PADDING = -7.0  # what the live model has in its padding rows, for nobody to touch


class LiveEngine(KeepingEngine):
    """Plain tensors in vLLM's layout, as a GPU has them."""

    def __init__(self, dims: ModelDims, size: int) -> None:
        super().__init__()
        shard = vllm_shard(random_hf(dims), dims, dist.get_rank() % size, size)
        self.live = {name: torch.full_like(tensor, PADDING) for name, tensor in shard.items()}
        self.size = size
        self.forgotten = 0

    def live_shard(self) -> LiveShard:
        return LiveShard(self.live, dist.get_rank() % self.size, self.size)

    def forget_prefixes(self) -> None:
        self.forgotten += 1


def vllm_shard(
    hf: dict[str, torch.Tensor], dims: ModelDims, rank: int, size: int
) -> dict[str, torch.Tensor]:
    """What a vLLM rank holds, cut here by hand, apart from the code under test."""
    copies = max(1, size // dims.kv_heads)
    shard = {"model.norm.weight": hf["model.norm.weight"]}
    heads = [] if dims.tied_embeddings else ["lm_head.weight"]
    for name in ["model.embed_tokens.weight", *heads]:
        padded = torch.full((PADDED_VOCAB, dims.hidden), PADDING)
        padded[: dims.vocab] = hf[name]
        shard[name] = padded.chunk(size)[rank]
    for layer in range(dims.layers):
        path = f"model.layers.{layer}."
        for part in ("weight", "bias"):
            q, k, v = (hf[f"{path}self_attn.{name}_proj.{part}"] for name in "qkv")
            kv = [tensor.chunk(size // copies)[rank // copies] for tensor in (k, v)]
            shard[f"{path}self_attn.qkv_proj.{part}"] = torch.cat([q.chunk(size)[rank], *kv])
        halves = [hf[f"{path}mlp.{name}_proj.weight"].chunk(size)[rank] for name in ("gate", "up")]
        shard[f"{path}mlp.gate_up_proj.weight"] = torch.cat(halves)
        for name in ("self_attn.o_proj.weight", "mlp.down_proj.weight"):
            shard[path + name] = hf[path + name].chunk(size, 1)[rank]
        for name in ("input_layernorm.weight", "post_attention_layernorm.weight"):
            shard[path + name] = hf[path + name]
    return {name: tensor.clone() for name, tensor in shard.items()}


def policy_shard(
    dims: ModelDims, hf: dict[str, torch.Tensor]
) -> tuple[MegatronPlace, dict[str, torch.Tensor]]:
    here = topology.current()
    stages = STAGES[here.pp_size]
    place = MegatronPlace(here.tp_rank, here.tp_size, sum(stages[: here.pp_rank]))
    return place, megatron_shard(hf, dims, place, stages[here.pp_rank], fused_norms=False)


def push_twice(dims: ModelDims, size: int) -> None:
    hf = random_hf(dims)
    place, params = policy_shard(dims, hf)
    engine = LiveEngine(dims, size)
    sync = open_sync(params, QWEN2, dims, place, engine, round_bytes=ROUND, check="always")
    assert sync.description == "in place"
    addresses = {name: tensor.data_ptr() for name, tensor in engine.live.items()}
    for _ in range(2):  # the plan serves every push, and reads what the parameters are then
        sync.push()
        expected = vllm_shard(hf, dims, dist.get_rank() % size, size)
        for name, tensor in expected.items():
            assert torch.equal(engine.live[name], tensor), name
        for param in params.values():
            param.neg_()
        hf = {name: -tensor for name, tensor in hf.items()}
    assert addresses == {name: tensor.data_ptr() for name, tensor in engine.live.items()}
    assert engine.forgotten == 2


def flip(name: str, piece: torch.Tensor) -> None:
    """Flips one byte of a tensor on its way to the last rank."""
    if name == DAMAGED and dist.get_rank() == dist.get_world_size() - 1:
        piece.view(torch.uint8).view(-1)[0] ^= 1


def flipped_byte(live: bool) -> str:
    place, params = policy_shard(DIMS, random_hf(DIMS))
    engine = LiveEngine(DIMS, 1) if live else KeepingEngine()
    sync = open_sync(params, QWEN2, DIMS, place, engine, round_bytes=ROUND, meddle=flip)
    with pytest.raises(RuntimeError) as caught:
        sync.push()
    return str(caught.value)


def partly_plain() -> tuple[str, int]:
    """Packs one weight on the last rank alone."""
    place, params = policy_shard(DIMS, random_hf(DIMS))
    engine = LiveEngine(DIMS, 1)
    if dist.get_rank() == dist.get_world_size() - 1:
        engine.live["model.layers.2.mlp.down_proj.weight"] = torch.empty(0)
    sync = open_sync(params, QWEN2, DIMS, place, engine, round_bytes=ROUND)
    sync.push()
    return sync.description, len(engine.weights)


@pytest.mark.parametrize("dims", [DIMS, TIED], ids=["untied", "tied"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_live_parameters_are_those_of_the_policy_bitwise(
    ranks: RankPools, dims: ModelDims, layout: tuple[int, int, int, int]
) -> None:
    size, tp, pp, engine_tp = layout
    ranks(size).run(push_twice, dims, engine_tp, tp=tp, pp=pp)


@pytest.mark.parametrize("live", [True, False], ids=["in place", "whole tensors"])
def test_a_byte_flipped_on_its_way_stops_every_rank_and_names_the_tensor(
    ranks: RankPools, live: bool
) -> None:
    refusals = ranks(2).run(flipped_byte, live, tp=2)
    assert refusals == [f"weight sync: {DAMAGED} arrived changed on ranks [1]"] * 2


def test_one_rank_that_is_not_plain_sends_all_whole_tensors(ranks: RankPools) -> None:
    found = ranks(2).run(partly_plain, tp=2)
    why = "model.layers.2.mlp.down_proj.weight has shape (0,), not (16, 24)"
    tensors = len(QWEN2.tensors(DIMS))
    assert found == [(f"whole tensors, since {why}", tensors)] * 2


@pytest.mark.parametrize("size", [1, 2, 4])
def test_what_the_ranks_of_an_engine_answer_for_adds_up_to_the_whole_tensors(size: int) -> None:
    hf = random_hf(TIED)
    total = dict.fromkeys(hf, 0)
    for rank in range(size):
        live = LiveShard(vllm_shard(hf, TIED, rank, size), rank, size)
        for name, count in answered_sums(QWEN2, TIED, live).items():
            total[name] += count
    assert {name: wrapped(count) for name, count in total.items()} == {
        name: whole_sum(tensor) for name, tensor in hf.items()
    }
