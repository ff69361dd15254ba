"""The recipes of configs/: each loads, is valid on its cluster, and holds the published numbers."""

from __future__ import annotations

import re
from functools import reduce
from pathlib import Path

import pytest

from megatron_oreal.algorithm import objectives
from megatron_oreal.config.load import config_keys, load_config
from megatron_oreal.config.schema import Config, OptimizerConfig
from megatron_oreal.config.validate import check_layout, check_model
from megatron_oreal.models.registry import read_model

ROOT = Path(__file__).parents[3]
TARGETS = {"oreal_7b": "91.0", "oreal_dsr1_7b": "94.0", "oreal_32b": "95.0"}
RANKS = {"oreal_7b": 32, "oreal_dsr1_7b": 32, "oreal_32b": 128}
WITHOUT = "_no_token_rm"
RECIPES = [name + end for name in TARGETS for end in ("", WITHOUT)]


def recipe(name: str, *overrides: str) -> Config:
    return load_config([ROOT / "configs" / f"{name}.yaml"], ["data.path=d", *overrides])


def test_every_recipe_is_tested() -> None:
    files = {path.stem for path in (ROOT / "configs").glob("oreal_*.yaml")}
    assert files == set(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_is_valid_on_its_cluster(name: str) -> None:
    config = recipe(name)
    check_layout(config, RANKS[name.removesuffix(WITHOUT)])
    _, dims = read_model(ROOT / config.model.path)
    check_model(config, dims)


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_holds_the_published_hyper_parameters(name: str) -> None:
    config = recipe(name)
    assert (config.data.questions_per_iteration, config.sampling.samples_per_question) == (64, 16)
    assert (config.sampling.max_new_tokens, config.sampling.max_total_tokens) == (14_000, 16_384)
    assert (config.sampling.temperature, config.sampling.top_p) == (1.0, 0.9)
    assert (config.schedule.iterations, config.schedule.warmup_iterations) == (90, 10)
    assert config.policy_optimizer == OptimizerConfig(lr=5e-7, min_lr=1e-7)
    assert config.token_rm_optimizer == OptimizerConfig(lr=2e-6, min_lr=4e-7)
    assert (config.oreal.kl, config.oreal.kl_coefficient) == ("k3", 0.01)
    assert config.model.precision == "bf16"


@pytest.mark.parametrize("name", TARGETS)
def test_the_small_file_only_leaves_out_the_token_reward_model(name: str) -> None:
    whole, without = recipe(name), recipe(name + WITHOUT)
    assert (whole.oreal.token_weights.kind, whole.oreal.selection) == ("threshold", "pairs")
    assert (without.oreal.token_weights.kind, without.oreal.selection) == ("none", "all")
    assert (whole.schedule.freeze_iterations, without.schedule.freeze_iterations) == (10, 0)
    restored = recipe(
        name + WITHOUT,
        "oreal.token_weights.kind=threshold",
        "oreal.selection=pairs",
        "schedule.freeze_iterations=10",
        f"run.name={whole.run.name}",
        f"run.folder={whole.run.folder}",
    )
    assert restored == whole


@pytest.mark.parametrize("name", TARGETS)
def test_the_head_comment_names_the_score_to_reach(name: str) -> None:
    text = (ROOT / "configs" / f"{name}.yaml").read_text(encoding="utf-8")
    assert f"MATH-500 pass@1 {TARGETS[name]}" in text


def test_the_prompt_asks_for_the_form_that_is_judged() -> None:
    for name in ("oreal_7b", "oreal_32b"):
        assert "\\boxed{}" in (recipe(name).data.system_prompt or "")
    assert recipe("oreal_dsr1_7b").data.system_prompt is None


def test_the_stop_token_of_deepseek_is_written_in_its_own_characters() -> None:
    """Full-width bars and word separators, not ASCII."""
    stop = recipe("oreal_dsr1_7b").model.stop_token
    assert stop == "<\uff5cend\u2581of\u2581sentence\uff5c>"


def test_the_reference_differs_from_the_defaults_in_the_keys_that_the_departures_list() -> None:
    values = ["model.path=m", "data.path=d"]
    ours, theirs = load_config([], values), load_config([ROOT / "configs/reference.yaml"], values)
    before, after = (
        {key: value_of(config, key) for key in config_keys()} for config in (ours, theirs)
    )
    changed = {key: after[key] for key in after if after[key] != before[key]}
    assert changed == {
        "verifier.unverified_is_incorrect": True,
        "verifier.thinking_end_markers": ("<conclude>", "**Final Answer**", "</think>"),
    }
    assert all(f"`{key}" in (objectives.__doc__ or "") for key in changed)


def test_the_departures_are_numbered() -> None:
    numbers = re.findall(r"^(\d+)\. ", objectives.__doc__ or "", re.MULTILINE)
    assert numbers == [str(number) for number in range(1, 17)]


def value_of(config: Config, key: str) -> object:
    return reduce(getattr, key.split("."), config)
