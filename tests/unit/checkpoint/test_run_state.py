"""What may change between a checkpoint and the run that goes on from it."""

from __future__ import annotations

import msgspec
import pytest

from megatron_oreal.checkpoint.run_state import (
    Command,
    RunState,
    changed_settings,
    changed_versions,
    check_config,
    config_hash,
    differences,
    flat_config,
    is_mathematics,
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


MATHEMATICS = """
run.seed model.path model.stop_token model.precision engine.head_logits_fp32 engine.head_grad_fp32
fp8.policy.recipe fp8.policy.bf16_layers_at_start fp8.policy.bf16_layers_at_end
fp8.reference.recipe fp8.reference.bf16_layers_at_start fp8.reference.bf16_layers_at_end
fp8.token_rm.recipe fp8.token_rm.bf16_layers_at_start fp8.token_rm.bf16_layers_at_end
fp8.amax_history fp8.amax fp8.margin
data.system_prompt data.balance_by_pass_rate data.questions_per_iteration
sampling.samples_per_question sampling.temperature sampling.top_p sampling.max_new_tokens
sampling.max_total_tokens rollout.quantization rollout.kv_cache_dtype
verifier.cpu_deadline_s verifier.wall_deadline_s verifier.thinking_end_markers verifier.extract
verifier.relative_tolerance verifier.default verifier.routes verifier.max_unverified_share
verifier.unverified_is_incorrect
judge.when judge.model judge.second_vote judge.max_tokens judge.tail_chars
oreal.shaping oreal.selection oreal.token_score oreal.token_weights.kind oreal.token_weights.c_pos
oreal.token_weights.c_neg oreal.token_weights.ratio_pos oreal.token_weights.ratio_neg
oreal.positive_factor oreal.negative_factor oreal.positive_times_advantage oreal.kl
oreal.kl_coefficient
oreal.importance.level oreal.importance.cap oreal.importance.above_cap
schedule.iterations schedule.freeze_iterations schedule.warmup_iterations schedule.count
"""
ADAM = ["lr", "min_lr", "beta1", "beta2", "eps", "weight_decay", "clip_grad"]


def test_every_key_is_known_to_change_the_mathematics_or_not() -> None:
    """A new key is refused on a resume until it stands in one of the lists; it fails here."""
    optimizers = [f"{o}.{key}" for o in ("policy_optimizer", "token_rm_optimizer") for key in ADAM]
    expected = [*MATHEMATICS.split(), *optimizers]
    assert [key for key in config_keys() if is_mathematics(key, "train")] == expected
    assert is_mathematics("of.another.version", "train")


def test_what_fine_tuning_computes() -> None:
    sft = ["sft.epochs", "sft.sequences_per_step", "sft.warmup_steps"]
    sft += [f"sft.optimizer.{key}" for key in ADAM]
    common = ["run.seed", "model.path", "model.stop_token", "model.precision"]
    common += ["engine.head_logits_fp32", "engine.head_grad_fp32"]
    common += [key for key in MATHEMATICS.split() if key.startswith("fp8.policy.")]
    common += ["fp8.amax_history", "fp8.amax", "fp8.margin", "data.system_prompt"]
    assert [key for key in config_keys() if is_mathematics(key, "sft")] == common + sft


def test_all_that_differs_is_shown_and_may_be_allowed_together() -> None:
    changes = ("oreal.kl=k1", "run.seed=1", "run.name=x")
    with pytest.raises(UserError) as refused:
        check(*changes)
    assert str(refused.value) == (
        "run.seed=1: the run was started with 0; oreal.kl=k1: the run was started with k3; set it"
        " back, name another run.folder, or allow it by"
        " checkpoint.allow_changes=[run.seed,oreal.kl]"
    )
    check(*changes, "checkpoint.allow_changes=[run.seed,oreal.kl]")


def test_harmless_changes_are_told() -> None:
    state = make_state(load_config([], PATHS))
    changed = load_config([], [*PATHS, "parallel.tensor=2", "run.folder=elsewhere"])
    assert changed_settings(changed, state) == ["parallel.tensor 1 -> 2"]


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
