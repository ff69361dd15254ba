"""The folder of an evaluation: every generation, the numbers, a table for a paper."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from megatron_oreal.config.errors import UserError
from megatron_oreal.monitor.metrics import to_json
from megatron_oreal.monitor.run_folder import atomic_write, atomic_write_text
from megatron_oreal.trainer.evaluation import Evaluation
from megatron_oreal.trainer.evaluation_tables import markdown
from megatron_oreal.trainer.scores import SuiteScore
from megatron_oreal.types import RolloutGroup

FORMAT = 1


class EvaluationRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What `results.json` holds.

    Attributes:
        format: of the file.
        model: `model.path`.
        settings: how responses were sampled.
        suites: by name.
    """

    format: int
    model: str
    settings: dict[str, float]
    suites: dict[str, SuiteScore]


@dataclass(frozen=True, slots=True)
class EvaluationFolder:
    """Where an evaluation lies; every method is for one rank only, not collective."""

    root: Path

    @property
    def results(self) -> Path:
        """The numbers, down to each question."""
        return self.root / "results.json"

    def create(self, config_yaml: str) -> None:
        """Makes the folder and writes the config.

        Raises:
            UserError: It holds an evaluation, or cannot be made.
        """
        if self.results.exists():
            raise UserError(f"--output={self.root}: holds an evaluation already; name another")
        try:
            (self.root / "generations").mkdir(parents=True, exist_ok=True)
            atomic_write_text(self.root / "config.yaml", config_yaml)
        except OSError as error:
            why = f"cannot be written ({error.strerror}); name another folder"
            raise UserError(f"--output={self.root}: {why}") from error

    def write_generations(self, suite: str, evaluation: Evaluation) -> None:
        """Writes every response of a suite with its verdict, one a line."""
        path = self.root / "generations" / f"{suite}.jsonl"
        lines = (*_lines(evaluation.sampled, greedy=False), *_lines(evaluation.greedy, greedy=True))
        atomic_write(path, (f"{to_json(line)}\n".encode() for line in lines))

    def write_results(self, record: EvaluationRecord) -> None:
        """Writes the numbers and the table; an evaluation that has them is whole."""
        atomic_write_text(self.root / "table.md", markdown(record))
        atomic_write(self.results, (msgspec.json.format(msgspec.json.encode(record)), b"\n"))

    def read_results(self) -> EvaluationRecord:
        """Reads the numbers.

        Raises:
            UserError: There are none, or not of this format.
        """
        try:
            record = msgspec.json.decode(self.results.read_bytes(), type=EvaluationRecord)
        except OSError as error:
            raise UserError(
                f"{self.results}: {error.strerror}: name the --output of an `evaluate` that ended"
            ) from error
        except msgspec.DecodeError as error:
            raise UserError(f"{self.results}: {error}: evaluate again") from error
        if record.format != FORMAT:
            why = f"has format {record.format}, this version reads {FORMAT}"
            raise UserError(f"{self.results}: {why}: evaluate again")
        return record


def _lines(groups: list[RolloutGroup], *, greedy: bool) -> Iterator[dict[str, Any]]:
    for group in groups:
        prompt = group.prompt
        for sample, (rollout, verdict) in enumerate(
            zip(group.rollouts, group.verdicts, strict=True)
        ):
            yield {
                "id": prompt.id,
                "category": prompt.category,
                "sample": sample,
                "greedy": greedy,
                "question": prompt.question,
                "gold_answer": prompt.gold_answer,
                "response": rollout.text,
                "tokens": len(rollout.tokens),
                "stopped": rollout.stopped,
                "outcome": verdict.outcome,
                "decided_by": verdict.by,
                "reason": verdict.reason,
                "extracted": verdict.extracted,
            }
