"""Chunks of the language-model head on numbers a person can check."""

from __future__ import annotations

import pytest

from megatron_oreal.config.head_chunks import chunk_tokens, logit_bytes, most_chunk_tokens
from megatron_oreal.config.schema import Config, EngineConfig, ModelConfig


def config(precision: str = "bf16", **engine: object) -> Config:
    model = ModelConfig(path="x", precision=precision)  # pyright: ignore[reportArgumentType]
    return Config(model=model, engine=EngineConfig(**engine))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("precision", "fp32_logits", "size", "most"),
    [("bf16", False, 2, 1544), ("bf16", True, 6, 514), ("fp32", False, 4, 772)],
)
def test_a_chunk_has_448_mib(precision: str, fp32_logits: bool, size: int, most: int) -> None:
    """469,762,048 bytes over 152,064 words."""
    settings = config(precision, head_logits_fp32=fp32_logits)
    assert logit_bytes(settings) == size
    assert most_chunk_tokens(settings, 152_064) == most
    assert most_chunk_tokens(config(head_chunk_tokens=7), 152_064) == 7


@pytest.mark.parametrize(
    ("most", "tokens", "each"),
    [
        (1544, 16_384, 1536),  # 11 chunks of 1,490, in multiples of 128
        (12_357, 16_384, 8192),  # two
        (1544, 100, 128),  # one, of which 100 are there
        (4, 9, 4),
        (4, 0, 1),
    ],
)
def test_chunks_are_few_and_even(most: int, tokens: int, each: int) -> None:
    assert chunk_tokens(most, tokens) == each
