"""The verifier: format rules, which need no worker, then mathematical equality in the sandbox.

It knows no ranks: whoever deals answers to ranks sees to it that each is judged once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from megatron_oreal.types import Outcome, Verdict
from megatron_oreal.verify.extract import extract_answer
from megatron_oreal.verify.protocol import Pair
from megatron_oreal.verify.sandbox import WorkerPool

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import TracebackType

    from megatron_oreal.config.schema import VerifierConfig


@dataclass(frozen=True, slots=True)
class Answer:
    """One response to judge; `stopped` is false where the length limit cut it."""

    gold: str
    response: str
    stopped: bool
    data_source: str = ""


class Verifier:
    """Judges answers; holds worker processes from its construction until it is closed."""

    def __init__(self, config: VerifierConfig) -> None:
        """Starts the workers.

        Raises:
            UserError: math-verify is not installed.
        """
        self._markers = config.thinking_end_markers
        self._pool = WorkerPool(
            workers=config.workers_per_rank,
            cpu_deadline_s=config.cpu_deadline_s,
            wall_deadline_s=config.wall_deadline_s,
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
        it takes at most the wall deadline times the answers, divided by the workers.

        Args:
            answers: what to judge.
            progress: called with the number judged so far, after each that a worker settled.
        """
        verdicts: dict[int, Verdict] = {}
        pairs: dict[int, Pair] = {}
        for item, answer in enumerate(answers):
            extracted = extract_answer(answer.response, self._markers) if answer.stopped else None
            if extracted:
                pairs[item] = Pair(answer.gold, extracted)
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


def _format_fault(answer: Answer, extracted: str | None) -> str:
    """Returns why a response without an answer text is incorrect."""
    if not answer.stopped:
        return "cut before the stop token"
    return "no boxed answer" if extracted is None else "empty box"
