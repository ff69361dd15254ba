from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from megatron_oreal.models.qwen2 import QWEN2
from megatron_oreal.rollout.weight_sync import WeightSync, open_sync
from megatron_oreal.weights.layout import MegatronPlace
from tests.unit.weights.toy import DIMS, TIED, megatron_shard, random_hf

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from megatron_oreal.config.schema import SamplingConfig
    from megatron_oreal.models.family import ModelDims
    from megatron_oreal.rollout.engine import Finished, Request
    from megatron_oreal.types import Advance, Rollout
    from megatron_oreal.weights.sums import Checksums
    from megatron_oreal.weights.vllm_layout import LiveShard

DAMAGED = "model.layers.1.mlp.up_proj.weight"
PLACE = MegatronPlace(tensor_rank=0, tensor_size=1, layer_offset=0)


class KeepingEngine:
    """An engine without a sampler: it holds the whole tensors that it was last given."""

    receivers = None

    def __init__(self) -> None:
        self.weights: dict[str, torch.Tensor] = {}
        self.steps: list[str] = []

    def generate(
        self,
        requests: Sequence[Request],
        sampling: SamplingConfig,
        advance: Advance,
        finished: Finished,
    ) -> list[Rollout]:
        raise NotImplementedError

    def live_shard(self) -> LiveShard | None:
        return None

    def load_weights(
        self, tensors: Iterator[tuple[str, torch.Tensor]], expected: Checksums | None = None
    ) -> list[str]:
        del expected
        self.steps.append("write")
        self.weights = dict(tensors)
        return []

    def forget_prefixes(self) -> None:
        raise NotImplementedError

    @property
    def needs_weights(self) -> bool:
        return not self.weights

    def sleep(self) -> None:
        self.weights = {}

    def wake_weights(self) -> None:
        self.steps.append("wake_weights")

    def wake_cache(self) -> None:
        self.steps.append("wake_cache")

    def close(self) -> None:
        self.weights = {}


class ScribblingEngine(KeepingEngine):
    """Flips the last bit of one element of what it was handed."""

    def load_weights(
        self, tensors: Iterator[tuple[str, torch.Tensor]], expected: Checksums | None = None
    ) -> list[str]:
        del expected
        for name, tensor in tensors:
            if name == DAMAGED:
                tensor.view(torch.int32)[-1, -1] ^= 1
            self.weights[name] = tensor
        return []


class ImpatientEngine(KeepingEngine):
    """Stops drawing when it has seen one tensor."""

    def load_weights(
        self, tensors: Iterator[tuple[str, torch.Tensor]], expected: Checksums | None = None
    ) -> list[str]:
        del expected
        while DAMAGED not in self.weights:
            name, tensor = next(tensors)
            self.weights[name] = tensor
        return []


class DoubtingEngine(KeepingEngine):
    """Finds, where it is to look, that it computes with another tensor than it was handed."""

    def load_weights(
        self, tensors: Iterator[tuple[str, torch.Tensor]], expected: Checksums | None = None
    ) -> list[str]:
        super().load_weights(tensors)
        return [name for name in expected or () if name == DAMAGED]


def lone_policy(dims: ModelDims) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Returns a lone rank's parameters, and the checkpoint that they come from."""
    hf = random_hf(dims)
    return megatron_shard(hf, dims, PLACE, dims.layers, fused_norms=False), hf


def synced(params: dict[str, torch.Tensor], dims: ModelDims, engine: KeepingEngine) -> WeightSync:
    return open_sync(params, QWEN2, dims, PLACE, engine, round_bytes=4096)


@pytest.mark.usefixtures("world_of_one")
@pytest.mark.parametrize("dims", [DIMS, TIED])
def test_a_push_hands_over_every_tensor_as_the_policy_has_it(dims):
    params, hf = lone_policy(dims)
    engine = KeepingEngine()
    sync = synced(params, dims, engine)
    sync.push()
    assert "the engine takes whole tensors" in sync.description
    assert engine.weights.keys() == hf.keys()
    assert all(torch.equal(engine.weights[name], tensor) for name, tensor in hf.items())


@pytest.mark.usefixtures("world_of_one")
def test_a_push_wakes_weights_before_and_the_cache_after():
    params, _ = lone_policy(DIMS)
    engine = KeepingEngine()
    synced(params, DIMS, engine).push()
    assert engine.steps == ["wake_weights", "write", "wake_cache"]


@pytest.mark.usefixtures("world_of_one")
def test_a_push_that_did_not_arrive_leaves_the_cache_asleep():
    params, _ = lone_policy(DIMS)
    engine = DoubtingEngine()
    with pytest.raises(RuntimeError, match="arrived changed"):
        synced(params, DIMS, engine).push()
    assert engine.steps == ["wake_weights", "write"]


@pytest.mark.usefixtures("world_of_one")
def test_a_push_carries_what_the_parameters_are_then():
    params, _ = lone_policy(DIMS)
    engine = KeepingEngine()
    sync = synced(params, DIMS, engine)
    sync.push()
    before = engine.weights
    params["decoder.final_layernorm.weight"].add_(1.0)
    sync.push()
    changed = [name for name in before if not torch.equal(before[name], engine.weights[name])]
    assert changed == ["model.norm.weight"]


@pytest.mark.usefixtures("world_of_one")
@pytest.mark.parametrize("engine_kind", [ScribblingEngine, ImpatientEngine, DoubtingEngine])
def test_what_did_not_arrive_whole_is_named(engine_kind):
    params, _ = lone_policy(DIMS)
    with pytest.raises(
        RuntimeError, match=r"weight sync: model\.\S+ arrived changed on ranks \[0\]"
    ):
        synced(params, DIMS, engine_kind()).push()


@pytest.mark.usefixtures("world_of_one")
def test_a_single_changed_bit_names_its_tensor():
    params, _ = lone_policy(DIMS)
    with pytest.raises(RuntimeError, match=f"weight sync: {DAMAGED} arrived changed"):
        synced(params, DIMS, ScribblingEngine()).push()


@pytest.mark.usefixtures("world_of_one")
def test_the_first_push_is_checked_the_others_if_asked():
    params, _ = lone_policy(DIMS)
    sync = synced(params, DIMS, ScribblingEngine())
    sync._checked = True
    sync.push()
    with pytest.raises(RuntimeError, match="arrived changed"):
        sync.push(check=True)
    always = open_sync(
        params, QWEN2, DIMS, PLACE, ScribblingEngine(), round_bytes=4096, check="always"
    )
    always._checked = True
    with pytest.raises(RuntimeError, match="arrived changed"):
        always.push()
