"""The table that dense decoders share; families differ in the bias of q, k, v and in their norms.

Every such family is RMSNorm, rotary embeddings, grouped-query attention and a gated SiLU MLP.
"""

from __future__ import annotations

from megatron_oreal.models.family import HfTensor, Row

_HF = "model.layers.{i}."
_HF_ATTENTION = _HF + "self_attn."
_MEGATRON = "decoder.layers.{i}."
_MEGATRON_ATTENTION = _MEGATRON + "self_attention."

_EMBEDDING = Row(
    "vocab",
    ("embedding.word_embeddings.weight",),
    (HfTensor("model.embed_tokens.weight", ("vocab", "hidden")),),
)
_INPUT_NORM = Row(
    "replicated",
    (_MEGATRON + "input_layernorm.weight", _MEGATRON_ATTENTION + "linear_qkv.layer_norm_weight"),
    (HfTensor(_HF + "input_layernorm.weight", ("hidden",)),),
)
_QKV = Row(
    "qkv",
    (_MEGATRON_ATTENTION + "linear_qkv.weight",),
    (
        HfTensor(_HF_ATTENTION + "q_proj.weight", ("query_rows", "hidden")),
        HfTensor(_HF_ATTENTION + "k_proj.weight", ("kv_rows", "hidden")),
        HfTensor(_HF_ATTENTION + "v_proj.weight", ("kv_rows", "hidden")),
    ),
)
_QKV_BIAS = Row(
    "qkv",
    (_MEGATRON_ATTENTION + "linear_qkv.bias",),
    (
        HfTensor(_HF_ATTENTION + "q_proj.bias", ("query_rows",)),
        HfTensor(_HF_ATTENTION + "k_proj.bias", ("kv_rows",)),
        HfTensor(_HF_ATTENTION + "v_proj.bias", ("kv_rows",)),
    ),
)
_QUERY_NORM = Row(
    "replicated",
    (_MEGATRON_ATTENTION + "q_layernorm.weight",),
    (HfTensor(_HF_ATTENTION + "q_norm.weight", ("head_dim",)),),
)
_KEY_NORM = Row(
    "replicated",
    (_MEGATRON_ATTENTION + "k_layernorm.weight",),
    (HfTensor(_HF_ATTENTION + "k_norm.weight", ("head_dim",)),),
)
_ATTENTION_OUTPUT = Row(
    "row",
    (_MEGATRON_ATTENTION + "linear_proj.weight",),
    (HfTensor(_HF_ATTENTION + "o_proj.weight", ("hidden", "query_rows")),),
)
_MLP_NORM = Row(
    "replicated",
    (_MEGATRON + "pre_mlp_layernorm.weight", _MEGATRON + "mlp.linear_fc1.layer_norm_weight"),
    (HfTensor(_HF + "post_attention_layernorm.weight", ("hidden",)),),
)
_GATE_UP = Row(
    "gate_up",
    (_MEGATRON + "mlp.linear_fc1.weight",),
    (
        HfTensor(_HF + "mlp.gate_proj.weight", ("ffn", "hidden")),
        HfTensor(_HF + "mlp.up_proj.weight", ("ffn", "hidden")),
    ),
)
_DOWN = Row(
    "row",
    (_MEGATRON + "mlp.linear_fc2.weight",),
    (HfTensor(_HF + "mlp.down_proj.weight", ("hidden", "ffn")),),
)
_FINAL_NORM = Row(
    "replicated",
    ("decoder.final_layernorm.weight",),
    (HfTensor("model.norm.weight", ("hidden",)),),
)
_OUTPUT = Row("vocab", ("output_layer.weight",), (HfTensor("lm_head.weight", ("vocab", "hidden")),))


def dense_rows(*, qkv_bias: bool, qk_norm: bool) -> tuple[Row, ...]:
    """Returns the table of a dense decoder.

    Args:
        qkv_bias: The projections of q, k and v have a bias; no other linear layer ever has.
        qk_norm: Each head of q, and of k, is normalised before the rotary embedding.
    """
    return (
        _EMBEDDING,
        _INPUT_NORM,
        _QKV,
        *((_QKV_BIAS,) if qkv_bias else ()),
        *((_QUERY_NORM, _KEY_NORM) if qk_norm else ()),
        _ATTENTION_OUTPUT,
        _MLP_NORM,
        _GATE_UP,
        _DOWN,
        _FINAL_NORM,
        _OUTPUT,
    )
