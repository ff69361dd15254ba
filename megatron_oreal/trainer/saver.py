"""Saves a run as it goes on, and says what became of it: no disk ends a training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Self

import msgspec

from megatron_oreal.checkpoint.checkpointer import Checkpointer
from megatron_oreal.checkpoint.saving import Outcome
from megatron_oreal.checkpoint.tensors import StoredModel
from megatron_oreal.config.errors import UserError
from megatron_oreal.trainer.journal import Journal


@dataclass(frozen=True)
class Saver:
    """What is saved of a run, `models` by role, and where what happens is told.

    `saved` is called on every rank with the iteration of each checkpoint that is whole. Methods are
    collective over the world, but where they say so. The end of a `with` block waits for the disk.
    """

    checkpointer: Checkpointer
    journal: Journal
    models: Mapping[str, StoredModel]
    saved: Callable[[int], object] = lambda _: None

    def __enter__(self) -> Self:
        """Begins nothing."""
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Waits for the checkpoint that is being written.

        Not after an error that other ranks may not have had: they would wait for each other.
        """
        if kind is None or issubclass(kind, UserError):
            self.settle()

    def prepare(self) -> None:
        """Takes the host memory that checkpoints are copied to, where there will be any."""
        if self.journal.config.checkpoint.every:
            for model in self.models.values():
                model.prepare()

    def save(self, done: int, progress: msgspec.Struct) -> None:
        """Begins the checkpoint after so many iterations; the training waits for its copy alone.

        It waits for the disk as well at the very start, where it is seen to take checkpoints, and
        where it is still busy with the one before.

        Raises:
            UserError: The very first cannot be written.
        """
        with self.journal.phase("checkpoint"):
            self._tell(self.checkpointer.settle())
            outcome = self.checkpointer.save(
                done,
                self.models if done else {},
                metrics_bytes=self.journal.metrics_bytes,
                seconds=self.journal.seconds,
                progress=progress,
                wandb_id=self.journal.wandb_id,
            )
            if not outcome and not (self.journal.config.checkpoint.background and done):
                outcome = self.checkpointer.settle()
        if outcome and outcome.problem and not done:
            fix = "make room or mend it, or name another folder"
            raise UserError(
                f"run.folder={self.journal.folder.root}: cannot save ({outcome.problem}); {fix}"
            )
        self._tell(outcome)

    def is_due(self, done: int, last: int) -> bool:
        """Whether to save after so many iterations of `last`; not collective."""
        return self.checkpointer.is_due(done, last)

    def advance(self) -> None:
        """Sees at the end of an iteration how far the checkpoint is that is being written."""
        self._tell(self.checkpointer.advance())

    def settle(self) -> None:
        """Waits for the checkpoint that is being written, if there is one."""
        with self.journal.phase("checkpoint"):
            self._tell(self.checkpointer.settle())

    def _tell(self, outcome: Outcome | None) -> None:
        if outcome is None:
            return
        if outcome.problem:
            self.journal.say(
                f"alarm: the checkpoint after {outcome.iteration} iterations is not written"
                f" ({outcome.problem}); the ones before are kept, it is tried again after the next"
                " iteration"
            )
        else:
            self.journal.add({"time/checkpoint_write_s": outcome.seconds})
            self.saved(outcome.iteration)
