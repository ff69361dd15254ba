"""Layers of Transformer Engine on the device: against plain torch, in FP8, padded, offloaded."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_oreal.algorithm import objectives
from megatron_oreal.config.device import check_device
from megatron_oreal.config.errors import UserError
from megatron_oreal.config.schema import Config, OptimizerConfig, Precision
from megatron_oreal.config.schema_offload import OffloadConfig
from megatron_oreal.config.schema_precision import (
    TOKEN_MULTIPLE,
    Fp8Config,
    Fp8Recipe,
    Fp8RoleConfig,
)
from megatron_oreal.engine.offload import HostCopies, Parked
from megatron_oreal.engine.roles import Policy
from megatron_oreal.models import build
from megatron_oreal.models.kernels import Kernels, device_here
from megatron_oreal.models.registry import read_model
from megatron_oreal.parallel import topology
from megatron_oreal.parallel.collectives import start_world, stop_world
from tests.toy_models import (
    make_config,
    make_policy,
    make_reference,
    make_token_rm,
    make_trajectories,
    open_models,
    pack,
    whole_weights,
    write_toy,
)

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("transformer_engine") is None, reason="needs Transformer Engine"
    ),
    pytest.mark.filterwarnings("default"),  # other releases of torch warn of other things
]

LEARNING_RATE = 1e-3
STEPS = 8
EVERYTHING = OffloadConfig(optimizer=True, gradients=True, reference=True, token_rm=True)
TRAJECTORIES = make_trajectories()
OBJECTIVE = objectives.sft_objective(sum(t.response_length for t in TRAJECTORIES))


@pytest.fixture(scope="module", autouse=True)
def world() -> Iterator[None]:
    """A world of this process and its GPU."""
    start_world()
    topology.initialize()
    yield
    topology.destroy()
    stop_world()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose matrices FP8 can multiply, and whose logits are of a trained one's size."""
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4}
    return write_toy(tmp_path_factory.mktemp("te") / "hf", "qwen2", spread=0.06, **sizes)


def config_of(
    folder: Path,
    recipe: Fp8Recipe = "none",
    offload: OffloadConfig | None = None,
    precision: Precision = "bf16",
) -> Config:
    config = make_config(folder, optimizer=OptimizerConfig(lr=LEARNING_RATE))
    return replace(
        config,
        model=replace(config.model, precision=precision),
        fp8=Fp8Config(policy=Fp8RoleConfig(recipe)),
        offload=offload or OffloadConfig(),
    )


def policy_of(config: Config) -> Policy:
    return make_policy(open_models(config))


def logprobs(policy: Policy) -> torch.Tensor:
    return torch.cat(policy.logprobs(pack(TRAJECTORIES)).logprobs)


def losses(policy: Policy) -> list[float]:
    batch = pack(TRAJECTORIES)
    return [policy.step(batch, OBJECTIVE, LEARNING_RATE).loss for _ in range(STEPS)]


def test_bf16_layers_are_as_near_the_truth_as_plain_torch(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fused = logprobs(policy_of(config_of(folder)))
    monkeypatch.setattr(build, "kernels_for", lambda _: Kernels(gpu=True))
    plain = logprobs(policy_of(config_of(folder)))
    truth = logprobs(policy_of(config_of(folder, precision="fp32")))
    farther, far = (float((values - truth).abs().mean()) for values in (fused, plain))
    assert farther < 1.5 * far < 0.1
    assert not torch.equal(fused, plain)  # they are other kernels


def test_matrices_add_their_gradients_up_themselves(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gradients() -> dict[str, torch.Tensor]:
        policy = policy_of(config_of(folder))
        policy.step(pack(TRAJECTORIES, 15), OBJECTIVE, 0.0)
        named = policy.model.named_parameters()
        return {name: weight.main_grad.clone() for name, weight in named.items()}  # pyright: ignore[reportAttributeAccessIssue]

    fused = gradients()
    monkeypatch.setattr("megatron_oreal.engine.optimizer._fuse_accumulation", lambda _: None)
    for name, separate in gradients().items():
        error = float((fused[name] - separate).norm() / separate.norm())
        assert error < 2**-7, name


@pytest.mark.parametrize("recipe", ["delayed", "tensorwise", "blockwise", "mxfp8"])
def test_fp8_learns_and_what_leaves_are_the_optimizers_weights(
    folder: Path, recipe: Fp8Recipe
) -> None:
    config = config_of(folder, recipe)
    try:
        check_device(config, read_model(folder)[1], device_here())
    except UserError as lacks:
        pytest.skip(str(lacks))
    source = open_models(config)
    policy = make_policy(source)
    before = logprobs(policy)
    truth = logprobs(policy_of(config_of(folder)))
    assert 0 < float((before - truth).abs().mean()) < 0.5
    found = losses(policy)
    assert found[-1] < found[0]
    shards = policy.model.optimizer_shards()
    for name, parameter in policy.model.named_parameters().items():
        assert type(parameter) is torch.nn.Parameter
        assert parameter.dtype == torch.bfloat16
        kept = shards[name].tensors["weight"]
        assert kept.dtype == torch.float32
        assert torch.equal(kept.bfloat16(), parameter.detach().flatten())
    exported = whole_weights(source, policy)
    embedding = policy.model.parameters()["embedding.word_embeddings.weight"]
    words = exported["model.embed_tokens.weight"]
    assert torch.equal(words.cpu(), embedding[: len(words)].cpu())


@pytest.mark.parametrize("multiple", sorted(set(TOKEN_MULTIPLE.values())))
def test_padding_changes_nothing(folder: Path, multiple: int) -> None:
    policy = policy_of(config_of(folder))
    plain = logprobs(policy)
    policy.model.cut = replace(policy.model.cut, token_multiple=multiple)
    # Products of other sizes may be tiled, and so rounded, in another way.
    torch.testing.assert_close(logprobs(policy), plain, rtol=0, atol=0.03)


def test_offloaded_memory_is_free_and_comes_back_bitwise() -> None:
    whole = torch.randn(64 << 20, device="cuda")  # 256 MiB
    view, before = whole[1000:2000], whole.clone()
    copies = HostCopies(lambda: [whole])
    held = torch.cuda.memory_allocated()
    parked = Parked(copies.leave, copies.come_back)
    assert held - torch.cuda.memory_allocated() == whole.nbytes
    with parked.here():
        assert torch.equal(whole, before)
        assert torch.equal(view, before[1000:2000])


def test_a_run_with_everything_offloaded_learns_the_same(folder: Path) -> None:
    batch = pack(TRAJECTORIES)
    plain = losses(policy_of(config_of(folder)))
    source = open_models(config_of(folder, offload=EVERYTHING))
    policy, reference, token_rm = make_policy(source), make_reference(source), make_token_rm(source)
    assert losses(policy) == pytest.approx(plain, rel=1e-3)
    scores = objectives.token_rm_objective(len(TRAJECTORIES))
    steps = [token_rm.step(batch, scores, LEARNING_RATE).loss for _ in range(STEPS)]
    assert steps[-1] < steps[0]
    away = [*reference.model.parameters().values(), *token_rm.model.parameters().values()]
    assert {tensor.untyped_storage().nbytes() for tensor in away} == {0}
    assert len(reference.logprobs(batch).logprobs) == len(TRAJECTORIES)
