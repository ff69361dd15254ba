"""The model families there are, by the `model_type` of their `config.json`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from megatron_oreal.config.errors import UserError
from megatron_oreal.models.hf_config import read_config_json
from megatron_oreal.models.llama import LLAMA
from megatron_oreal.models.qwen2 import QWEN2
from megatron_oreal.models.qwen3 import QWEN3

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from megatron_oreal.models.family import Family, ModelDims

FAMILIES: dict[str, Family] = {family.name: family for family in (QWEN2, QWEN3, LLAMA)}


def find_family(config_json: Mapping[str, Any]) -> Family:
    """Returns the family of a model's `config.json`.

    Raises:
        UserError: `model_type` is missing or of a family that is not supported.
    """
    supported = ", ".join(FAMILIES)
    if "model_type" not in config_json:
        raise UserError(f"config.json: model_type is missing; supported are {supported}")
    kind = config_json["model_type"]
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise UserError(f"config.json: model_type={kind!r} is unknown; supported are {supported}")
    return FAMILIES[kind]


def read_model(folder: str | Path) -> tuple[Family, ModelDims]:
    """Returns the family and the dimensions of a Hugging Face model folder; not collective.

    Raises:
        UserError: Its `config.json` is missing, malformed, or describes what is not supported.
    """
    config_json = read_config_json(folder)
    try:
        family = find_family(config_json)
        return family, family.read_dims(config_json)
    except UserError as error:
        raise UserError(f"model.path={folder}: {error}") from error
