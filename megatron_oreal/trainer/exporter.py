"""Hugging Face checkpoints of a run, now and then and at its end."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_oreal.config.errors import UserError
from megatron_oreal.engine.roles import Policy
from megatron_oreal.trainer.journal import Journal
from megatron_oreal.trainer.models import ModelSource


@dataclass(frozen=True)
class Exporter:
    """Writes the policy into the run's folder; a `resumed` run may find what it left before."""

    source: ModelSource
    policy: Policy
    journal: Journal
    resumed: bool

    def write(self, name: str) -> Path:
        """Writes a Hugging Face folder and returns its path; collective over the world.

        Raises:
            UserError: The file system refuses, on every rank alike.
        """
        folder = self.journal.folder.hf / name
        with self.journal.phase("export"):
            self.source.export(self.policy, folder, replace=self.resumed)
        return folder

    def write_if_due(self, done: int, last: int) -> None:
        """Does so after every `export.every` iterations but the last; collective over the world.

        A disk that refuses costs this one alone.
        """
        every = self.journal.config.export.every
        if not every or done % every or done == last:
            return
        try:
            self.write(f"iteration_{done:06d}")
        except UserError as error:
            self.journal.say(f"alarm: {error}")
