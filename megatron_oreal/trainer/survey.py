"""Asks a model every question of `data.path` once, K responses each, and keeps what it answers.

What initial data is made of: pass rates, and demonstrations by rejection sampling. The answers lie
in `run.folder/survey`, a checksummed file a chunk; started again, it goes on after the last whole
one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
from rich.console import Console

from megatron_oreal.config.errors import UserError
from megatron_oreal.config.schema import Config
from megatron_oreal.config.validate import check_engines
from megatron_oreal.monitor.progress import Progress
from megatron_oreal.monitor.run_folder import RunFolder
from megatron_oreal.parallel.collectives import (
    agree,
    broadcast_bytes,
    start_world,
    stop_world,
    world_rank,
    world_size,
)
from megatron_oreal.rollout.engine import RolloutEngine
from megatron_oreal.rollout.frames import DamagedRecord
from megatron_oreal.rollout.groups import generate_groups
from megatron_oreal.rollout.record import (
    RecordHeader,
    decode_groups,
    read_header,
    record_path,
    write_groups,
)
from megatron_oreal.trainer.group_source import decisive_header
from megatron_oreal.trainer.judging import Judging
from megatron_oreal.trainer.resume import StopRequest, stop_on_signal
from megatron_oreal.trainer.setup import Texts, read_texts, start_engine
from megatron_oreal.types import Prompt, RolloutGroup
from megatron_oreal.verify.cascade import Verifier

# Its samples are those of no training iteration and no evaluation.
ITERATION = -3


@dataclass(frozen=True)
class Survey:
    """The chunks of a survey, `data.questions_per_iteration` questions each, and their files."""

    config: Config
    texts: Texts
    chunks: list[list[Prompt]]

    @classmethod
    def of(cls, config: Config) -> Survey:
        """Reads the questions; collective over the world.

        Raises:
            UserError: Bad input, on every rank alike.
        """
        with agree():
            if config.rollout.backend == "vllm_server":
                raise UserError("rollout.backend=vllm_server: a survey loads model.path; set vllm")
            check_engines(config, world_size())
        texts = read_texts(config, training=True)
        size, prompts = config.data.questions_per_iteration, texts.training
        chunks = [prompts[start : start + size] for start in range(0, len(prompts), size)]
        return cls(config, texts, chunks)

    @property
    def folder(self) -> Path:
        """Where the answers lie."""
        return RunFolder.of(self.config).root / "survey"

    def take(self) -> bool:
        """Asks what was not asked yet; collective over the world.

        Returns false where a signal stopped it before the end.

        Raises:
            UserError: The folder holds another survey, or cannot be written.
        """
        with agree():
            done = self._done() if world_rank() == 0 else 0
        done = int(broadcast_bytes(str(done).encode()))
        if done == len(self.chunks):
            return True
        with (
            Verifier(self.config.verifier, self.config.judge) as verifier,
            contextlib.closing(start_engine(self.config, self.texts)) as engine,
            stop_on_signal() as stop,
        ):
            return self._ask(done, engine, verifier, stop)

    def groups(self) -> Iterator[RolloutGroup]:
        """Yields the judged groups of all questions, in their order; not collective.

        Raises:
            UserError: A file is damaged.
        """
        for number in range(len(self.chunks)):
            path = record_path(self.folder, number)
            try:
                yield from decode_groups(path.read_bytes())[1]
            except (OSError, DamagedRecord) as error:
                raise UserError(f"{path}: {error}: remove it and start again") from error

    def _ask(self, done: int, engine: RolloutEngine, verifier: Verifier, stop: StopRequest) -> bool:
        samples = self.config.sampling.samples_per_question
        total = samples * sum(map(len, self.chunks))
        progress = Progress(world_rank() == 0, Console(stderr=True))
        with progress.task("survey", total, "responses") as advance:
            advance(samples * sum(map(len, self.chunks[:done])))
            for number in range(done, len(self.chunks)):
                groups = self._answer(self.chunks[number], engine, verifier, advance)
                with agree():
                    if world_rank() == 0:
                        self._write(number, groups)
                if stop.agreed() and number + 1 < len(self.chunks):
                    return False
        return True

    def _answer(
        self,
        prompts: Sequence[Prompt],
        engine: RolloutEngine,
        verifier: Verifier,
        advance: Callable[[int], None],
    ) -> list[RolloutGroup]:
        sampling = self.config.sampling
        judging = Judging(verifier, prompts, sampling.samples_per_question)
        groups = generate_groups(
            engine,
            prompts,
            sampling,
            seed=self.config.run.seed,
            iteration=ITERATION,
            advance=advance,
            finished=judging.take,
        )
        return judging.judge(groups)

    def _write(self, number: int, groups: Sequence[RolloutGroup]) -> None:
        try:
            write_groups(self.folder, self._header(number), groups)
        except OSError as error:
            fix = "make room or mend it, then start again: it goes on from there"
            raise UserError(f"run.folder: answers cannot be written ({error}); {fix}") from error

    def _done(self) -> int:
        """Returns how many chunks are answered, from the first on."""
        for number in range(len(self.chunks)):
            path = record_path(self.folder, number)
            try:
                header = read_header(path)
            except (OSError, DamagedRecord):
                return number
            if header != self._header(number):
                raise UserError(
                    f"run.folder={self.config.run.folder}: holds a survey with another model, other"
                    " questions or settings; name another folder"
                )
        return len(self.chunks)

    def _header(self, number: int) -> RecordHeader:
        chunk = self.chunks[number]
        asked = repr([(prompt.id, prompt.tokens, prompt.gold_answer) for prompt in chunk])
        # A survey's samples are seeded otherwise than a training iteration's of the same number.
        header = decisive_header(self.config, self.texts.vocabulary, number, f"survey of {asked}")
        return msgspec.structs.replace(header, questions=len(chunk))


@contextlib.contextmanager
def survey_of(config: Config) -> Iterator[Survey]:
    """Joins the world of `torchrun` or `srun`, or one of a single rank, and leaves it again."""
    start_world(config.watchdog.timeout_s)
    try:
        yield Survey.of(config)
    finally:
        stop_world()
