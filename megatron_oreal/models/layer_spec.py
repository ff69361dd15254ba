"""Which modules a transformer layer is made of: Transformer Engine's, or plain torch's."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  the name the field uses
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlock,
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)

from megatron_oreal.models.attention_cpu import PackedCoreAttention
from megatron_oreal.models.kernels import Kernels


class RMSNorm(torch.nn.Module):
    """Root-mean-square norm whose gradient Megatron reduces over TP under sequence parallelism.

    Megatron's own torch norm refuses sequence parallelism.
    """

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: object
    ) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # pyright: ignore[reportAttributeAccessIssue]
        self.eps = eps

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Normalises the last dimension of `hidden`, any shape."""
        return F.rms_norm(hidden, (hidden.shape[-1],), self.weight, self.eps)


def layer_spec(config: TransformerConfig, vp_stage: int | None, kernels: Kernels) -> ModuleSpec:
    """Returns what `GPTModel` builds its layers of on this virtual pipeline stage, if any."""
    if kernels.transformer_engine:
        return get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm)
    layer = get_gpt_layer_local_spec(normalization="RMSNorm")
    parts: Any = layer.submodules  # Megatron types a spec's submodules as objects
    parts.input_layernorm = RMSNorm
    parts.pre_mlp_layernorm = RMSNorm
    attention = parts.self_attention.submodules
    attention.core_attention = PackedCoreAttention
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    block = TransformerBlockSubmodules(
        layer_specs=[layer] * get_num_layers_to_build(config, vp_stage),
        layer_norm=ModuleSpec(RMSNorm),
    )
    return ModuleSpec(TransformerBlock, submodules=block)
