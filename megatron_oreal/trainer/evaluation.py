"""Scores a policy on held-out questions: mean pass@1 of n samples, unbiased pass@k, greedy."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from megatron_oreal.algorithm.pass_at_k import pass_at_k
from megatron_oreal.config.schema import Config, SamplingConfig
from megatron_oreal.rollout.engine import RolloutEngine
from megatron_oreal.rollout.groups import generate_groups
from megatron_oreal.trainer.judging import Judging
from megatron_oreal.types import Outcome, Prompt, RolloutGroup
from megatron_oreal.verify.cascade import Verifier

# Evaluations draw the same samples whenever they happen, none of them a training sample.
SAMPLED, GREEDY = -1, -2

Progress = Callable[[int], None]


@dataclass(frozen=True)
class EvaluationResult:
    """What an evaluation found; rates are 0 to 1, `pass_at[k]` over all questions."""

    questions: int
    samples_per_question: int
    pass_at: dict[int, float]
    greedy: float | None
    truncated_share: float
    unverified_share: float
    response_length_mean: float
    seconds: float
    tokens_per_s: float

    def metrics(self) -> dict[str, float]:
        """Flat names and floats, as the sinks take them."""
        metrics = {f"eval/pass_at_{k}": value for k, value in self.pass_at.items()}
        if self.greedy is not None:
            metrics["eval/greedy"] = self.greedy
        return metrics | {
            "eval/truncated_share": self.truncated_share,
            "eval/unverified_share": self.unverified_share,
            "eval/response_length_mean": self.response_length_mean,
            "time/eval_s": self.seconds,
            "throughput/eval_tokens_per_s": self.tokens_per_s,
        }


@dataclass(frozen=True)
class Evaluation:
    """What was found, and the judged groups it was found in: `greedy` is empty if not asked."""

    result: EvaluationResult
    sampled: list[RolloutGroup]
    greedy: list[RolloutGroup]


class Evaluator:
    """Evaluates whatever weights the rollout engine holds on one fixed list of questions."""

    def __init__(
        self, config: Config, prompts: Sequence[Prompt], engine: RolloutEngine, verifier: Verifier
    ) -> None:
        self.config = config
        self.prompts = prompts[: config.evaluation.max_questions]
        self._engine = engine
        self._verifier = verifier

    @property
    def responses(self) -> int:
        """How many responses one evaluation generates: the length of its progress bar."""
        return len(self.prompts) * (
            self.config.evaluation.samples_per_question + self.config.evaluation.greedy
        )

    def evaluate(self, advance: Progress) -> Evaluation:
        """Generates, judges, counts; collective over the world, the same result on every rank."""
        started = time.monotonic()
        settings = self.config.evaluation
        sampling = self.config.sampling
        sampled = replace(sampling, samples_per_question=settings.samples_per_question)
        groups = self._answer(sampled, SAMPLED, advance)
        greedy: list[RolloutGroup] = []
        if settings.greedy:
            one = replace(sampling, samples_per_question=1, temperature=0.0, top_p=1.0)
            greedy = self._answer(one, GREEDY, advance)
        rate = fmean(_correct(group) for group in greedy) if greedy else None
        seconds = time.monotonic() - started
        return Evaluation(summarise(groups, settings.pass_at, rate, seconds), groups, greedy)

    def _answer(
        self, sampling: SamplingConfig, iteration: int, advance: Progress
    ) -> list[RolloutGroup]:
        judging = Judging(self._verifier, self.prompts, sampling.samples_per_question)
        groups = generate_groups(
            self._engine,
            self.prompts,
            sampling,
            seed=self.config.run.seed,
            iteration=iteration,
            advance=advance,
            finished=judging.take,
        )
        return judging.judge(groups)


def summarise(
    groups: Sequence[RolloutGroup], ks: Sequence[int], greedy: float | None, seconds: float
) -> EvaluationResult:
    """Counts judged groups; an answer that nobody could decide earns nothing and is reported."""
    samples = len(groups[0].rollouts)
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    verdicts = [verdict for group in groups for verdict in group.verdicts]
    tokens = sum(len(rollout.tokens) for rollout in rollouts)
    return EvaluationResult(
        questions=len(groups),
        samples_per_question=samples,
        pass_at={
            k: fmean(pass_at_k(samples, _correct(group), k) for group in groups)
            for k in sorted(set(ks))
        },
        greedy=greedy,
        truncated_share=fmean(not rollout.stopped for rollout in rollouts),
        unverified_share=fmean(v.outcome is Outcome.UNVERIFIED for v in verdicts),
        response_length_mean=tokens / len(rollouts),
        seconds=seconds,
        tokens_per_s=tokens / seconds,
    )


def _correct(group: RolloutGroup) -> int:
    return sum(verdict.outcome is Outcome.CORRECT for verdict in group.verdicts)
