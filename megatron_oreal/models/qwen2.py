"""Qwen2 and Qwen2.5 (OREAL-7B and -32B, DeepSeek-R1-Distill-Qwen): only q, k and v have a bias."""

from __future__ import annotations

from functools import partial

from megatron_oreal.models.dense import dense_rows
from megatron_oreal.models.family import Family
from megatron_oreal.models.hf_config import read_decoder_dims

QWEN2 = Family(
    name="qwen2",
    read_dims=partial(read_decoder_dims, family="qwen2", qkv_bias=True),
    rows=dense_rows(qkv_bias=True, qk_norm=False),
)
