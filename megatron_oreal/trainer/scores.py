"""What an evaluation says of each question, each category and a whole suite."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from megatron_oreal.algorithm.pass_at_k import pass_at_k
from megatron_oreal.algorithm.statistics import Interval, bootstrap_interval
from megatron_oreal.trainer.evaluation import Evaluation, EvaluationResult
from megatron_oreal.types import Outcome, RolloutGroup

UNSORTED = "none given"


@dataclass(frozen=True)
class QuestionScore:
    """One question: how many of its sampled responses are what; `greedy` is null if not asked.

    `tokens_mean` is the mean length of its responses.
    """

    id: str
    category: str
    samples: int
    correct: int
    unverified: int
    truncated: int
    tokens_mean: float
    greedy: bool | None

    def pass_at(self, k: int) -> float:
        """Returns the unbiased chance that k of its responses hold a correct one."""
        return pass_at_k(self.samples, self.correct, k)


@dataclass(frozen=True)
class CategoryScore:
    """avg@n of the questions of one category, 0 to 1."""

    questions: int
    average: float
    interval: Interval


@dataclass(frozen=True)
class SuiteScore:
    """A whole suite; `intervals[k]` is of `result.pass_at[k]`, over resampled questions."""

    result: EvaluationResult
    intervals: dict[int, Interval]
    categories: dict[str, CategoryScore]
    questions: tuple[QuestionScore, ...]


def score(evaluation: Evaluation, seed: int) -> SuiteScore:
    """Counts an evaluation; pass@1 is the mean over all responses, which is called avg@n.

    Args:
        evaluation: Of one suite.
        seed: Of the resampling.
    """
    greedy = {group.prompt.id: bool(_count(group, Outcome.CORRECT)) for group in evaluation.greedy}
    questions = tuple(_question(group, greedy.get(group.prompt.id)) for group in evaluation.sampled)
    by_category: defaultdict[str, list[float]] = defaultdict(list)
    for question in questions:
        by_category[question.category].append(question.pass_at(1))
    return SuiteScore(
        result=evaluation.result,
        intervals={
            k: bootstrap_interval([question.pass_at(k) for question in questions], seed=seed)
            for k in evaluation.result.pass_at
        },
        categories={
            name: CategoryScore(len(rates), fmean(rates), bootstrap_interval(rates, seed=seed))
            for name, rates in sorted(by_category.items())
        },
        questions=questions,
    )


def _question(group: RolloutGroup, greedy: bool | None) -> QuestionScore:
    return QuestionScore(
        id=group.prompt.id,
        category=group.prompt.category or UNSORTED,
        samples=len(group.rollouts),
        correct=_count(group, Outcome.CORRECT),
        unverified=_count(group, Outcome.UNVERIFIED),
        truncated=sum(not rollout.stopped for rollout in group.rollouts),
        tokens_mean=fmean(len(rollout.tokens) for rollout in group.rollouts),
        greedy=greedy,
    )


def _count(group: RolloutGroup, outcome: Outcome) -> int:
    return sum(verdict.outcome is outcome for verdict in group.verdicts)


def values_of(questions: Sequence[QuestionScore], k: int) -> dict[str, float]:
    """Returns pass@k of each question, by its id."""
    return {question.id: question.pass_at(k) for question in questions}
