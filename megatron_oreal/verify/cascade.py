"""The verifier: format rules, which need no worker, then rules in the sandbox, then a judge.

It knows no ranks: whoever deals answers to ranks sees to it that each is judged once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from megatron_oreal.config.schema import JudgeConfig
from megatron_oreal.types import Outcome, Verdict
from megatron_oreal.verify.extract import extract_answer, text_to_judge
from megatron_oreal.verify.futures import known, results, then
from megatron_oreal.verify.judge_prompt import JudgeQuestion
from megatron_oreal.verify.protocol import Comparison, Pair
from megatron_oreal.verify.registry import Routes
from megatron_oreal.verify.sandbox import WorkerPool

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from concurrent.futures import Future
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
        self._workers = config.workers_per_rank
        self._wall_deadline_s = config.wall_deadline_s
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
        """Ends the workers and drops what is under way."""
        self._pool.close()
        if self._judge is not None:
            self._judge.close()

    def judge(
        self, answers: Sequence[Answer], advance: Callable[[int], None] | None = None
    ) -> list[Verdict]:
        """Judges all answers and returns the verdicts in their order.

        No answer can end or hang it: what overruns, crashes or cannot be read is UNVERIFIED, and
        it takes at most `longest_wait_s` of so many answers.

        Args:
            answers: what to judge.
            advance: told that one more is judged, after each.
        """
        return results([self.submit(answer) for answer in answers], advance)

    def submit(self, answer: Answer) -> Future[Verdict]:
        """Begins to judge an answer and returns at once; the verdict comes while others work."""
        return then(self.submit_to_rules(answer), lambda said: self.submit_to_judge(answer, said))

    def longest_wait_s(self, answers: int) -> float:
        """Returns after how many seconds so many answers are judged, whatever they are."""
        rounds = math.ceil(answers / self._workers)
        judge_s = 0.0 if self._judge is None else self._judge_config.deadline_s
        return rounds * self._wall_deadline_s + judge_s

    def submit_to_rules(self, answer: Answer) -> Future[Verdict]:
        """Begins to judge an answer by format and rule alone."""
        extracted = None
        if answer.stopped:
            extracted = extract_answer(answer.response, self._markers, self._ways)
        if not extracted:
            fault = _format_fault(answer, extracted)
            return known(Verdict(Outcome.INCORRECT, "format", fault, extracted, 0.0))
        pair = Pair(answer.gold, extracted, self._routes.verifier_of(answer.data_source))
        return then(self._pool.submit(pair), lambda found: known(_by_rule(extracted, found)))

    def submit_to_judge(self, answer: Answer, said: Verdict) -> Future[Verdict]:
        """Begins to ask the judge, where the config wants one for what the rules said."""
        if self._judge is None or not self._wants_judge(said):
            return known(said)
        tail = text_to_judge(answer.response, self._markers)[-self._judge_config.tail_chars :]
        asked = JudgeQuestion(
            answer.question, answer.gold, said.extracted or "", tail, rule=said.outcome
        )
        return self._judge.submit(asked)

    def _wants_judge(self, said: Verdict) -> bool:
        undecided = said.outcome is Outcome.UNVERIFIED
        wrong = said.outcome is Outcome.INCORRECT and said.by == "rule"
        return undecided or (wrong and self._judge_config.when == "not_correct")


def _by_rule(extracted: str, found: Comparison) -> Verdict:
    return Verdict(found.outcome, "rule", found.reason, extracted, found.seconds)


def _make_judge(config: JudgeConfig) -> Judge | None:
    """Returns the judge, if there is one and it is ever asked."""
    if config.when == "never" or not config.hosts:
        return None
    # The client takes a second to import: only runs with a judge wait for it.
    from megatron_oreal.verify.judge import Judge

    return Judge(config)


def _format_fault(answer: Answer, extracted: str | None) -> str:
    """Returns why a response without an answer text is incorrect."""
    if not answer.stopped:
        return "cut before the stop token"
    return "no boxed answer" if extracted is None else "empty box"
