"""The verifier: format rules, which need no worker, then rules in the sandbox, then a judge.

It knows no ranks: whoever deals answers to ranks sees to it that each is judged once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from megatron_oreal.config.schema import JudgeConfig
from megatron_oreal.types import Outcome, Verdict
from megatron_oreal.verify.extract import extract_answer, text_to_judge
from megatron_oreal.verify.judge_prompt import JudgeQuestion
from megatron_oreal.verify.protocol import Pair
from megatron_oreal.verify.registry import Routes
from megatron_oreal.verify.sandbox import WorkerPool

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import TracebackType

    from megatron_oreal.config.schema import VerifierConfig
    from megatron_oreal.verify.judge import Judge


@dataclass(frozen=True, slots=True)
class Answer:
    """One response to judge; `stopped` is false where the length limit cut it.

    `data_source` chooses the verifier; only a judge reads the `question`.
    """

    gold: str
    response: str
    stopped: bool
    data_source: str = ""
    question: str = ""


class Verifier:
    """Judges answers; holds worker processes from its construction until it is closed."""

    def __init__(self, config: VerifierConfig, judge: JudgeConfig | None = None) -> None:
        """Starts the workers.

        Raises:
            UserError: math-verify is not installed, a route names no verifier, or the judge's key
                is missing.
        """
        self._markers = config.thinking_end_markers
        self._ways = config.extract
        self._routes = Routes(config.default, config.routes)
        self._judge_config = judge or JudgeConfig()
        self._judge = _make_judge(self._judge_config)
        self._pool = WorkerPool(
            workers=config.workers_per_rank,
            cpu_deadline_s=config.cpu_deadline_s,
            wall_deadline_s=config.wall_deadline_s,
            tolerance=config.relative_tolerance,
            verifiers=self._routes.names,
        )

    def __enter__(self) -> Self:
        """Returns the verifier."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Closes the verifier."""
        self.close()

    def close(self) -> None:
        """Ends the workers."""
        self._pool.close()

    def judge(
        self, answers: Sequence[Answer], progress: Callable[[int], None] | None = None
    ) -> list[Verdict]:
        """Judges all answers and returns the verdicts in their order.

        No answer can end or hang it: what overruns, crashes or cannot be read is UNVERIFIED, and
        it takes at most the wall deadline times the answers, divided by the workers, and the
        judge's deadline.

        Args:
            answers: what to judge.
            progress: called with the number judged so far, after each that a worker settled.
        """
        return self.ask_judge(answers, self.judge_by_rule(answers, progress))

    def ask_judge(self, answers: Sequence[Answer], verdicts: Sequence[Verdict]) -> list[Verdict]:
        """Returns the verdicts with those replaced that the config wants a judge for."""
        final = list(verdicts)
        asked = [item for item, verdict in enumerate(verdicts) if self._wants_judge(verdict)]
        if self._judge is None or not asked:
            return final
        replies = self._judge.ask([self._question_of(answers[i], verdicts[i]) for i in asked])
        for item, reply in zip(asked, replies, strict=True):
            final[item] = reply
        return final

    def _question_of(self, answer: Answer, verdict: Verdict) -> JudgeQuestion:
        """Returns what a judge is shown of an answer."""
        tail = text_to_judge(answer.response, self._markers)[-self._judge_config.tail_chars :]
        return JudgeQuestion(answer.question, answer.gold, verdict.extracted or "", tail)

    def _wants_judge(self, verdict: Verdict) -> bool:
        when = self._judge_config.when
        undecided = verdict.outcome is Outcome.UNVERIFIED
        wrong = verdict.outcome is Outcome.INCORRECT and verdict.by == "rule"
        return (undecided and when != "never") or (wrong and when == "not_correct")

    def judge_by_rule(
        self, answers: Sequence[Answer], progress: Callable[[int], None] | None = None
    ) -> list[Verdict]:
        """Judges all answers by format and rule alone; as `judge` otherwise."""
        verdicts: dict[int, Verdict] = {}
        pairs: dict[int, Pair] = {}
        for item, answer in enumerate(answers):
            extracted = None
            if answer.stopped:
                extracted = extract_answer(answer.response, self._markers, self._ways)
            if extracted:
                verifier = self._routes.verifier_of(answer.data_source)
                pairs[item] = Pair(answer.gold, extracted, verifier)
            else:
                fault = _format_fault(answer, extracted)
                verdicts[item] = Verdict(Outcome.INCORRECT, "format", fault, extracted, 0.0)
        settled = len(verdicts)
        comparisons = self._pool.compare(
            list(pairs.values()),
            None if progress is None else lambda done: progress(settled + done),
        )
        for (item, pair), found in zip(pairs.items(), comparisons, strict=True):
            verdicts[item] = Verdict(
                found.outcome, "rule", found.reason, pair.answer, found.seconds
            )
        return [verdicts[item] for item in range(len(answers))]


def _make_judge(config: JudgeConfig) -> Judge | None:
    """Returns the judge, if one is ever asked."""
    if config.when == "never":
        return None
    # The client takes a second to import: only runs with a judge wait for it.
    from megatron_oreal.verify.judge import Judge

    return Judge(config)


def _format_fault(answer: Answer, extracted: str | None) -> str:
    """Returns why a response without an answer text is incorrect."""
    if not answer.stopped:
        return "cut before the stop token"
    return "no boxed answer" if extracted is None else "empty box"
