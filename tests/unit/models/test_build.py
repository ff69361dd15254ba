from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F  # noqa: N812  the name the field uses

from megatron_oreal.config.schema import ParallelConfig
from megatron_oreal.models.build import transformer_config
from tests.unit.weights.toy import DIMS

# Megatron-Core 0.16 warns of its own default.
pytestmark = pytest.mark.filterwarnings("ignore:full scope is deprecated")

ALONE = ParallelConfig()


def test_dimensions_are_those_of_the_checkpoint():
    config = transformer_config(DIMS, ALONE, "fp32")
    assert (config.num_layers, config.hidden_size, config.ffn_hidden_size) == (3, 16, 24)
    # Eight heads of four are 32 wide: the head's size is not hidden size / heads here.
    heads = (config.num_attention_heads, config.num_query_groups, config.kv_channels)
    assert heads == (8, 2, 4)
    assert config.layernorm_epsilon == 1e-6
    assert config.normalization == "RMSNorm"
    assert config.gated_linear_unit
    assert config.activation_func is F.silu


def test_only_the_attention_input_may_have_a_bias():
    assert transformer_config(DIMS, ALONE, "fp32").add_qkv_bias
    assert not transformer_config(replace(DIMS, qkv_bias=False), ALONE, "fp32").add_qkv_bias
    assert not transformer_config(DIMS, ALONE, "fp32").add_bias_linear


def test_nothing_is_dropped_and_the_objective_alone_divides():
    config = transformer_config(DIMS, ALONE, "fp32")
    assert config.hidden_dropout == config.attention_dropout == 0.0
    assert config.calculate_per_token_loss


@pytest.mark.parametrize(
    ("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)]
)
def test_parameters_and_pipeline_have_the_precision(precision, dtype):
    config = transformer_config(DIMS, ALONE, precision)
    assert config.params_dtype == config.pipeline_dtype == dtype
    assert config.bf16 == (precision == "bf16")


@pytest.mark.parametrize(
    ("tensor", "wanted", "given"), [(1, True, False), (2, True, True), (2, False, False)]
)
def test_sequence_parallelism_needs_tensor_parallelism(tensor, wanted, given):
    parallel = ParallelConfig(tensor=tensor, sequence_parallel=wanted)
    config = transformer_config(DIMS, parallel, "fp32")
    assert config.tensor_model_parallel_size == tensor
    assert config.sequence_parallel == given


@pytest.mark.parametrize(("stages", "varies"), [(1, False), (3, True)])
def test_stages_exchange_micro_batches_of_any_length(stages, varies):
    config = transformer_config(DIMS, ParallelConfig(pipeline=stages), "fp32")
    assert config.pipeline_model_parallel_size == stages
    assert config.variable_seq_lengths == varies


def test_gloo_sends_nothing_that_is_freed_meanwhile() -> None:
    """It reads an output when the receiver asks; Megatron frees it before that where it may."""
    interleaved = ParallelConfig(pipeline=2, virtual_pipeline=2)
    assert not transformer_config(DIMS, interleaved, "fp32").deallocate_pipeline_outputs
