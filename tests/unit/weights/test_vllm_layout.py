"""When live parameters count as plain; where they lie is proven against vLLM in the contracts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megatron_oreal.models.qwen2 import QWEN2
from megatron_oreal.weights.vllm_layout import LiveShard, difference, vllm_shapes
from tests.unit.weights.toy import DIMS, TIED

DTYPES = dict.fromkeys(QWEN2.tensors(DIMS), torch.float32)
QKV = "model.layers.0.self_attn.qkv_proj.weight"


def live(size: int = 1) -> dict[str, torch.Tensor]:
    shapes = vllm_shapes(QWEN2, DIMS, 0, size)
    return {name: torch.empty(shape) for name, shape in shapes.items()}


def test_shapes_by_hand():
    """8 query and 2 key-value heads of 4, hidden 16, ffn 24, vocabulary 30 padded to 64."""
    shapes = vllm_shapes(QWEN2, DIMS, 3, 4)
    assert shapes[QKV] == (8 + 4 + 4, 16)
    assert shapes["model.layers.2.mlp.gate_up_proj.weight"] == (12, 16)
    assert shapes["model.layers.2.mlp.down_proj.weight"] == (16, 6)
    assert shapes["model.embed_tokens.weight"] == shapes["lm_head.weight"] == (16, 16)
    assert "lm_head.weight" not in vllm_shapes(QWEN2, TIED, 3, 4)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_what_the_layout_describes_is_plain(size):
    assert difference(LiveShard(live(size), 0, size), QWEN2, DIMS, DTYPES) == ""


@pytest.mark.parametrize(
    ("parameter", "why"),
    [
        (None, f"{QKV} is missing"),
        (torch.empty(0), f"{QKV} has shape (0,), not (48, 16)"),
        (torch.empty(16, 48).T, f"{QKV} has strides (1, 48)"),
        (torch.empty(48, 16, dtype=torch.bfloat16), f"{QKV} is torch.bfloat16, not torch.float32"),
    ],
)
def test_what_is_not_plain_is_named(parameter, why):
    found = live()
    del found[QKV]
    if parameter is not None:
        found[QKV] = parameter
    assert difference(LiveShard(found, 0, 1), QWEN2, DIMS, DTYPES) == why


def test_a_parameter_that_no_layout_has_is_named():
    """As a quantised layer has its scales."""
    found = live() | {"model.layers.0.self_attn.qkv_proj.weight_scale": torch.empty(1)}
    why = "model.layers.0.self_attn.qkv_proj.weight_scale is no parameter of the layout"
    assert difference(LiveShard(found, 0, 1), QWEN2, DIMS, DTYPES) == why


def test_another_vocabulary_is_not_this_layout():
    larger = replace(DIMS, vocab=100)
    why = difference(LiveShard(live(), 0, 1), QWEN2, larger, DTYPES)
    assert "has shape (64, 16), not (128, 16)" in why
