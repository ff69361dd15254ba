"""The folder of a run, and the one way in which whole files are written into it."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_oreal.config.errors import UserError
from megatron_oreal.monitor.metrics import to_json

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from megatron_oreal.config.schema import Config


def atomic_write_text(path: Path, text: str) -> None:
    """Writes a file that is there whole or not at all, even if the machine fails; UTF-8."""
    atomic_write(path, (text.encode(),))


def atomic_write(path: Path, parts: Iterable[bytes]) -> None:
    """Writes a file from its parts; it is there whole or not at all, even if the machine fails.

    Raises:
        OSError: The file system refuses; nothing is left of the new file.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.writelines(parts)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)  # the new name lasts only once its folder does
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


@dataclass(frozen=True, slots=True)
class RunFolder:
    """Where everything of a run lies; nothing is made before `create`."""

    root: Path

    @classmethod
    def of(cls, config: Config) -> RunFolder:
        """Returns the folder that a config names."""
        return cls(Path(config.run.folder))

    @property
    def config(self) -> Path:
        """The resolved config of the run as it last started."""
        return self.root / "config.yaml"

    @property
    def metrics(self) -> Path:
        """One line of JSON per iteration and evaluation."""
        return self.root / "metrics.jsonl"

    @property
    def rollouts(self) -> Path:
        """Transcripts, two files an iteration; see `monitor/transcripts.py`."""
        return self.root / "rollouts"

    @property
    def vocabulary(self) -> Path:
        """The text of each token id: a JSON list of strings, one character a byte (Latin-1)."""
        return self.root / "vocabulary.json"

    @property
    def recorded(self) -> Path:
        """Judged groups, one file an iteration, to be trained on again."""
        return self.root / "recorded"

    @property
    def bank(self) -> Path:
        """Responses of iterations that no checkpoint has passed yet."""
        return self.root / "bank"

    @property
    def checkpoints(self) -> Path:
        """What a run resumes from, one folder a checkpoint."""
        return self.root / "checkpoints"

    @property
    def alarms(self) -> Path:
        """One line of JSON where an alarm begins or ends, see `monitor/alarms.py`."""
        return self.root / "alarms.jsonl"

    @property
    def ranks(self) -> Path:
        """Where each rank is, see `whereabouts`, and what is left of one that failed."""
        return self.root / "ranks"

    @property
    def hf(self) -> Path:
        """Hugging Face checkpoints."""
        return self.root / "hf"

    @property
    def profile(self) -> Path:
        """Traces of single iterations, one folder an iteration."""
        return self.root / "profile"

    @property
    def summary(self) -> Path:
        """The result of the run."""
        return self.root / "summary.json"

    def create(self, config_yaml: str, *, resume: bool = False) -> None:
        """Makes the folders and writes the config; on one rank only, not collective.

        Raises:
            UserError: if the folder holds a run and `resume` is false, or cannot be made.
        """
        # A run that was refused at its start leaves an empty file, and nothing to lose.
        if not resume and self.metrics.exists() and self.metrics.stat().st_size:
            raise UserError(f"run.folder={self.root}: holds a run already; name another folder")
        try:
            made = (self.rollouts, self.recorded, self.bank, self.checkpoints, self.ranks, self.hf)
            for folder in made:
                folder.mkdir(parents=True, exist_ok=True)
            for path in self.ranks.iterdir():  # of the start before
                path.unlink()
            atomic_write_text(self.config, config_yaml)
        except OSError as error:
            fix = f"cannot be written ({error.strerror}); name another folder"
            raise UserError(f"run.folder={self.root}: {fix}") from error

    def write_vocabulary(self, tokens: Sequence[bytes]) -> None:
        """Writes the bytes of each token id, for those who read transcripts; on one rank only."""
        atomic_write_text(self.vocabulary, to_json([token.decode("latin-1") for token in tokens]))

    def read_vocabulary(self) -> list[bytes]:
        """Returns the bytes of each token id; none where the run left no vocabulary."""
        if not self.vocabulary.exists():
            return []
        tokens = json.loads(self.vocabulary.read_text(encoding="utf-8"))
        return [token.encode("latin-1") for token in tokens]

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Writes `summary.json`, replacing what was there; on one rank only."""
        atomic_write_text(self.summary, to_json(summary, indent=2) + "\n")
