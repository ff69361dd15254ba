"""`megatron-oreal sft`: supervised fine-tuning of an initial policy on the same engine."""

from __future__ import annotations

import contextlib
import hashlib
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

from megatron_oreal.algorithm.objectives import sft_objective
from megatron_oreal.algorithm.schedule import learning_rate
from megatron_oreal.checkpoint.checkpointer import Resumed
from megatron_oreal.config.errors import UserError
from megatron_oreal.config.schema import Config, ScheduleConfig
from megatron_oreal.data.demonstrations import Demonstration, load_demonstrations
from megatron_oreal.data.tokenizer import load_tokenizer, stop_token_id
from megatron_oreal.engine.roles import Policy
from megatron_oreal.models.registry import read_model
from megatron_oreal.parallel.collectives import agree
from megatron_oreal.trainer.exporter import Exporter
from megatron_oreal.trainer.journal import Journal
from megatron_oreal.trainer.models import ModelSource, open_source
from megatron_oreal.trainer.packer import Packer
from megatron_oreal.trainer.resume import (
    SftProgress,
    find_checkpoint,
    read_progress,
    stop_on_signal,
)
from megatron_oreal.trainer.run_alarms import RunAlarms
from megatron_oreal.trainer.saver import Saver
from megatron_oreal.trainer.setup import check_vocabulary
from megatron_oreal.trainer.skipped_steps import SkippedSteps
from megatron_oreal.types import Trajectory


@dataclass(frozen=True)
class FineTuning:
    """A fine-tuning ready to start."""

    config: Config
    source: ModelSource
    policy: Policy
    batches: Epochs
    journal: Journal
    saver: Saver
    exporter: Exporter
    progress: SftProgress
    resumed: Resumed | None
    skipped: SkippedSteps
    alarms: RunAlarms

    def step(self, number: int, packer: Packer, schedule: ScheduleConfig) -> None:
        """Takes one step and writes its metrics; collective over the world."""
        optimizer, trajectories = self.config.sft.optimizer, self.batches[number]
        rate = learning_rate(number, optimizer.lr, optimizer.min_lr, schedule)
        tokens = sum(trajectory.response_length for trajectory in trajectories)
        self.journal.watchdog.begin(number)
        with self.journal.phase("sft"):
            step = self.policy.step(
                packer.pack(trajectories), sft_objective(tokens), rate, settle=False
            )
        self.skipped.took("policy", step)
        self.journal.add(
            {
                "sft/loss": step.loss,
                "sft/grad_norm": step.grad_norm,
                "sft/learning_rate": rate,
                "sft/response_tokens": tokens,
                "sft/skipped_steps": len(self.skipped.reasons),
            }
        )
        self.alarms.end_iteration(number, self.skipped)
        self.journal.write(number)
        self.skipped.end_iteration(number)

    def save(self, done: int) -> None:
        """Begins to save the run after so many steps; collective over the world."""
        self.saver.save(done, self.progress)

    def finish(self) -> None:
        """Writes the result and what there is to say of it; collective over the world."""
        folder = self.exporter.write("final")
        self.journal.summarise({"steps": len(self.batches), "hf": str(folder)})
        self.journal.say(f"Hugging Face checkpoint: {folder}")


def fine_tune(config: Config) -> bool:
    """Trains on demonstrations and exports the result; collective over the world.

    Goes on from the newest checkpoint if there is one. Returns false where a signal stopped it
    before the end, after a checkpoint.

    Raises:
        UserError: Bad input, on every rank alike.
    """
    asked = stop_on_signal(config.checkpoint.stop_within_s)
    with asked as stop, _fine_tuning(config) as run, run.saver:
        stop.watched(run.journal.watchdog)
        last = len(run.batches)
        schedule = ScheduleConfig(
            iterations=last,
            warmup_iterations=min(config.sft.warmup_steps, last),
            freeze_iterations=0,
        )
        packer = Packer.for_layout(run.source.topology, config.engine.tokens_per_micro_batch)
        if config.checkpoint.every and not run.resumed:
            run.save(0)
        for number in range(run.resumed.state.iteration if run.resumed else 0, last):
            with run.journal.profiled(number):
                run.step(number, packer, schedule)
            done = number + 1
            run.exporter.write_if_due(done, last)
            stopped = stop.agreed()
            run.saver.advance()
            if stopped or run.saver.is_due(done, last):
                run.save(done)
            if stopped:
                run.saver.settle()
                run.journal.say(f"stopped by a signal after {done} steps; start it again")
                return False
        run.finish()
    return True


@contextlib.contextmanager
def _fine_tuning(config: Config) -> Iterator[FineTuning]:
    """Builds a fine-tuning and takes it down again; collective over the world."""
    settings = config.sft
    with agree():
        demonstrations = _read(config)
    source = open_source(config)
    progress = SftProgress(_digest(demonstrations))
    checkpointer, resumed = find_checkpoint(config, "sft")
    if resumed and read_progress(resumed, SftProgress) != progress:
        raise UserError(
            f"sft.path={settings.path}: the demonstrations are not those of the checkpoint; bring"
            " them back, or name another run.folder"
        )
    steps = Epochs(demonstrations, settings.epochs, settings.sequences_per_step, config.run.seed)
    with contextlib.ExitStack() as stack:
        journal = Journal(config, len(steps), resumed)
        stack.callback(journal.close)
        stack.enter_context(journal.watchdog.first_error_only())
        with journal.phase("start"):
            policy = Policy(source.dims, config, source.topology, source.load, settings.optimizer)
            models = {"policy": source.stored(policy.model)}
            if resumed:
                resumed.restore(models)
            saver = Saver(checkpointer, journal, models)
            saver.prepare()
        yield FineTuning(
            config=config,
            source=source,
            policy=policy,
            batches=steps,
            journal=journal,
            saver=saver,
            exporter=Exporter(source, policy, journal, resumed is not None),
            progress=progress,
            resumed=resumed,
            skipped=SkippedSteps(config.engine.max_skipped_steps),
            alarms=RunAlarms(journal, resumed.state.iteration if resumed else 0),
        )


class Epochs(Sequence[list[Trajectory]]):
    """The steps of `count` seeded shuffles, made as they are asked for.

    The last step of an epoch may be smaller.
    """

    def __init__(
        self, demonstrations: Sequence[Demonstration], count: int, per_step: int, seed: int
    ) -> None:
        self._demonstrations = demonstrations
        self._per_step = per_step
        self._per_epoch = math.ceil(len(demonstrations) / per_step)
        self._count = count
        self._seed = seed
        self._order: tuple[int, list[int]] = (-1, [])

    def __len__(self) -> int:
        """How many steps."""
        return self._count * self._per_epoch

    def __getitem__(self, number: int) -> list[Trajectory]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Returns the trajectories of a step; 0-based, no slices."""
        if not 0 <= number < len(self):
            raise IndexError(number)
        epoch, step = divmod(number, self._per_epoch)
        start = step * self._per_step
        chosen = self._order_of(epoch)[start : start + self._per_step]
        return [_trajectory(self._demonstrations[i], i) for i in chosen]

    def _order_of(self, epoch: int) -> list[int]:
        if self._order[0] != epoch:
            order = list(range(len(self._demonstrations)))
            random.Random(f"sft {self._seed} {epoch}").shuffle(order)
            self._order = (epoch, order)
        return self._order[1]


def _digest(demonstrations: Sequence[Demonstration]) -> str:
    """Returns a digest of them all, one after another: their text as a whole may be gigabytes."""
    digest = hashlib.sha256()
    for i, demonstration in enumerate(demonstrations):
        digest.update(f"{', ' if i else '['}{demonstration!r}".encode())
    digest.update(b"]")
    return digest.hexdigest()


def _trajectory(demonstration: Demonstration, index: int) -> Trajectory:
    prompt = demonstration.prompt_tokens
    return Trajectory(
        prompt_id=f"line-{index + 1}",
        tokens=prompt + demonstration.response_tokens,
        prompt_length=len(prompt),
        reward=1.0,
        advantage=1.0,
    )


def _read(config: Config) -> list[Demonstration]:
    if config.sft.path is None:
        raise UserError("sft.path=null: name the JSONL file of demonstrations")
    _, dims = read_model(config.model.path)
    tokenizer = load_tokenizer(config.model.path)
    demonstrations = load_demonstrations(
        config.sft.path,
        tokenizer,
        config.data.system_prompt,
        stop_token_id(tokenizer, config.model.stop_token),
        max_total_tokens=config.sampling.max_total_tokens,
        columns=asdict(config.sft.columns),
    )
    texts = (demo.prompt_tokens + demo.response_tokens for demo in demonstrations)
    check_vocabulary(tokenizer, dims.vocab, texts)
    return demonstrations
