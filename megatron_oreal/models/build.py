"""Builds this rank's Megatron model: decoder and embedding are Megatron's own, the head is not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F  # noqa: N812  the name the field uses
from megatron.core.models.gpt import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from megatron_oreal.config.schema import Config, Precision
from megatron_oreal.models.family import Family, ModelDims
from megatron_oreal.models.heads import OutputRows, ScalarHead
from megatron_oreal.models.layer_spec import layer_spec
from megatron_oreal.parallel.context import round_up
from megatron_oreal.parallel.cuda_on_cpu import compute_device, cuda_on_cpu
from megatron_oreal.parallel.topology import Topology

HeadKind = Literal["vocab", "scalar"]
DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}


class PackedGPT(GPTModel):
    """A `GPTModel` over packed sequences that ends with its hidden states; heads stand outside."""

    @staticmethod
    def packed_inputs(tokens: torch.Tensor, packed: PackedSeqParams) -> dict[str, Any]:
        """Returns the arguments of `forward` for packed tokens `[t]`.

        The forward pass is collective over the tensor-parallel group and returns
        `[t/tp or t, 1, h]`: after the final norm on the last pipeline stage, what the next stage
        reads on the others.
        """
        return {
            "input_ids": tokens.unsqueeze(0),
            # Rotary embeddings start anew with each packed sequence; nothing else reads positions.
            "position_ids": tokens.unsqueeze(0),
            "attention_mask": None,
            "packed_seq_params": packed,
        }

    def _postprocess(self, hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return hidden_states

    def named_weights(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """Yields its parameters by Megatron's names, layers counted over the whole model.

        So counted, names are the model's own: no two stages have the same, and every layout has the
        same one.
        """
        first = get_transformer_layer_offset(self.config, self.vp_stage)
        for name, parameter in self.named_parameters():
            yield Family.shift_layer(name, by=first), parameter

    def output_weight(self) -> torch.Tensor:
        """The rows `[v/tp, h]` of the language-model head, ready to be read.

        Where tied they are the embedding's own if this stage has it, a copy of theirs if not.
        """
        embeds_too = self.share_embeddings_and_output_weights and self.pre_process
        weight = self.embedding.word_embeddings.weight if embeds_too else self.output_layer()
        assert weight is not None, "only the last stage holds the head"
        return weight

    def gathered_hidden(self, hidden: torch.Tensor) -> torch.Tensor:
        """Turns the last stage's output into `[t, h]` on every rank of the tensor-parallel group.

        Collective over that group, backward too: each rank's gradient is its part of a sum.
        """
        if self.config.sequence_parallel:
            return gather_from_sequence_parallel_region(hidden).squeeze(1)
        return copy_to_tensor_model_parallel_region(hidden).squeeze(1)


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


def transformer_config(dims: ModelDims, config: Config) -> TransformerConfig:
    """Returns Megatron's configuration of these dimensions under the layout of a run."""
    parallel, engine = config.parallel, config.engine
    dtype = DTYPES[config.model.precision]
    interleaved = parallel.virtual_pipeline > 1
    on_cpu = compute_device().type == "cpu"
    return TransformerConfig(
        num_layers=dims.layers,
        hidden_size=dims.hidden,
        num_attention_heads=dims.heads,
        num_query_groups=dims.kv_heads,
        kv_channels=dims.head_dim,
        ffn_hidden_size=dims.ffn,
        layernorm_epsilon=dims.norm_eps,
        add_qkv_bias=dims.qkv_bias,
        qk_layernorm=dims.qk_norm,
        add_bias_linear=False,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=F.silu,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline if interleaved else None,
        # Interleaved, two stages send both ways at a time: only with a request each do they know
        # what is what.
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not interleaved,
        num_layers_in_first_pipeline_stage=parallel.first_stage_layers,
        num_layers_in_last_pipeline_stage=parallel.last_stage_layers,
        context_parallel_size=parallel.context,
        sequence_parallel=parallel.sequence_parallel and parallel.tensor > 1,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=config.model.precision == "bf16",
        # Packed micro-batches differ in length.
        variable_seq_lengths=parallel.pipeline > 1 and not engine.pad_to_budget,
        # Dense models have no experts, yet the default dispatcher is refused with varying lengths.
        moe_token_dispatcher_type="alltoall",
        calculate_per_token_loss=True,  # Megatron adds up, the objective divides
        use_cpu_initialization=on_cpu,
        perform_initialization=False,  # every weight comes from a checkpoint
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        apply_rope_fusion=False,
        # Interleaved, outputs are freed while they are being sent. Streams make that safe; gloo
        # reads the memory only once the receiver asks.
        deallocate_pipeline_outputs=parallel.pipeline > 1 and not on_cpu,
        **_RECOMPUTATION[engine.recompute],
    )


def build_stages(
    dims: ModelDims, config: Config, topology: Topology, *, head: HeadKind
) -> list[PackedGPT]:
    """Builds this rank's virtual stages of a model, their weights not yet loaded; not collective.

    They share one Megatron configuration. The scalar head is drawn from `run.seed`. The vocabulary
    is padded to a multiple of the tensor-parallel size.
    """
    settings = transformer_config(dims, config)
    stages = []
    for stage in range(topology.vpp_size):
        vp_stage = stage if topology.vpp_size > 1 else None
        with cuda_on_cpu():
            model = PackedGPT(
                settings,
                layer_spec(settings, vp_stage),
                vocab_size=round_up(dims.vocab, topology.tp_size),
                max_sequence_length=dims.max_positions,
                pre_process=topology.has_embedding(stage),
                post_process=topology.has_head(stage),
                share_embeddings_and_output_weights=dims.tied_embeddings and head == "vocab",
                position_embedding_type="rope",
                rotary_base=dims.rope_theta,  # pyright: ignore[reportArgumentType]  a float does
                rope_scaling=dims.rope_factor is not None,
                rope_scaling_factor=dims.rope_factor or 1.0,
                vp_stage=vp_stage,
            )
            _mark_shards(model)
            if topology.has_head(stage):
                scores = ScalarHead(settings, config.run.seed) if head == "scalar" else None
                rows = OutputRows(model.output_layer.weight)
                model.register_module("output_layer", scores or rows)
            stages.append(model.to(compute_device()))
    return stages


def _mark_shards(model: PackedGPT) -> None:
    """Marks the weights that are cut over tensor parallelism, as Megatron does where it draws them.

    Without the mark it takes them for copies and leaves all but rank 0's out of the gradient norm.
    """
    for module in model.modules():
        if isinstance(module, ColumnParallelLinear | VocabParallelEmbedding):
            dim = 0
        elif isinstance(module, RowParallelLinear):
            dim = 1
        else:
            continue
        weight = module.weight  # None in the tied output layer of the first stage
        # Newer Megatrons mark what they do not draw, and refuse a second mark.
        if weight is not None and not hasattr(weight, "tensor_model_parallel"):
            set_tensor_model_parallel_attributes(weight, is_parallel=True, dim=dim, stride=1)
