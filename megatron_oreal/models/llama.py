"""Llama 3 and what is shaped like it (SmolLM2, DeepSeek-R1-Distill-Llama): no bias anywhere."""

from __future__ import annotations

from functools import partial

from megatron_oreal.models.dense import dense_rows
from megatron_oreal.models.family import Family
from megatron_oreal.models.hf_config import read_decoder_dims

LLAMA = Family(
    name="llama",
    read_dims=partial(read_decoder_dims, family="llama"),
    rows=dense_rows(qkv_bias=False, qk_norm=False),
)
