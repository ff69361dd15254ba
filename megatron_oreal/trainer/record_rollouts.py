"""`megatron-oreal rollout`: samples, judges and records iterations, and trains nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

from megatron_oreal.algorithm import shaping
from megatron_oreal.checkpoint.folder import list_iterations
from megatron_oreal.config.errors import UserError
from megatron_oreal.config.schema import Config
from megatron_oreal.config.validate import check_engines
from megatron_oreal.data.sampler import PromptSampler
from megatron_oreal.data.tokenizer import token_bytes
from megatron_oreal.monitor.run_folder import RunFolder
from megatron_oreal.parallel.collectives import agree, broadcast_bytes, world_rank, world_size
from megatron_oreal.rollout.frames import DamagedRecord
from megatron_oreal.rollout.record import RecordHeader, read_header, record_path, write_groups
from megatron_oreal.trainer.group_source import SampledGroups, decisive_header
from megatron_oreal.trainer.journal import Journal
from megatron_oreal.trainer.resume import stop_on_signal
from megatron_oreal.trainer.run_alarms import RunAlarms
from megatron_oreal.trainer.setup import Texts, open_engines, read_texts
from megatron_oreal.types import Prompt


@dataclass(frozen=True)
class Recording:
    """Iterations whose policy stays the checkpoint of `model.path`."""

    config: Config
    source: SampledGroups
    journal: Journal
    alarms: RunAlarms

    def iterate(self, prompts: list[Prompt], header: RecordHeader) -> None:
        """Leaves the metrics, transcripts and record of an iteration; collective over the world.

        Raises:
            UserError: The record cannot be written, or an alarm is to end the run.
        """
        journal, iteration = self.journal, header.iteration
        groups = self.source.sample(prompts, header)
        journal.groups(groups)
        self.alarms.sampled(groups)
        journal.transcripts(iteration, shaping.shape_rewards(groups, self.config.oreal), None)
        self.alarms.end_iteration(iteration)
        journal.write(iteration)
        # Last: an iteration that has a record is done, and what it left before comes once more.
        with agree(), _refusals():
            if world_rank() == 0:
                write_groups(journal.folder.recorded, header, groups)
                self.source.forget(iteration + 1)
        self.alarms.stop(iteration)


def record_rollouts(config: Config) -> bool:
    """Records `schedule.iterations` iterations, from the first that is not recorded yet.

    Collective over the world. Returns false where a signal stopped it before.

    Raises:
        UserError: Bad input, on every rank alike.
    """
    with agree():
        _check(config)
    texts = read_texts(config, training=True)
    with agree():
        sampler = PromptSampler(texts.training, config.run.seed, config.data.balance_by_pass_rate)
    header = partial(decisive_header, config, texts.vocabulary)
    iterations, first = config.schedule.iterations, _recorded(config, texts)
    with contextlib.ExitStack() as stack:
        journal = Journal(config, iterations, again=first > 0)
        stack.enter_context(contextlib.closing(journal))
        journal.vocabulary(token_bytes(texts.tokenizer))
        stop = stack.enter_context(stop_on_signal(config.checkpoint.stop_within_s))
        stop.watched(journal.watchdog)
        with journal.watchdog.first_error_only(), journal.phase("start"):
            engines = stack.enter_context(open_engines(config, texts, journal))
        # Last, to see an error before the engines do: they would wait for ranks that have failed.
        stack.enter_context(journal.watchdog.first_error_only())
        recording = Recording(config, engines.source, journal, RunAlarms(journal, first))
        journal.say(f"{world_size()} ranks, {iterations} iterations, {first} recorded before")
        for iteration in range(iterations):
            prompts = sampler.next_batch(config.data.questions_per_iteration)
            if iteration < first:
                continue
            journal.watchdog.begin(iteration)
            recording.iterate(prompts, header(iteration))
            if stop.agreed() and iteration + 1 < iterations:
                journal.say(f"stopped by a signal after {iteration + 1} iterations; start it again")
                return False
        journal.summarise({"recorded": str(journal.folder.recorded), "iterations": iterations})
        journal.say(f"train on it by rollout.replay={journal.folder.recorded}")
    return True


def _check(config: Config) -> None:
    check_engines(config, world_size())
    if config.rollout.replay:
        raise UserError(
            f"rollout.replay={config.rollout.replay}: `rollout` samples; set it to null, or `train`"
        )
    folder = RunFolder.of(config)
    if list_iterations(folder.checkpoints):
        raise UserError(f"run.folder={folder.root}: holds a training run; name another folder")


def _recorded(config: Config, texts: Texts) -> int:
    """Returns how many iterations are recorded from the first on; collective over the world."""
    done, folder = 0, RunFolder.of(config).recorded
    if world_rank() == 0:
        with contextlib.suppress(OSError, DamagedRecord):
            header = partial(decisive_header, config, texts.vocabulary)
            while read_header(record_path(folder, done)) == header(done):
                done += 1
    return int(broadcast_bytes(str(done).encode()))


@contextlib.contextmanager
def _refusals() -> Iterator[None]:
    """Turns what the file system refuses into a `UserError`."""
    try:
        yield
    except OSError as error:
        fix = "make room or mend it, then start again: it goes on from there"
        raise UserError(f"run.folder: a record cannot be written ({error}); {fix}") from error
