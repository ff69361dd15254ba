from __future__ import annotations

from dataclasses import fields, replace
from typing import Literal

import pytest
import torch
import torch.nn.functional as F  # noqa: N812  the name the field uses
from megatron.core.transformer import TransformerConfig

from megatron_oreal.config.schema import (
    Config,
    EngineConfig,
    ModelConfig,
    ParallelConfig,
    Precision,
)
from megatron_oreal.config.schema_precision import Fp8Config, Fp8Recipe, Fp8RoleConfig
from megatron_oreal.models.family import ModelDims
from megatron_oreal.models.kernels import Kernels
from megatron_oreal.models.settings import fp8_settings, fusions, transformer_config
from tests.unit.weights.toy import DIMS

# Megatron-Core 0.16 warns of its own default.
pytestmark = pytest.mark.filterwarnings("ignore:full scope is deprecated")


ON_GPU = Kernels(gpu=True)  # Megatron refuses fused kernels that cannot be imported


def on_cpu(config: Config, dims: ModelDims = DIMS) -> TransformerConfig:
    return transformer_config(dims, config, "policy", Kernels())


def with_fp8(recipe: Fp8Recipe, start: int = 0, end: int = 0) -> Config:
    """One recipe for the token_rm, none for the others."""
    chosen = Fp8RoleConfig(recipe, bf16_layers_at_start=start, bf16_layers_at_end=end)
    return Config(fp8=Fp8Config(token_rm=chosen, amax_history=16, margin=1))


def settings(precision: Precision = "fp32", **parallel: int | bool) -> TransformerConfig:
    config = Config(
        model=ModelConfig(precision=precision),
        parallel=ParallelConfig(**parallel),  # pyright: ignore[reportArgumentType]  by name
    )
    return on_cpu(config)


def test_dimensions_are_those_of_the_checkpoint():
    config = settings()
    assert (config.num_layers, config.hidden_size, config.ffn_hidden_size) == (3, 16, 24)
    # Eight heads of four are 32 wide: the head's size is not hidden size / heads here.
    heads = (config.num_attention_heads, config.num_query_groups, config.kv_channels)
    assert heads == (8, 2, 4)
    assert config.layernorm_epsilon == 1e-6
    assert config.normalization == "RMSNorm"
    assert config.gated_linear_unit
    assert config.activation_func is F.silu


def test_only_the_attention_input_may_have_a_bias():
    assert settings().add_qkv_bias
    assert not on_cpu(Config(), replace(DIMS, qkv_bias=False)).add_qkv_bias
    assert not settings().add_bias_linear


def test_nothing_is_dropped_and_the_objective_alone_divides():
    config = settings()
    assert config.hidden_dropout == config.attention_dropout == 0.0
    assert config.calculate_per_token_loss


@pytest.mark.parametrize(
    ("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)]
)
def test_parameters_and_pipeline_have_the_precision(precision, dtype):
    config = settings(precision)
    assert config.params_dtype == config.pipeline_dtype == dtype
    assert config.bf16 == (precision == "bf16")


@pytest.mark.parametrize(
    ("tensor", "wanted", "given"), [(1, True, False), (2, True, True), (2, False, False)]
)
def test_sequence_parallelism_needs_tensor_parallelism(tensor, wanted, given):
    config = settings(tensor=tensor, sequence_parallel=wanted)
    assert config.tensor_model_parallel_size == tensor
    assert config.sequence_parallel == given


@pytest.mark.parametrize(("stages", "varies"), [(1, False), (3, True)])
def test_stages_exchange_micro_batches_of_any_length(stages, varies):
    config = settings(pipeline=stages)
    assert config.pipeline_model_parallel_size == stages
    assert config.variable_seq_lengths == varies


def test_gloo_sends_nothing_that_is_freed_meanwhile() -> None:
    """It reads an output when the receiver asks; Megatron frees it before that where it may."""
    interleaved = Config(parallel=ParallelConfig(pipeline=2, virtual_pipeline=2))
    assert not on_cpu(interleaved).deallocate_pipeline_outputs


def test_stages_exchange_one_length_where_all_are_filled_up():
    config = Config(parallel=ParallelConfig(pipeline=3), engine=EngineConfig(pad_to_budget=True))
    assert not on_cpu(config).variable_seq_lengths


def test_interleaved_stages_ask_for_each_tensor_by_itself():
    dims = replace(DIMS, layers=4)
    config = on_cpu(Config(parallel=ParallelConfig(pipeline=2)), dims)
    assert (config.overlap_p2p_comm, config.batch_p2p_comm) == (False, True)
    layout = ParallelConfig(pipeline=2, virtual_pipeline=2)
    config = on_cpu(Config(parallel=layout), dims)
    assert config.virtual_pipeline_model_parallel_size == 2
    assert (config.overlap_p2p_comm, config.batch_p2p_comm) == (True, False)


def test_recomputation():
    def chosen(recompute: Literal["none", "selective", "full"]) -> tuple[str | None, str | None]:
        engine = EngineConfig(recompute=recompute)
        config = on_cpu(Config(engine=engine))
        return config.recompute_granularity, config.recompute_method

    assert chosen("none") == (None, None)
    assert chosen("selective") == ("selective", None)
    assert chosen("full") == ("full", "uniform")


@pytest.mark.parametrize(
    ("recipe", "form"),
    [("delayed", "hybrid"), ("tensorwise", "hybrid"), ("blockwise", "e4m3"), ("mxfp8", "e4m3")],
)
def test_each_role_has_a_recipe_of_its_own_and_bf16_parameters(recipe: Fp8Recipe, form: str):
    config = with_fp8(recipe)
    built = transformer_config(DIMS, config, "token_rm", ON_GPU)
    assert (built.fp8, built.fp8_recipe) == (form, recipe)
    assert (built.fp8_margin, built.fp8_amax_history_len) == (1, 16)
    assert built.fp8_amax_compute_algo == "max"
    assert not built.fp8_param
    assert not built.first_last_layers_bf16
    assert built.params_dtype == torch.bfloat16
    assert transformer_config(DIMS, config, "policy", ON_GPU).fp8 is None
    assert fp8_settings(config, "reference") == {}


def test_ends_may_stay_in_bf16():
    built = transformer_config(DIMS, with_fp8("blockwise", start=1, end=2), "token_rm", ON_GPU)
    assert built.first_last_layers_bf16
    assert (built.num_layers_at_start_in_bf16, built.num_layers_at_end_in_bf16) == (1, 2)


@pytest.mark.parametrize(
    ("kernels", "fused", "accumulates"),
    [
        (Kernels(), False, False),
        (Kernels(gpu=True), False, False),
        (Kernels(gpu=True, apex=True), False, True),
        (Kernels(gpu=True, transformer_engine=True, apex=True), True, False),
    ],
)
def test_fused_kernels_are_asked_for_where_they_are(
    kernels: Kernels, fused: bool, accumulates: bool
):
    """Apex serves where Transformer Engine is not."""
    assert fusions(kernels) == {
        "apply_rope_fusion": fused,
        "bias_activation_fusion": fused,
        "bias_dropout_fusion": fused,
        "masked_softmax_fusion": False,  # of attention modules that are not used here
        "gradient_accumulation_fusion": accumulates,
    }
    assert set(fusions(kernels)) <= {field.name for field in fields(TransformerConfig)}
