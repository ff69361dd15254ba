"""Sections of the configuration that say what is asked: questions, demonstrations, evaluations."""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_oreal.config.checks import at_least, require


@dataclass(frozen=True)
class QuestionColumns:
    """In which column of `data.path` each field of a question stands."""

    question: str = "question"
    gold_answer: str = "gold_answer"
    id: str = "id"
    pass_rate: str = "pass_rate"
    data_source: str = "data_source"


@dataclass(frozen=True)
class DataConfig:
    """The training questions."""

    path: str = "???"
    columns: QuestionColumns = field(default_factory=QuestionColumns)
    system_prompt: str | None = None
    balance_by_pass_rate: bool = True
    questions_per_iteration: int = 64

    def __post_init__(self) -> None:
        """Checks the ranges of this section."""
        at_least(self, 1, "questions_per_iteration")


@dataclass(frozen=True)
class DemonstrationColumns:
    """In which column of `sft.path` each field of a demonstration stands."""

    question: str = "question"
    response: str = "response"


@dataclass(frozen=True)
class EvaluationConfig:
    """Held-out questions, inside a run and for `megatron-oreal evaluate`."""

    path: str | None = None
    suites_folder: str = "suites"
    every: int = 0
    at_start: bool = False
    at_end: bool = False
    samples_per_question: int = 8
    pass_at: tuple[int, ...] = (1, 8)
    greedy: bool = True
    max_questions: int | None = None

    def __post_init__(self) -> None:
        """Checks the ranges of this section."""
        at_least(self, 0, "every")
        at_least(self, 1, "samples_per_question")
        if self.max_questions is not None:
            at_least(self, 1, "max_questions")
        ok = bool(self.pass_at) and min(self.pass_at) >= 1
        require(ok, "pass_at", list(self.pass_at), "name one or more k, each 1 or more")
