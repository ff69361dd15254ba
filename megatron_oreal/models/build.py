"""Builds this rank's Megatron model: decoder and embedding are Megatron's own, the head is not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
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
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from megatron_oreal.config.schema import Config
from megatron_oreal.config.schema_precision import Role
from megatron_oreal.models.family import Family, ModelDims
from megatron_oreal.models.heads import OutputRows, ScalarHead
from megatron_oreal.models.kernels import kernels_for
from megatron_oreal.models.layer_spec import layer_spec
from megatron_oreal.models.settings import transformer_config
from megatron_oreal.parallel.context import round_up
from megatron_oreal.parallel.cuda_on_cpu import compute_device, cuda_on_cpu
from megatron_oreal.parallel.topology import Topology

HeadKind = Literal["vocab", "scalar"]
_HEADS: dict[Role, HeadKind] = {"policy": "vocab", "reference": "vocab", "token_rm": "scalar"}


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


def build_stages(
    dims: ModelDims, config: Config, topology: Topology, role: Role
) -> list[PackedGPT]:
    """Builds this rank's virtual stages of a model, their weights not yet loaded; not collective.

    They share one Megatron configuration, the role's own. The scalar head is drawn from `run.seed`.
    The vocabulary is padded to a multiple of the tensor-parallel size.
    """
    kernels, head = kernels_for(config.model.precision), head_of(role)
    settings = transformer_config(dims, config, role, kernels)
    stages = []
    for stage in range(topology.vpp_size):
        vp_stage = stage if topology.vpp_size > 1 else None
        with cuda_on_cpu():
            model = PackedGPT(
                settings,
                layer_spec(settings, vp_stage, kernels),
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
            _check_parameters(model)
            stages.append(model.to(compute_device()))
    return stages


def head_of(role: Role) -> HeadKind:
    """Returns what stands on a model's last hidden states."""
    return _HEADS[role]


def _check_parameters(model: PackedGPT) -> None:
    """Sees that all are plain tensors of one precision: checkpoints and engines are written so."""
    for name, parameter in model.named_parameters():
        kind, dtype = type(parameter), parameter.dtype
        plain = kind is torch.nn.Parameter and dtype == model.config.params_dtype
        assert plain, f"{name} is a {kind.__name__} of {dtype}, not of {model.config.params_dtype}"


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
