"""A small Qwen2 whose Megatron shards are cut here by hand, apart from the code under test."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from megatron_oreal.models.family import ModelDims
from megatron_oreal.models.qwen2 import QWEN2
from megatron_oreal.weights.layout import MegatronPlace

DIMS = ModelDims(
    family="qwen2",
    layers=3,
    hidden=16,
    heads=8,
    kv_heads=2,  # at tensor-parallel size 4 every rank gets half a group
    head_dim=4,
    ffn=24,
    vocab=30,  # padded to 32 at tensor-parallel sizes 2 and 4 here
    max_positions=64,
    rope_theta=10000.0,
    norm_eps=1e-6,
    tied_embeddings=False,
    qkv_bias=True,
)
TIED = replace(DIMS, tied_embeddings=True)


def random_hf(dims: ModelDims, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Returns a checkpoint of random values, seeded."""
    generator = torch.Generator().manual_seed(1)
    return {
        name: torch.randn(shape, generator=generator).to(dtype)
        for name, shape in QWEN2.tensors(dims).items()
    }


def write_hf(folder: Path, dims: ModelDims, tensors: dict[str, torch.Tensor]) -> Path:
    """Writes a checkpoint in two shards, with an index, a config and a tokenizer file."""
    folder.mkdir(parents=True)
    names = sorted(tensors)
    halves = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, held in halves.items():
        save_file({name: tensors[name] for name in held}, folder / file)
    weight_map = {name: file for file, held in halves.items() for name in held}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(config_json(dims)))
    (folder / "tokenizer.json").write_text('{"of": "the source"}')
    return folder


def config_json(dims: ModelDims) -> dict[str, object]:
    """Returns the `config.json` that describes these dimensions."""
    return {
        "model_type": "qwen2",
        "num_hidden_layers": dims.layers,
        "hidden_size": dims.hidden,
        "intermediate_size": dims.ffn,
        "num_attention_heads": dims.heads,
        "num_key_value_heads": dims.kv_heads,
        "head_dim": dims.head_dim,
        "vocab_size": dims.vocab,
        "max_position_embeddings": dims.max_positions,
        "rms_norm_eps": dims.norm_eps,
        "rope_theta": dims.rope_theta,
        "tie_word_embeddings": dims.tied_embeddings,
        "torch_dtype": "float32",
    }


def megatron_shard(
    hf: dict[str, torch.Tensor],
    dims: ModelDims,
    place: MegatronPlace,
    layers: int,
    *,
    fused_norms: bool,
) -> dict[str, torch.Tensor]:
    """Returns what Megatron holds at this place: its parameters, vocabulary padding zero."""
    rank, size = place.tensor_rank, place.tensor_size
    shard = {}
    if place.layer_offset == 0:
        shard["embedding.word_embeddings.weight"] = _vocab(
            hf["model.embed_tokens.weight"], rank, size
        )
    for local in range(layers):
        layer = _layer(hf, dims, f"model.layers.{local + place.layer_offset}.", rank, size)
        shard |= {
            f"decoder.layers.{local}.{_norm_name(n, fused_norms)}": t for n, t in layer.items()
        }
    if place.layer_offset + layers == dims.layers:
        shard["decoder.final_layernorm.weight"] = hf["model.norm.weight"]
        tied_here = dims.tied_embeddings and place.layer_offset == 0
        if not tied_here:
            output = "model.embed_tokens.weight" if dims.tied_embeddings else "lm_head.weight"
            shard["output_layer.weight"] = _vocab(hf[output], rank, size)
    return {name: tensor.clone() for name, tensor in shard.items()}


def _layer(
    hf: dict[str, torch.Tensor], dims: ModelDims, prefix: str, rank: int, size: int
) -> dict[str, torch.Tensor]:
    weight, bias = (_fuse_qkv(hf, dims, f"{prefix}self_attn.", part) for part in ("weight", "bias"))
    gate, up = (hf[f"{prefix}mlp.{half}_proj.weight"].chunk(size)[rank] for half in ("gate", "up"))
    return {
        "input_layernorm.weight": hf[f"{prefix}input_layernorm.weight"],
        "self_attention.linear_qkv.weight": weight.chunk(size)[rank],
        "self_attention.linear_qkv.bias": bias.chunk(size)[rank],
        "self_attention.linear_proj.weight": hf[f"{prefix}self_attn.o_proj.weight"].chunk(size, 1)[
            rank
        ],
        "pre_mlp_layernorm.weight": hf[f"{prefix}post_attention_layernorm.weight"],
        "mlp.linear_fc1.weight": torch.cat([gate, up]),
        "mlp.linear_fc2.weight": hf[f"{prefix}mlp.down_proj.weight"].chunk(size, 1)[rank],
    }


def _fuse_qkv(hf: dict[str, torch.Tensor], dims: ModelDims, prefix: str, part: str) -> torch.Tensor:
    q, k, v = (hf[f"{prefix}{name}_proj.{part}"] for name in "qkv")
    groups = zip(*(tensor.chunk(dims.kv_heads) for tensor in (q, k, v)), strict=True)
    return torch.cat([torch.cat(group) for group in groups])


def _vocab(tensor: torch.Tensor, rank: int, size: int) -> torch.Tensor:
    rows = -(-tensor.shape[0] // (8 * size)) * 8
    padded = torch.zeros(rows * size, tensor.shape[1], dtype=tensor.dtype)
    padded[: tensor.shape[0]] = tensor
    return padded[rank * rows : (rank + 1) * rows]


def _norm_name(name: str, fused: bool) -> str:
    if not fused:
        return name
    fused_names = {
        "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
        "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
    }
    return fused_names.get(name, name)
