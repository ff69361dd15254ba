from __future__ import annotations

from dataclasses import replace
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
from megatron_oreal.models.build import transformer_config
from tests.unit.weights.toy import DIMS

# Megatron-Core 0.16 warns of its own default.
pytestmark = pytest.mark.filterwarnings("ignore:full scope is deprecated")


def settings(precision: Precision = "fp32", **parallel: int | bool) -> TransformerConfig:
    config = Config(
        model=ModelConfig(precision=precision),
        parallel=ParallelConfig(**parallel),  # pyright: ignore[reportArgumentType]  by name
    )
    return transformer_config(DIMS, config)


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
    assert not transformer_config(replace(DIMS, qkv_bias=False), Config()).add_qkv_bias
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
    assert not transformer_config(DIMS, interleaved).deallocate_pipeline_outputs


def test_stages_exchange_one_length_where_all_are_filled_up():
    config = Config(parallel=ParallelConfig(pipeline=3), engine=EngineConfig(pad_to_budget=True))
    assert not transformer_config(DIMS, config).variable_seq_lengths


def test_interleaved_stages_ask_for_each_tensor_by_itself():
    dims = replace(DIMS, layers=4)
    config = transformer_config(dims, Config(parallel=ParallelConfig(pipeline=2)))
    assert (config.overlap_p2p_comm, config.batch_p2p_comm) == (False, True)
    layout = ParallelConfig(pipeline=2, virtual_pipeline=2)
    config = transformer_config(dims, Config(parallel=layout))
    assert config.virtual_pipeline_model_parallel_size == 2
    assert (config.overlap_p2p_comm, config.batch_p2p_comm) == (True, False)


def test_recomputation():
    def chosen(recompute: Literal["none", "selective", "full"]) -> tuple[str | None, str | None]:
        engine = EngineConfig(recompute=recompute)
        config = transformer_config(DIMS, Config(engine=engine))
        return config.recompute_granularity, config.recompute_method

    assert chosen("none") == (None, None)
    assert chosen("selective") == ("selective", None)
    assert chosen("full") == ("full", "uniform")
