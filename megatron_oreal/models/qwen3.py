"""Qwen3, dense: no bias, each head of q and k is normalised, heads of an explicit size."""

from __future__ import annotations

from functools import partial

from megatron_oreal.models.dense import dense_rows
from megatron_oreal.models.family import Family
from megatron_oreal.models.hf_config import read_decoder_dims

QWEN3 = Family(
    name="qwen3",
    read_dims=partial(read_decoder_dims, family="qwen3", qk_norm=True),
    rows=dense_rows(qkv_bias=False, qk_norm=True),
)
