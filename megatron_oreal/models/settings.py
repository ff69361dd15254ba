"""Megatron's configuration of a model, from its dimensions and a run's config: pure functions."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  the name the field uses
from megatron.core.transformer import TransformerConfig

from megatron_oreal.config.schema import Config, Precision
from megatron_oreal.config.schema_precision import Fp8Recipe, Role
from megatron_oreal.models.family import ModelDims
from megatron_oreal.models.kernels import Kernels

DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}

# Megatron's own choice of a part, core attention, would save nothing: flash attention keeps no
# scores.
_RECOMPUTATION: dict[str, dict[str, Any]] = {
    "none": {},
    "selective": {"recompute_granularity": "selective", "recompute_modules": ["mlp"]},
    "full": {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    },
}
# TE's own choices: scales of blocks adapt, and need none of e5m2's range for gradients.
_FORMAT: dict[Fp8Recipe, str] = {
    "delayed": "hybrid",
    "tensorwise": "hybrid",
    "blockwise": "e4m3",
    "mxfp8": "e4m3",
}


def transformer_config(
    dims: ModelDims, config: Config, role: Role, kernels: Kernels
) -> TransformerConfig:
    """Returns Megatron's configuration of one model under the layout and kernels of a run."""
    dtype = DTYPES[config.model.precision]
    return TransformerConfig(
        **_shape(dims),
        **_layout(config, kernels),
        **fp8_settings(config, role),
        **fusions(kernels),
        **_RECOMPUTATION[config.engine.recompute],
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=config.model.precision == "bf16",
        # Dense models have no experts, yet the default dispatcher is refused with varying lengths.
        moe_token_dispatcher_type="alltoall",
        calculate_per_token_loss=True,  # Megatron adds up, the objective divides
        use_cpu_initialization=not kernels.gpu,
        perform_initialization=False,  # every weight comes from a checkpoint
    )


def fp8_settings(config: Config, role: Role) -> dict[str, Any]:
    """Returns the fields that say how a model's layers multiply; none where it is all in bf16.

    `fp8_param` stays off. Parameters of FP8 are types of TE's own, rounded from the optimizer's
    weights: they would leave for checkpoints and engines rounded, and no plain copy could write
    them. Off, each pass rounds the bf16 parameters once, and what leaves is what the optimizer has.
    """
    chosen = config.fp8.role(role)
    if chosen.recipe == "none":
        return {}
    ends = chosen.bf16_layers_at_start + chosen.bf16_layers_at_end
    return {
        "fp8": _FORMAT[chosen.recipe],
        "fp8_recipe": chosen.recipe,
        "fp8_param": False,
        "fp8_margin": config.fp8.margin,
        "fp8_amax_history_len": config.fp8.amax_history,
        "fp8_amax_compute_algo": config.fp8.amax,
        "first_last_layers_bf16": ends > 0,
        "num_layers_at_start_in_bf16": chosen.bf16_layers_at_start,
        "num_layers_at_end_in_bf16": chosen.bf16_layers_at_end,
    }


def _shape(dims: ModelDims) -> dict[str, Any]:
    return {
        "num_layers": dims.layers,
        "hidden_size": dims.hidden,
        "num_attention_heads": dims.heads,
        "num_query_groups": dims.kv_heads,
        "kv_channels": dims.head_dim,
        "ffn_hidden_size": dims.ffn,
        "layernorm_epsilon": dims.norm_eps,
        "add_qkv_bias": dims.qkv_bias,
        "qk_layernorm": dims.qk_norm,
        "add_bias_linear": False,
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
    }


def _layout(config: Config, kernels: Kernels) -> dict[str, Any]:
    parallel = config.parallel
    interleaved = parallel.virtual_pipeline > 1
    return {
        "tensor_model_parallel_size": parallel.tensor,
        "pipeline_model_parallel_size": parallel.pipeline,
        "virtual_pipeline_model_parallel_size": parallel.virtual_pipeline if interleaved else None,
        # Interleaved, two stages send both ways at a time: only with a request each do they know
        # what is what.
        "overlap_p2p_comm": interleaved,
        "batch_p2p_comm": not interleaved,
        "num_layers_in_first_pipeline_stage": parallel.first_stage_layers,
        "num_layers_in_last_pipeline_stage": parallel.last_stage_layers,
        "context_parallel_size": parallel.context,
        "sequence_parallel": parallel.sequence_parallel and parallel.tensor > 1,
        # Packed micro-batches differ in length.
        "variable_seq_lengths": parallel.pipeline > 1 and not config.engine.pad_to_budget,
        # Interleaved, outputs are freed while they are being sent. Streams make that safe; gloo
        # reads the memory only once the receiver asks.
        "deallocate_pipeline_outputs": parallel.pipeline > 1 and kernels.gpu,
    }


def fusions(kernels: Kernels) -> dict[str, bool]:
    """Returns the switches of fused kernels; plain torch layers compute as they do on a CPU.

    TE's attention has its own softmax, which no switch asks for. TE's matrices add gradients up by
    themselves (`engine.optimizer`); the switch for Megatron's own matrices is refused without apex.
    """
    fused = kernels.transformer_engine
    return {
        "apply_rope_fusion": fused,
        "bias_activation_fusion": fused,
        "bias_dropout_fusion": fused,
        "masked_softmax_fusion": False,
        "gradient_accumulation_fusion": kernels.apex and not fused,
    }
