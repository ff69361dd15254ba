"""What a run says of itself: phases with progress and seconds, metrics, transcripts, a summary."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from megatron_oreal.algorithm import diagnostics, rollout_diagnostics
from megatron_oreal.checkpoint.checkpointer import Resumed
from megatron_oreal.config.load import resolve_config_yaml
from megatron_oreal.config.schema import Config
from megatron_oreal.engine.roles import PolicyStep, TokenRewardStep
from megatron_oreal.monitor.device_memory import DeviceMemory
from megatron_oreal.monitor.metrics import Kind
from megatron_oreal.monitor.profile import IterationProfile, memory_metrics
from megatron_oreal.monitor.progress import Progress
from megatron_oreal.monitor.report.build import page_of_iteration
from megatron_oreal.monitor.run_folder import RunFolder
from megatron_oreal.monitor.sinks import open_sinks
from megatron_oreal.monitor.timers import Timers
from megatron_oreal.monitor.transcripts import (
    read_lines,
    transcript_path,
    write_transcripts,
)
from megatron_oreal.monitor.watchdog import Watchdog
from megatron_oreal.parallel.collectives import (
    agree,
    all_gather_bytes,
    world_rank,
    world_size,
)
from megatron_oreal.types import Advance, PackedBatch, RolloutGroup, advance_nothing

_WANDB_TOKENS = 32_768  # of a page of tokens in wandb, which keeps every one


class Journal:
    """Collects the metrics of an iteration and hands them on; only the first rank writes.

    Opening one is collective over the world: if the run's folder cannot be made, all ranks refuse.
    A folder that holds a run is opened where that is `resumed` or, without a checkpoint, `again`.
    """

    def __init__(
        self, config: Config, steps: int, resumed: Resumed | None = None, *, again: bool = False
    ) -> None:
        self.config = config
        self.enabled = world_rank() == 0
        self.console = Console()
        self.folder = RunFolder.of(config)
        with agree():
            if self.enabled:
                used = again or resumed is not None
                self.folder.create(resolve_config_yaml(config), resume=used)
        with agree():
            self._sinks = open_sinks(
                config,
                self.folder,
                self.console,
                steps=steps,
                enabled=self.enabled,
                keep_bytes=resumed.state.metrics_bytes if resumed else None,
                wandb_id=resumed.state.wandb_id if resumed else "",
            )
        self._progress = Progress(self.enabled, self.console)
        synchronize = torch.cuda.synchronize if torch.cuda.is_available() else None
        self._timers = Timers(synchronize, resumed.state.seconds if resumed else None)
        self._metrics: dict[str, float] = {}
        ranks = self.folder.ranks
        self.watchdog = Watchdog(ranks, world_rank(), world_size(), config.watchdog)
        self._profile: IterationProfile | None = None
        self.device_memory: DeviceMemory | None = None
        if resumed:
            for remark in resumed.remarks:
                self.say(remark)
            self.say(f"resumed from {resumed.folder}")
            if self.metrics_bytes < resumed.state.metrics_bytes:
                self.say(f"{self.folder.metrics} has lost lines from before the checkpoint")

    @contextlib.contextmanager
    def phase(self, name: str, total: int = 0, unit: object = "") -> Iterator[Advance]:
        """Times and watches a phase; a `total` shows a bar, moved by the `advance(n)` it yields."""
        bar = (
            self._progress.task(name, total, unit)
            if total
            else contextlib.nullcontext(advance_nothing)
        )
        profile = self._profile.phase(name) if self._profile else contextlib.nullcontext()
        with self.watchdog.phase(name), self._timers.phase(name), profile, bar as advance:
            yield advance
        if self.device_memory:
            self.device_memory.left(name)

    @contextlib.contextmanager
    def profiled(self, iteration: int) -> Iterator[None]:
        """Profiles the `with` block if `profile.iterations` names it; collective over the world."""
        if iteration not in self.config.profile.iterations:
            yield
            return
        self._profile = profile = IterationProfile(self.config.profile.phases)
        try:
            yield
        finally:
            self._profile = None
        busy = [float(text) for text in all_gather_bytes(str(profile.busy_s).encode())]
        slowest = busy.index(max(busy))
        folder = self.folder.profile / f"iteration_{iteration:06d}"
        if world_rank() in (0, slowest):
            try:
                profile.write(folder, world_rank())
            except OSError as error:
                self.say(f"{folder} is not written: {error}")
        self.say(f"profile of iteration {iteration}: {folder}, of ranks 0 and {slowest} (busiest)")

    def say(self, text: str) -> None:
        """Prints a line, on the first rank."""
        if self.enabled:
            self.console.print(text, highlight=False, soft_wrap=True)

    @contextlib.contextmanager
    def told(self, what: str) -> Iterator[None]:
        """Says where a disk refuses to take `what`, and lets the run go on without."""
        try:
            yield
        except OSError as error:
            self.say(f"alarm: no {what}: {error}")

    def show(self, table: Table) -> None:
        """Prints a table, on the first rank."""
        if self.enabled:
            self.console.print(table)

    @property
    def metrics(self) -> Mapping[str, float]:
        """What is known of the iteration that is under way."""
        return self._metrics

    def add(self, metrics: Mapping[str, float]) -> None:
        """Adds metrics to the iteration that is under way."""
        self._metrics |= metrics

    def generated(self, tokens: int) -> None:
        """Records how fast so many tokens came, after the phase `generate`."""
        rate = tokens / self._timers.seconds("generate")
        self.add({"throughput/generated_tokens_per_s": rate})

    def groups(self, groups: Sequence[RolloutGroup]) -> None:
        """Records what was sampled and how it was judged."""
        self.add(rollout_diagnostics.group_metrics(groups))
        bound = self.config.verifier.unverified_alarm_share
        alarm = self._metrics["rollout/unverified_share"] > bound
        self.add({"rollout/unverified_alarm": float(alarm)})

    def token_rm(self, batch: PackedBatch, step: TokenRewardStep, rate: float) -> None:
        """Records the token reward model's quality on a batch, before its own step."""
        rewards = torch.tensor([trajectory.reward for trajectory in batch.trajectories])
        means = torch.stack([scores.mean() for scores in step.scores])
        self.add(diagnostics.token_rm_metrics(means, rewards))
        self.add(diagnostics.step_metrics("token_rm", step.grad_norm, rate))

    def policy(self, batch: PackedBatch, step: PolicyStep, rate: float) -> None:
        """Records the policy against reference and rollout engine on a batch, before its step."""
        rewards = [trajectory.reward for trajectory in batch.trajectories]
        rollout = [torch.tensor(t.rollout_logprobs) for t in batch.trajectories]
        self.add(
            diagnostics.policy_metrics(self.config.oreal, step.logprobs, batch.fields, step.entropy)
        )
        self.add(diagnostics.token_weight_metrics(batch.fields["token_weight"], rewards))
        self.add(rollout_diagnostics.mismatch_metrics(step.logprobs, rollout))
        self.add(diagnostics.step_metrics("oreal", step.grad_norm, rate))

    def iteration(self, iteration: int, **counts: int) -> None:
        """Records what an iteration came to; collective over the world where devices are watched.

        See `diagnostics.iteration_metrics`.
        """
        self.add(diagnostics.iteration_metrics(self.config.schedule, iteration, **counts))
        if self.device_memory:
            shares = all_gather_bytes(str(self.device_memory.share_of_plan).encode())
            self.add({"memory/share_of_plan": max(map(float, shares))})

    def start(
        self, policy: Sequence[torch.Tensor], reference: Sequence[torch.Tensor], mismatch: float
    ) -> None:
        """Says how far the policy is, before its first step, from reference and rollouts."""
        metrics = rollout_diagnostics.mismatch_metrics(policy, reference)
        largest, kl = metrics["rollout/mismatch_max"], metrics["rollout/mismatch_k3"]
        self.say(
            f"before the first step: policy and reference differ by {largest:.2g} nats at most,"
            f" KL {kl:.2g}; policy and rollouts by {mismatch:.2g} a token"
        )

    def write(self, iteration: int, kind: Kind = "train") -> None:
        """Writes the metrics gathered since the last call, and the seconds of each phase."""
        seconds, wall = self._timers.end_iteration(), self._timers.wall()
        if kind == "train":
            clocks = {"time/iteration_s": sum(seconds.values()), "time/wall_s": wall}
            seconds |= clocks | memory_metrics()
        if self.device_memory:
            seconds |= self.device_memory.end_iteration()
        self._sinks.write(iteration, self._metrics | seconds, kind)
        self._metrics = {}
        if kind == "train":
            self._show_rollouts(iteration)

    def _show_rollouts(self, iteration: int) -> None:
        """Hands wandb, so often, a table of rollouts and a page of their tokens."""
        monitor = self.config.monitor
        due = monitor.wandb_rollouts_every and iteration % monitor.wandb_rollouts_every == 0
        path = transcript_path(self.folder.rollouts, iteration)
        if self.enabled and due and monitor.wandb != "disabled" and path.exists():
            page = page_of_iteration(self.folder.root, iteration, _WANDB_TOKENS)
            self._sinks.show(iteration, read_lines(path), page)

    def vocabulary(self, tokens: Sequence[bytes]) -> None:
        """Leaves the text of each token id beside the transcripts, where any are written."""
        if self.enabled and self.config.monitor.transcripts_per_iteration:
            self.folder.write_vocabulary(tokens)

    def transcripts(
        self, iteration: int, groups: Sequence[RolloutGroup], batch: PackedBatch | None
    ) -> None:
        """Writes a seeded sample of the iteration's rollouts; a refusing disk costs these alone."""
        with self.phase("transcripts"), self.told(f"transcripts of iteration {iteration}"):
            if self.enabled:
                write_transcripts(
                    self.folder.rollouts,
                    iteration,
                    groups,
                    count=self.config.monitor.transcripts_per_iteration,
                    seed=self.config.run.seed,
                    batch=batch,
                )

    @property
    def metrics_bytes(self) -> int:
        """Length of `metrics.jsonl`, 0 on every rank but the first."""
        return self._sinks.metrics_bytes

    @property
    def wandb_id(self) -> str:
        """The id of the run in wandb, on the first rank; empty where there is none."""
        return self._sinks.wandb_id

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds by phase over the whole run, on this rank."""
        return self._timers.totals

    def summarise(self, summary: Mapping[str, Any]) -> None:
        """Writes `summary.json`, with the seconds of each phase over the whole run."""
        if self.enabled:
            of_all = {"seconds": self.seconds, "seed": self.config.run.seed, "ranks": world_size()}
            with self.told("summary.json"):
                self.folder.write_summary({**summary, **of_all})

    def close(self) -> None:
        """Ends what is still open."""
        self._sinks.close()
        self.watchdog.close()
