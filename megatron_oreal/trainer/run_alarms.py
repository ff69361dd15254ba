"""The alarms of a run: fed from its iterations, acted on, said and written down."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from megatron_oreal.algorithm.rollout_diagnostics import mismatch_metrics
from megatron_oreal.config.errors import UserError
from megatron_oreal.engine.megatron_model import Refuse
from megatron_oreal.monitor.alarms import Alarms, append, drop_later, rules_of
from megatron_oreal.trainer.journal import Journal
from megatron_oreal.trainer.skipped_steps import SkippedSteps
from megatron_oreal.types import PackedBatch, RolloutGroup

_METRICS = {
    "pass_rate": "rollout/pass_rate",
    "entropy": "oreal/entropy",
    "mismatch": "rollout/mismatch_mean",
    "unverified": "rollout/unverified_share",
    "straggler": "throughput/slowest_engine_share",
    "memory": "memory/share_of_plan",
}


class RunAlarms:
    """Follows the rules of `monitor/alarms.py` through a run, alike on every rank.

    Attributes:
        in_a_row: by kind, iterations beyond the bound so far; what a resumed run goes on from.
    """

    def __init__(
        self, journal: Journal, first: int = 0, in_a_row: Mapping[str, int] | None = None
    ) -> None:
        """Begins, or goes on, before iteration `first`."""
        self._journal = journal
        self._alarms = Alarms(rules_of(journal.config), in_a_row)
        self._stopping: list[str] = []
        self._write(lambda path: drop_later(path, first))
        self._sampled: dict[str, float] = {}
        self._refused = 0

    @property
    def in_a_row(self) -> dict[str, int]:
        """See the class."""
        return self._alarms.in_a_row

    def sampled(self, groups: Sequence[RolloutGroup]) -> None:
        """Takes what an iteration begins with."""
        rollouts = [rollout for group in groups for rollout in group.rollouts]
        wrong = sum(not all(map(math.isfinite, rollout.logprobs)) for rollout in rollouts)
        self._sampled, self._refused = {"engine_logprobs": float(wrong)}, 0

    def refuse(self, _values: Mapping[str, Sequence[torch.Tensor]] | None = None) -> str:
        """Why what was sampled is not to be trained on; empty where it is."""
        return self._refusal({})

    def refuse_policy(self, batch: PackedBatch) -> Refuse:
        """Returns what says this of a policy's step, given its log-probabilities and entropies."""
        rollout = [torch.tensor(t.rollout_logprobs) for t in batch.trajectories]

        def refuse(values: Mapping[str, Sequence[torch.Tensor]]) -> str:
            entropy = float(torch.cat(list(values["entropy"])).mean())
            seen = mismatch_metrics(values["logprobs"], rollout) | {"oreal/entropy": entropy}
            return self._refusal(seen)

        return refuse

    def end_iteration(self, iteration: int, skipped: SkippedSteps | None = None) -> bool:
        """Takes all of an iteration; says and writes down what began and ended; before its metrics.

        Returns whether an alarm began.
        """
        values = self._values({})
        if skipped and (skipped.updated or skipped.reasons):
            values["not_finite"] = float(len(skipped.reasons) - self._refused)
        self._stopping = [
            f"{rule.kind} {values[rule.kind]:.4g}, bound {rule.bound:g} ({rule.key})"
            for rule in self._alarms.acting(values, "stop")
        ]
        events = self._alarms.observe(iteration, values)
        for event in events:
            self._journal.say(event.text)
        if events:
            self._write(lambda path: append(path, events))
        return any(event.event == "began" for event in events)

    def stop(self, iteration: int) -> None:
        """Ends the run where an alarm of this iteration is to end it.

        Raises:
            UserError: One is; names it.
        """
        if self._stopping:
            raise UserError(
                f"alarms: iteration {iteration} ends the run: {' and '.join(self._stopping)};"
                " replay it from run.folder/recorded to find out why, or set alarms.on_* to alarm"
            )

    def _write(self, write: Callable[[Path], None]) -> None:
        """Writes on the first rank; a disk that refuses costs the lines, and says so."""
        path = self._journal.folder.alarms
        if not self._journal.enabled:
            return
        try:
            write(path)
        except OSError as error:
            self._journal.say(f"{path} is not written: {error}")

    def _refusal(self, seen: Mapping[str, float]) -> str:
        kinds = [rule.kind for rule in self._alarms.acting(self._values(seen), "skip")]
        self._refused += bool(kinds)
        return f"alarm {' and '.join(kinds)}" if kinds else ""

    def _values(self, seen: Mapping[str, float]) -> dict[str, float]:
        metrics = {**self._journal.metrics, **seen}
        known = {kind: metrics[name] for kind, name in _METRICS.items() if name in metrics}
        return known | self._sampled
