"""`config.json` in, dimensions out; a table that names every tensor that transformers has."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

from megatron_oreal.config.errors import UserError
from megatron_oreal.models.family import ModelDims
from megatron_oreal.models.qwen2 import QWEN2
from megatron_oreal.models.registry import FAMILIES, find_family, read_model
from tests.unit.weights.toy import DIMS, TIED, config_json


@pytest.mark.parametrize("dims", [DIMS, TIED], ids=["untied", "tied"])
def test_dims_come_out_of_config_json(dims: ModelDims) -> None:
    assert find_family(config_json(dims)).read_dims(config_json(dims)) == dims


SHAPE = {
    "vocab_size": 30,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
}
CONFIGS = {"qwen2": Qwen2Config, "qwen3": Qwen3Config, "llama": LlamaConfig}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_table_names_the_tensors_that_transformers_has(
    tmp_path: Path, name: str, tied: bool
) -> None:
    """Also reads the `config.json` of transformers 5, with `rope_parameters`."""
    head_dim = {"head_dim": 12} if name == "qwen3" else {}
    config = CONFIGS[name](**SHAPE, **head_dim, tie_word_embeddings=tied)
    config.save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**raw, "model_type": name}))
    family, dims = read_model(tmp_path)
    assert (family.name, dims.family) == (name, name)
    assert (dims.rope_theta, dims.tied_embeddings) == (5000.0, tied)
    assert dims.head_dim == head_dim.get("head_dim", 8)
    assert dims.rope_factor is None
    state = AutoModelForCausalLM.from_config(config).state_dict()
    if tied:
        del state["lm_head.weight"]
    assert family.tensors(dims) == {name: tuple(tensor.shape) for name, tensor in state.items()}


LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_the_scaling_of_llama_3_is_read(key: str) -> None:
    config = {**config_json(DIMS), "model_type": "llama", key: LLAMA3}
    assert find_family(config).read_dims(config).rope_factor == 8.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": None}, "hidden_size"),
        ({"hidden_size": "16"}, "hidden_size"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"rms_norm_eps": -1e-6}, "rms_norm_eps"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"use_sliding_window": True}, "use_sliding_window=true is not supported"),
        ({"num_key_value_heads": 3}, "not a multiple of num_key_value_heads=3"),
        ({"rope_theta": None}, "rope_theta is missing"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_scaling of type 'yarn'"),
        ({"rope_parameters": {"rope_type": "llama3"}}, "rope_parameters of type 'llama3'"),
        (
            {"rope_scaling": {**LLAMA3, "original_max_position_embeddings": 4096}},
            r"original_max_position_embeddings=8192, not \[1.0, 4.0, 4096\]",
        ),
        ({"attention_bias": True}, "attention_bias=true is not supported"),
        ({"mlp_bias": True}, "mlp_bias=true is not supported"),
        ({"head_dim": None, "hidden_size": 18}, "hidden_size=18 is not a multiple"),
    ],
)
def test_what_is_malformed_or_not_supported_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        QWEN2.read_dims({**config_json(DIMS), **change})
    assert "\n" not in str(caught.value)


def test_a_missing_key_is_named() -> None:
    config = config_json(DIMS)
    del config["intermediate_size"]
    with pytest.raises(UserError, match="intermediate_size"):
        QWEN2.read_dims(config)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "gpt2"}, "model_type='gpt2' is unknown; supported are qwen2, qwen3, llama"),
        ({"model_type": ["qwen2"]}, "is unknown"),
        ({}, "model_type is missing; supported are qwen2, qwen3, llama"),
    ],
)
def test_an_unknown_family_is_named(config: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        find_family(config)


@pytest.mark.parametrize("content", [None, b"", b"\xff", b"[1]", b"{"])
def test_a_folder_without_a_readable_config(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(UserError, match=r"cannot read config\.json") as caught:
        read_model(tmp_path)
    assert str(tmp_path) in str(caught.value)
