from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from megatron_oreal.models.qwen2 import QWEN2
from megatron_oreal.rollout.weight_sync import WeightSync
from megatron_oreal.weights.bridge import HfStream, open_stream
from megatron_oreal.weights.layout import MegatronPlace
from tests.unit.weights.toy import DIMS, TIED, megatron_shard, random_hf

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from megatron_oreal.config.schema import SamplingConfig
    from megatron_oreal.models.family import ModelDims
    from megatron_oreal.rollout.engine import Advance, Request
    from megatron_oreal.types import Rollout

DAMAGED = "model.layers.1.mlp.up_proj.weight"


class KeepingEngine:
    """An engine without a sampler: it holds the weights it was last given."""

    def __init__(self) -> None:
        self.weights: dict[str, torch.Tensor] = {}

    def generate(
        self, requests: Sequence[Request], sampling: SamplingConfig, advance: Advance
    ) -> list[Rollout]:
        raise NotImplementedError

    def load_weights(self, tensors: Iterator[tuple[str, torch.Tensor]]) -> None:
        self.weights = dict(tensors)

    def close(self) -> None:
        self.weights = {}


class ScribblingEngine(KeepingEngine):
    """Flips the last bit of one element of what it was handed."""

    def load_weights(self, tensors: Iterator[tuple[str, torch.Tensor]]) -> None:
        for name, tensor in tensors:
            if name == DAMAGED:
                tensor.view(torch.int32)[-1, -1] ^= 1
            self.weights[name] = tensor


class ImpatientEngine(KeepingEngine):
    """Stops drawing when it has seen one tensor."""

    def load_weights(self, tensors: Iterator[tuple[str, torch.Tensor]]) -> None:
        while DAMAGED not in self.weights:
            name, tensor = next(tensors)
            self.weights[name] = tensor


def streamed(dims: ModelDims) -> tuple[HfStream, dict[str, torch.Tensor]]:
    """Returns a lone rank's stream, and the checkpoint that it comes from."""
    hf = random_hf(dims)
    place = MegatronPlace(tensor_rank=0, tensor_size=1, layer_offset=0)
    params = megatron_shard(hf, dims, place, dims.layers, fused_norms=False)
    return open_stream(params, QWEN2, dims, place, round_bytes=4096), hf


@pytest.mark.usefixtures("world_of_one")
@pytest.mark.parametrize("dims", [DIMS, TIED])
def test_a_push_hands_over_every_tensor_as_the_policy_has_it(dims):
    stream, hf = streamed(dims)
    engine = KeepingEngine()
    sums = WeightSync(stream, engine).push()
    assert engine.weights.keys() == sums.keys() == hf.keys()
    assert all(torch.equal(engine.weights[name], tensor) for name, tensor in hf.items())


@pytest.mark.usefixtures("world_of_one")
def test_a_push_carries_what_the_parameters_are_then():
    stream, _ = streamed(DIMS)
    engine = KeepingEngine()
    sync = WeightSync(stream, engine)
    before = sync.push()
    stream.params["decoder.final_layernorm.weight"].add_(1.0)
    after = sync.push()
    assert [name for name in before if before[name] != after[name]] == ["model.norm.weight"]
    assert torch.equal(
        engine.weights["model.norm.weight"], stream.params["decoder.final_layernorm.weight"]
    )


@pytest.mark.usefixtures("world_of_one")
@pytest.mark.parametrize("engine_kind", [ScribblingEngine, ImpatientEngine])
def test_what_did_not_arrive_whole_is_named(engine_kind):
    stream, _ = streamed(DIMS)
    with pytest.raises(
        RuntimeError, match=r"weight sync: model\.\S+ arrived changed on ranks \[0\]"
    ):
        WeightSync(stream, engine_kind()).push()


@pytest.mark.usefixtures("world_of_one")
def test_a_single_changed_bit_names_its_tensor():
    stream, _ = streamed(DIMS)
    with pytest.raises(RuntimeError, match=f"weight sync: {DAMAGED} arrived changed"):
        WeightSync(stream, ScribblingEngine()).push()
