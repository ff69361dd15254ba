"""The list of config keys is frozen; `configs/base.yaml` gives each its unit and meaning."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from megatron_oreal.config.errors import UserError
from megatron_oreal.config.load import config_keys, load_config, resolve_config_yaml
from megatron_oreal.config.schema import Config, OptimizerConfig, VerifierConfig

BASE = Path(__file__).parents[3] / "configs" / "base.yaml"
FROZEN = Path(__file__).with_name("keys.txt")


def leaves(content: object, prefix: str = "") -> dict[str, object]:
    if not isinstance(content, dict):
        return {prefix: content}
    inner = [leaves(value, f"{prefix}.{name}".lstrip(".")) for name, value in content.items()]
    return {key: value for part in inner for key, value in part.items()}


def test_the_list_of_keys_is_frozen() -> None:
    assert list(config_keys()) == FROZEN.read_text(encoding="utf-8").split(), (
        "a new key is a deliberate change: add it to keys.txt here and to configs/base.yaml"
    )


def test_base_yaml_holds_every_default() -> None:
    written = leaves(yaml.safe_load(BASE.read_text(encoding="utf-8")))
    assert written == leaves(yaml.safe_load(resolve_config_yaml(Config())))
    assert list(written) == list(config_keys())


def test_base_yaml_gives_each_key_a_unit_and_a_meaning() -> None:
    text = BASE.read_text(encoding="utf-8")
    comment = r"# \[[^\]]+\] .+"
    beside = re.findall(rf"^ *(\w+): .+? {comment}$", text, re.M)
    above = re.findall(rf"^ *{comment}\n(?: *# .+\n)? *(\w+): [^#\n]+$", text, re.M)
    assert sorted(beside + above) == sorted(key.rpartition(".")[2] for key in config_keys())
    assert max(map(len, text.splitlines())) <= 100


def test_base_yaml_loads() -> None:
    config = load_config([BASE], ["model.path=m", "data.path=d"])
    assert config == load_config([], ["model.path=m", "data.path=d"])


def test_a_section_made_in_code_is_checked_too() -> None:
    with pytest.raises(UserError, match=r"^min_lr=1\.0: set it to lr \(0\.1\) or below$"):
        OptimizerConfig(lr=0.1, min_lr=1.0)
    with pytest.raises(UserError, match="leave no marker empty"):
        VerifierConfig(thinking_end_markers=("</think>", ""))
