"""Alarms: rules over the numbers of an iteration, and the file of when each began and ended.

`run.folder/alarms.jsonl` has one line of JSON, an `AlarmEvent`, where an alarm begins and one where
it ends. An alarm is on from its `began` to the next `ended` of its kind; a run that stops for one,
or ends with it, leaves no `ended`. A resumed run drops the lines of iterations that it does again.

| kind | value | begins |
| --- | --- | --- |
| `pass_rate` | `rollout/pass_rate` | below `alarms.min_pass_rate`, `alarms.iterations` in a row |
| `entropy` | `oreal/entropy`, nats | below `alarms.min_entropy`, likewise |
| `mismatch` | `rollout/mismatch_mean`, nats | above `alarms.max_mismatch`, likewise |
| `straggler` | `throughput/slowest_engine_share` | below `alarms.min_engine_share`, likewise |
| `memory` | `memory/share_of_plan` | above `alarms.max_memory_share`, at the first |
| `engine_logprobs` | answers with a log-probability that is not finite | at the first |
| `not_finite` | models whose step was refused for a number that was not finite | at the first |
| `unverified` | `rollout/unverified_share` | above `verifier.unverified_alarm_share`, at once |
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Literal

import msgspec

from megatron_oreal.monitor.metrics import to_json
from megatron_oreal.monitor.run_folder import atomic_write

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from megatron_oreal.config.schema import Config
    from megatron_oreal.config.schema_health import AlarmAction


class Rule(msgspec.Struct, frozen=True):
    """When an alarm of a kind is on, and what comes of it.

    Attributes:
        kind: its name.
        key: of the config, that sets it.
        bound: what the value may reach, and not pass.
        above: whether the value passes upwards; a value that is no number has passed.
        iterations: in a row beyond the bound before the alarm begins.
        action: what comes of it: a line | no step either, as long as it is on | the run's end.
        advice: what to do.
    """

    kind: str
    key: str
    bound: float
    above: bool
    iterations: int
    action: AlarmAction
    advice: str

    def is_beyond(self, value: float) -> bool:
        """Whether a value has passed the bound."""
        return not (value <= self.bound if self.above else value >= self.bound)


class AlarmEvent(msgspec.Struct, frozen=True):
    """A line of `alarms.jsonl`.

    Attributes:
        iteration: from 0; of `sft`, the step.
        event: what happened.
        kind: of the alarm.
        value: at this iteration; "nan", "inf" or "-inf" in the file where it is not finite.
        bound: that it passed or is within again.
        in_a_row: iterations beyond the bound, this one included; at an end, those that were.
        action: see `Rule`.
        advice: what to do, for people.
        text: all of this in a line, as the console has it.
    """

    iteration: int
    event: Literal["began", "ended"]
    kind: str
    value: float
    bound: float
    in_a_row: int
    action: AlarmAction
    advice: str
    text: str


class Alarms:
    """Counts, rule by rule, the iterations in a row beyond its bound; alike on every rank.

    Attributes:
        in_a_row: by kind, before the iteration under way; what a resumed run goes on from.
    """

    def __init__(self, rules: Sequence[Rule], in_a_row: Mapping[str, int] | None = None) -> None:
        self.rules = tuple(rules)
        self.in_a_row = {rule.kind: 0 for rule in self.rules} | dict(in_a_row or {})

    def acting(self, values: Mapping[str, float], action: AlarmAction) -> list[Rule]:
        """Returns the rules of this action whose alarm is on, or begins, with these values.

        A kind without a value is passed over.
        """
        return [
            rule
            for rule in self.rules
            if rule.action == action
            and rule.kind in values
            and rule.is_beyond(values[rule.kind])
            and self.in_a_row[rule.kind] + 1 >= rule.iterations
        ]

    def observe(self, iteration: int, values: Mapping[str, float]) -> list[AlarmEvent]:
        """Counts an iteration and returns what began and ended; no value counts neither way."""
        events = []
        for rule in self.rules:
            if rule.kind not in values:
                continue
            value, before = values[rule.kind], self.in_a_row[rule.kind]
            count = before + 1 if rule.is_beyond(value) else 0
            self.in_a_row[rule.kind] = count
            if count == rule.iterations:
                events.append(_began(rule, iteration, value, count))
            elif before >= rule.iterations and not count:
                events.append(_ended(rule, iteration, value, before))
        return events


def rules_of(config: Config) -> list[Rule]:
    """Returns the rules of a run, without those that the config turns off."""
    settings, rules = config.alarms, []
    if settings.min_pass_rate:
        advice = "look into rollouts/: broken prompts, a verifier that refuses all, a fallen policy"
        rules.append(_rule(config, "pass_rate", "min_pass_rate", False, advice))
    if settings.min_entropy:
        advice = "the policy has stopped exploring: lower the learning rate, raise kl_coefficient"
        rules.append(_rule(config, "entropy", "min_entropy", False, advice))
    if settings.max_mismatch:
        advice = "engine and policy drift apart: try rollout.check_sync=always and check-sync"
        rules.append(_rule(config, "mismatch", "max_mismatch", True, advice))
    if settings.min_engine_share:
        # Never more than a line: what clocks say must not change what is computed.
        key, bound, row = "alarms.min_engine_share", settings.min_engine_share, settings.iterations
        advice = "throughput/slowest_engine_rank keeps all waiting: look at its device and node"
        rules.append(Rule("straggler", key, bound, False, row, "alarm", advice))
    if settings.max_memory_share:
        advice = "memory/<phase>_used_gib says which phase, `plan --calibrate` what it was given"
        key, bound, on = "alarms.max_memory_share", settings.max_memory_share, settings.on_memory
        rules.append(Rule("memory", key, bound, True, 1, on, advice))
    advice = "the engine samples from broken weights or kernels: run check-sync on the checkpoint"
    on = settings.on_engine_logprobs
    key = "alarms.on_engine_logprobs"
    rules.append(Rule("engine_logprobs", key, 0.0, True, 1, on, advice))
    advice = "lower the learning rate, or replay the iteration from recorded/ to find out why"
    rules.append(Rule("not_finite", "engine.max_skipped_steps", 0.0, True, 1, "skip", advice))
    advice = "nobody could decide so many answers: the reasons are in rollouts/"
    bound = config.verifier.unverified_alarm_share
    key = "verifier.unverified_alarm_share"
    rules.append(Rule("unverified", key, bound, True, 1, "alarm", advice))
    return rules


def drop_later(path: Path, first: int) -> None:
    """Drops the lines of iterations from `first` on, and a torn one, before a run does them again.

    Raises:
        OSError: The file system refuses.
    """
    if not path.exists():
        return
    lines = path.read_bytes().splitlines(keepends=True)
    kept = [line for line in lines if line.endswith(b"\n") and _iteration(line) < first]
    if kept != lines:
        atomic_write(path, kept)


def append(path: Path, events: Sequence[AlarmEvent]) -> None:
    """Appends events, on the disk when it returns.

    Raises:
        OSError: The file system refuses.
    """
    with path.open("ab") as file:
        for event in events:
            file.write(f"{to_json(msgspec.to_builtins(event))}\n".encode())
        file.flush()
        os.fsync(file.fileno())


def _iteration(line: bytes) -> int:
    return int(msgspec.json.decode(line)["iteration"])


def _began(rule: Rule, iteration: int, value: float, in_a_row: int) -> AlarmEvent:
    passed = "above" if rule.above else "below"
    row = f", {in_a_row} iterations in a row" if rule.iterations > 1 else ""
    text = (
        f"alarm at iteration {iteration}: {rule.kind} {value:.4g} {passed} {rule.bound:g}"
        f" ({rule.key}){row}: {rule.advice}"
    )
    what = (rule.kind, value, rule.bound, in_a_row, rule.action, rule.advice, text)
    return AlarmEvent(iteration, "began", *what)


def _ended(rule: Rule, iteration: int, value: float, in_a_row: int) -> AlarmEvent:
    text = f"alarm over at iteration {iteration}: {rule.kind} {value:.4g}"
    what = (rule.kind, value, rule.bound, in_a_row, rule.action, rule.advice, text)
    return AlarmEvent(iteration, "ended", *what)


def _rule(config: Config, kind: str, bound: str, above: bool, advice: str) -> Rule:
    settings = config.alarms
    action: AlarmAction = getattr(settings, f"on_{kind}")
    value = getattr(settings, bound)
    return Rule(kind, f"alarms.{bound}", value, above, settings.iterations, action, advice)
