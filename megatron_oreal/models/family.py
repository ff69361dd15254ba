"""What a model family is: how its `config.json` becomes dimensions, and where each Hugging Face tensor lies in Megatron."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelDims:
    """The dimensions of a dense decoder, read from a Hugging Face `config.json`; global, not per rank."""

    family: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    max_positions: int
    rope_theta: float
    norm_eps: float
    tied_embeddings: bool
    qkv_bias: bool
