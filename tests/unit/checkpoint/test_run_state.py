"""What may change between a checkpoint and the run that goes on from it."""

from __future__ import annotations

import msgspec
import pytest

from megatron_oreal.checkpoint.run_state import (
    Command,
    RunState,
    changed_versions,
    check_config,
    config_hash,
    differences,
    flat_config,
    library_versions,
)
from megatron_oreal.config.errors import UserError
from megatron_oreal.config.load import config_keys, load_config
from megatron_oreal.config.schema import Config

PATHS = ["model.path=m", "data.path=d.jsonl"]


def make_state(config: Config, command: Command = "train") -> RunState:
    return RunState(
        command=command,
        iteration=3,
        ranks=1,
        steps={},
        metrics_bytes=0,
        seconds={},
        config=flat_config(config),
        config_hash=config_hash(flat_config(config)),
        versions=library_versions(),
    )


def check(*changes: str, command: Command = "train") -> None:
    state = make_state(load_config([], PATHS), command)
    check_config(load_config([], [*PATHS, *changes]), state, command)


def test_every_key_is_compared() -> None:
    assert list(flat_config(load_config([], PATHS))) == list(config_keys())


@pytest.mark.parametrize(
    "change",
    [
        "run.name=x",
        "run.folder=elsewhere",
        "parallel.tensor=2",
        "engine.tokens_per_micro_batch=32768",
        "rollout.max_sequences=8",
        "checkpoint.every=3",
        "monitor.wandb=disabled",
        "export.every=5",
        "evaluation.pass_at=[1,4]",
        "sft.epochs=2",
        "checkpoint.keep_last=7",
    ],
)
def test_harmless_changes(change: str) -> None:
    check(change)


@pytest.mark.parametrize(
    ("change", "old"),
    [
        ("oreal.kl=k1", "k3"),
        ("schedule.iterations=91", "90"),
        ("run.seed=1", "0"),
        ("model.path=other", "m"),
        ("model.precision=fp32", "bf16"),
        ("policy_optimizer.lr=1.0e-06", "5e-07"),
        ("sampling.top_p=1.0", "0.9"),
        ("verifier.cpu_deadline_s=2.0", "3.0"),
    ],
)
def test_other_mathematics_are_refused_unless_allowed(change: str, old: str) -> None:
    key = change.partition("=")[0]
    with pytest.raises(UserError, match=f"^{key}=.*: the run was started with {old}; .*{key}"):
        check(change)
    check(change, f"checkpoint.allow_changes=[{key}]")


def test_fine_tuning_does_not_mind_what_it_does_not_use() -> None:
    check("oreal.kl=k1", "schedule.iterations=91", command="sft")
    with pytest.raises(UserError, match=r"^sft\.epochs=2: the run was started with 1;"):
        check("sft.epochs=2", command="sft")


def test_a_folder_of_another_command_is_refused() -> None:
    config = load_config([], PATHS)
    with pytest.raises(UserError, match=r"^run\.folder=.*its checkpoints are of `sft`"):
        check_config(config, make_state(config, "sft"), "train")


def test_allowed_changes_must_be_keys() -> None:
    with pytest.raises(UserError, match=r"oreal\.kll\]: no such key; did you mean oreal\.kl\?"):
        load_config([], [*PATHS, "checkpoint.allow_changes=[oreal.kll]"])


def test_a_key_the_checkpoint_did_not_know_had_its_default() -> None:
    new = flat_config(load_config([], PATHS))
    old = {key: value for key, value in new.items() if key != "oreal.kl"}
    assert differences(old, new) == []
    assert differences(old, new | {"oreal.kl": "k1"}) == [("oreal.kl", "k3", "k1")]
    assert differences(new | {"gone": 1}, new) == [("gone", 1, "absent")]


def test_other_versions_are_named() -> None:
    state = make_state(load_config([], PATHS))
    assert changed_versions(state) == []
    older = msgspec.structs.replace(state, versions=state.versions | {"torch": "2.0"})
    assert changed_versions(older) == [f"torch 2.0 -> {state.versions['torch']}"]
