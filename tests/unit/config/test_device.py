"""What a GPU or Transformer Engine cannot compute is one line at start-up."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest

from megatron_oreal.config.device import Device, check_device
from megatron_oreal.config.errors import UserError
from megatron_oreal.config.load import load_config
from megatron_oreal.config.schema import Config
from megatron_oreal.config.validate import check_model

H100 = Device("NVIDIA H100", (9, 0), "2.20.2")


@dataclass(frozen=True)
class Sizes:
    """Qwen2.5-7B."""

    heads: int = 28
    kv_heads: int = 4
    head_dim: int = 128
    ffn: int = 18944
    layers: int = 28
    vocab: int = 152064
    hidden: int = 3584


def config(*keys: str) -> Config:
    return load_config([], ["model.path=m", "data.path=d", *keys])


@pytest.mark.parametrize("recipe", ["none", "delayed", "tensorwise", "blockwise"])
def test_an_h100_takes_every_recipe_but_one(recipe: str) -> None:
    check_device(config(f"fp8.policy.recipe={recipe}"), Sizes(), H100)
    blackwell = Device("NVIDIA B200", (10, 0), "2.20.2")
    check_device(config("fp8.token_rm.recipe=mxfp8", "parallel.tensor=4"), Sizes(), blackwell)


def test_engines_round_on_an_h100_and_servers_where_they_are() -> None:
    both = ("rollout.quantization=fp8", "rollout.kv_cache_dtype=fp8")
    check_device(config(*both), Sizes(), H100)
    served = ("rollout.backend=vllm_server", "rollout.server_hosts=[http://a:1]")
    check_device(config(*both, *served), Sizes(), Device("a CPU"))


def test_without_fp8_a_cpu_and_any_sizes_will_do() -> None:
    check_device(config(), replace(Sizes(), head_dim=12, hidden=100), Device("a CPU"))


@pytest.mark.parametrize(
    ("keys", "device", "says"),
    [
        (
            ["rollout.quantization=fp8"],
            Device("a CPU"),
            "rollout.quantization=fp8: a CPU has no FP8; set none",
        ),
        (
            ["rollout.kv_cache_dtype=fp8"],
            Device("NVIDIA A100", (8, 0)),
            "rollout.kv_cache_dtype=fp8: needs compute capability 8.9 (L40S, H100 or newer), "
            "NVIDIA A100 has 8.0; set auto",
        ),
        (
            ["fp8.policy.recipe=delayed"],
            Device("a CPU", None, "2.20.2"),
            "fp8.policy.recipe=delayed: a CPU has no FP8; set none",
        ),
        (
            ["fp8.reference.recipe=tensorwise"],
            Device("NVIDIA A100", (8, 0), "2.20.2"),
            "fp8.reference.recipe=tensorwise: needs compute capability 8.9 (L40S, H100 or newer), "
            "NVIDIA A100 has 8.0; set none",
        ),
        (
            ["fp8.token_rm.recipe=mxfp8"],
            H100,
            "fp8.token_rm.recipe=mxfp8: needs compute capability 10.0 (B200 or newer), NVIDIA H100"
            " has 9.0; set none",
        ),
        (
            ["fp8.policy.recipe=mxfp8"],
            Device("NVIDIA RTX 5090", (12, 0), "2.20.2"),
            "fp8.policy.recipe=mxfp8: Transformer Engine has none for capability 12.0 (NVIDIA RTX"
            " 5090); set tensorwise",
        ),
        (
            ["fp8.policy.recipe=delayed"],
            Device("NVIDIA H100", (9, 0)),
            "fp8.policy.recipe=delayed: needs Transformer Engine, which is not installed: pip"
            " install 'transformer-engine[pytorch]', or set none",
        ),
        (
            ["fp8.policy.recipe=blockwise"],
            Device("NVIDIA H100", (9, 0), "2.2.0+cu12"),
            "fp8.policy.recipe=blockwise: needs Transformer Engine 2.3, installed is 2.2.0+cu12;"
            " upgrade it, or set none",
        ),
    ],
)
def test_the_line_names_what_is_lacking(keys: list[str], device: Device, says: str) -> None:
    with pytest.raises(UserError) as refused:
        check_device(config(*keys), Sizes(), device)
    assert str(refused.value) == says


@pytest.mark.parametrize(
    ("sizes", "keys", "says"),
    [
        (
            Sizes(hidden=3592),
            [],
            "fp8.policy.recipe=delayed: FP8 multiplies sides that are multiples of 16, the model"
            " has 3592 hidden size; set none",
        ),
        (
            Sizes(ffn=18944 + 32),
            ["parallel.tensor=4"],
            "fp8.policy.recipe=delayed: FP8 multiplies sides that are multiples of 16, the model"
            " has 4744 feed-forward rows on each of 4 tensor-parallel ranks; lower parallel.tensor,"
            " or set none",
        ),
    ],
)
def test_sides_of_matrices_are_whole_multiples(sizes: Sizes, keys: list[str], says: str) -> None:
    with pytest.raises(UserError) as refused:
        check_device(config("fp8.policy.recipe=delayed", *keys), sizes, H100)
    assert str(refused.value) == says


@pytest.mark.parametrize(("head_dim", "capability"), [(100, (9, 0)), (264, (9, 0)), (192, (8, 0))])
def test_attention_has_a_largest_head(head_dim: int, capability: tuple[int, int]) -> None:
    device = Device("this GPU", capability, "2.20.2")
    with pytest.raises(UserError, match=rf"^head_dim={head_dim}: .* this GPU takes multiples of 8"):
        check_device(config(), replace(Sizes(), head_dim=head_dim), device)
    check_device(config(), replace(Sizes(), head_dim=head_dim), Device("this GPU", capability))


def test_fp8_rounds_bf16() -> None:
    with pytest.raises(UserError, match=r"^fp8\.token_rm\.recipe=delayed: rounds bf16 numbers"):
        config("fp8.token_rm.recipe=delayed", "model.precision=fp32")


def test_delayed_scaling_has_no_layers_of_its_own() -> None:
    says = r"^fp8\.policy\.bf16_layers_at_end=1: recipe=delayed scales all layers together"
    with pytest.raises(UserError, match=says):
        config("fp8.policy.recipe=delayed", "fp8.policy.bf16_layers_at_end=1")
    with pytest.raises(UserError, match="recipe=none: all layers are bf16"):
        config("fp8.policy.bf16_layers_at_end=1")


def test_the_reference_learns_no_scales() -> None:
    says = r"^fp8\.reference\.recipe=delayed: learns its scales in passes with gradients"
    with pytest.raises(UserError, match=says):
        config("fp8.reference.recipe=delayed")


def test_a_stage_at_most_stays_in_bf16() -> None:
    keys = ["fp8.policy.recipe=tensorwise", "fp8.policy.bf16_layers_at_start=8"]
    check_model(config(*keys), Sizes())
    says = r"^fp8\.policy\.bf16_layers_at_start=8: a pipeline stage has 7 of the model's 28 layers"
    with pytest.raises(UserError, match=says):
        check_model(config(*keys, "parallel.pipeline=4"), Sizes())


def test_gathers_ride_with_gradients() -> None:
    with pytest.raises(
        UserError, match=r"^parallel\.overlap_param_gather=True: needs overlap_grad"
    ):
        config("parallel.overlap_param_gather=true")
    with pytest.raises(UserError, match=r"overlap_param_gather=True: a whole optimizer has no"):
        config("parallel.overlap_param_gather=true", "parallel.distributed_optimizer=false")
