"""Reads the `config.json` of a dense decoder; what it asks for and we lack is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec

from megatron_oreal.config.errors import UserError
from megatron_oreal.models.family import ModelDims

if TYPE_CHECKING:
    from collections.abc import Mapping

PositiveInt = Annotated[int, msgspec.Meta(gt=0)]
PositiveFloat = Annotated[float, msgspec.Meta(gt=0)]

# What every Llama 3 has, and the only bounds that Megatron-Core computes with.
_LLAMA3_BOUNDS = {
    "low_freq_factor": 1,
    "high_freq_factor": 4,
    "original_max_position_embeddings": 8192,
}


class Rope(msgspec.Struct):
    """Rotary embeddings: `rope_scaling` of transformers 4, `rope_parameters` of 5."""

    rope_theta: PositiveFloat | None = None
    rope_type: str | None = None
    type: str | None = None
    factor: PositiveFloat | None = None
    low_freq_factor: PositiveFloat | None = None
    high_freq_factor: PositiveFloat | None = None
    original_max_position_embeddings: PositiveInt | None = None


class DecoderConfig(msgspec.Struct):
    """The keys that shape a dense decoder; those with a default may be absent."""

    num_hidden_layers: PositiveInt
    hidden_size: PositiveInt
    intermediate_size: PositiveInt
    num_attention_heads: PositiveInt
    num_key_value_heads: PositiveInt
    vocab_size: PositiveInt
    max_position_embeddings: PositiveInt
    rms_norm_eps: PositiveFloat
    hidden_act: Literal["silu"] = "silu"
    head_dim: PositiveInt | None = None
    tie_word_embeddings: bool = False
    use_sliding_window: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    rope_theta: PositiveFloat | None = None
    rope_scaling: Rope | None = None
    rope_parameters: Rope | None = None


def read_config_json(folder: str | Path) -> dict[str, Any]:
    """Returns the `config.json` of a model folder; not collective.

    Raises:
        UserError: There is none, or it is not a JSON object.
    """
    path = Path(folder) / "config.json"
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except OSError as error:
        reason = error.strerror
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        reason = str(error)
    raise UserError(
        f"model.path={folder}: cannot read {path.name} ({reason}); name a Hugging Face model folder"
    )


def read_decoder_dims(
    config_json: Mapping[str, Any], *, family: str, qkv_bias: bool = False, qk_norm: bool = False
) -> ModelDims:
    """Returns the dimensions that a decoder's `config.json` describes.

    Args:
        config_json: The parsed file.
        family: Name of the family.
        qkv_bias: The family's q, k and v have a bias, which is not in the file.
        qk_norm: The family normalises the heads of q and k.

    Raises:
        UserError: A key is missing or malformed, or asks for something that is not supported.
    """
    try:
        config = msgspec.convert(dict(config_json), DecoderConfig)
    except msgspec.ValidationError as error:
        raise UserError(f"config.json of a {family} model: {error}; mend the checkpoint") from error
    _refuse_unsupported(config)
    if config.num_attention_heads % config.num_key_value_heads:
        raise UserError(
            f"config.json: num_attention_heads={config.num_attention_heads} is not a multiple of "
            f"num_key_value_heads={config.num_key_value_heads}; mend the checkpoint"
        )
    return ModelDims(
        family=family,
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=_head_dim(config),
        ffn=config.intermediate_size,
        vocab=config.vocab_size,
        max_positions=config.max_position_embeddings,
        rope_theta=_rope_theta(config),
        rope_factor=_rope_factor(config),
        norm_eps=config.rms_norm_eps,
        tied_embeddings=config.tie_word_embeddings,
        qkv_bias=qkv_bias,
        qk_norm=qk_norm,
    )


def _head_dim(config: DecoderConfig) -> int:
    if config.head_dim is not None:
        return config.head_dim
    if config.hidden_size % config.num_attention_heads:
        raise UserError(
            f"config.json: hidden_size={config.hidden_size} is not a multiple of "
            f"num_attention_heads={config.num_attention_heads}; name head_dim"
        )
    return config.hidden_size // config.num_attention_heads


def _refuse_unsupported(config: DecoderConfig) -> None:
    unsupported = {
        "use_sliding_window": "set it to false if full attention is meant",
        "attention_bias": "use a checkpoint without these biases",
        "mlp_bias": "use a checkpoint without these biases",
    }
    for key, way_out in unsupported.items():
        if getattr(config, key):
            raise UserError(f"config.json: {key}=true is not supported; {way_out}")


def _rope_theta(config: DecoderConfig) -> float:
    in_parameters = config.rope_parameters.rope_theta if config.rope_parameters else None
    theta = in_parameters or config.rope_theta
    if theta is None:
        raise UserError("config.json: rope_theta is missing; add the base of the rotary embeddings")
    return theta


def _rope_factor(config: DecoderConfig) -> float | None:
    """Returns by how much long wavelengths are stretched, None where none are."""
    for key in ("rope_parameters", "rope_scaling"):
        rope: Rope | None = getattr(config, key)
        kind = (rope.rope_type or rope.type) if rope else None
        if rope is None or kind in (None, "default"):
            continue
        if kind != "llama3":
            raise UserError(
                f"config.json: {key} of type {kind!r} is not supported; use a checkpoint with "
                "unscaled rotary embeddings or those of Llama 3"
            )
        bounds = [getattr(rope, name) for name in _LLAMA3_BOUNDS]
        if rope.factor is None or bounds != list(_LLAMA3_BOUNDS.values()):
            wanted = ", ".join(f"{name}={value}" for name, value in _LLAMA3_BOUNDS.items())
            raise UserError(
                f"config.json: {key} of type 'llama3' is supported with a factor and {wanted}, "
                f"not {bounds}; use a checkpoint with these"
            )
        return rope.factor
    return None
