"""Qwen2 and Qwen2.5 (OREAL-7B and -32B, DeepSeek-R1-Distill-Qwen): only q, k and v have a bias."""

from __future__ import annotations

from functools import partial

from megatron_oreal.models.family import Family, HfTensor, Row
from megatron_oreal.models.hf_config import read_decoder_dims

_HF = "model.layers.{i}."
_MEGATRON = "decoder.layers.{i}."

QWEN2 = Family(
    name="qwen2",
    read_dims=partial(read_decoder_dims, family="qwen2", qkv_bias=True),
    rows=(
        Row(
            "vocab",
            ("embedding.word_embeddings.weight",),
            (HfTensor("model.embed_tokens.weight", ("vocab", "hidden")),),
        ),
        Row(
            "replicated",
            (
                _MEGATRON + "input_layernorm.weight",
                _MEGATRON + "self_attention.linear_qkv.layer_norm_weight",
            ),
            (HfTensor(_HF + "input_layernorm.weight", ("hidden",)),),
        ),
        Row(
            "qkv",
            (_MEGATRON + "self_attention.linear_qkv.weight",),
            (
                HfTensor(_HF + "self_attn.q_proj.weight", ("query_rows", "hidden")),
                HfTensor(_HF + "self_attn.k_proj.weight", ("kv_rows", "hidden")),
                HfTensor(_HF + "self_attn.v_proj.weight", ("kv_rows", "hidden")),
            ),
        ),
        Row(
            "qkv",
            (_MEGATRON + "self_attention.linear_qkv.bias",),
            (
                HfTensor(_HF + "self_attn.q_proj.bias", ("query_rows",)),
                HfTensor(_HF + "self_attn.k_proj.bias", ("kv_rows",)),
                HfTensor(_HF + "self_attn.v_proj.bias", ("kv_rows",)),
            ),
        ),
        Row(
            "row",
            (_MEGATRON + "self_attention.linear_proj.weight",),
            (HfTensor(_HF + "self_attn.o_proj.weight", ("hidden", "query_rows")),),
        ),
        Row(
            "replicated",
            (
                _MEGATRON + "pre_mlp_layernorm.weight",
                _MEGATRON + "mlp.linear_fc1.layer_norm_weight",
            ),
            (HfTensor(_HF + "post_attention_layernorm.weight", ("hidden",)),),
        ),
        Row(
            "gate_up",
            (_MEGATRON + "mlp.linear_fc1.weight",),
            (
                HfTensor(_HF + "mlp.gate_proj.weight", ("ffn", "hidden")),
                HfTensor(_HF + "mlp.up_proj.weight", ("ffn", "hidden")),
            ),
        ),
        Row(
            "row",
            (_MEGATRON + "mlp.linear_fc2.weight",),
            (HfTensor(_HF + "mlp.down_proj.weight", ("hidden", "ffn")),),
        ),
        Row(
            "replicated",
            ("decoder.final_layernorm.weight",),
            (HfTensor("model.norm.weight", ("hidden",)),),
        ),
        Row("vocab", ("output_layer.weight",), (HfTensor("lm_head.weight", ("vocab", "hidden")),)),
    ),
)
