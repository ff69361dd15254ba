"""Fuzzes extraction and equivalence with hypothesis, in the sandbox, for a number of minutes.

Every round draws responses: pieces of LaTeX, of code and of the verifier's own protocol in any
order, any characters between them. It fails, with the smallest example, where

- the extraction raises, or takes more than half a second of processor time,
- a worker dies of anything but its deadline, or a verdict comes later than deadline and grace,
- a text is called unlike itself, or a number is called equal to another, or unlike itself.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction

import hypothesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from megatron_oreal.config.schema import VerifierConfig
from megatron_oreal.types import Outcome, Verdict
from megatron_oreal.verify.cascade import Answer, Verifier
from megatron_oreal.verify.extract import extract_answer

GRACE_S = 0.5
EXTRACTION_CPU_S = 0.5
EXAMPLES_A_ROUND = 50
WAYS = ("boxed", "announced", "last_number")
PIECES = r"""
\frac \dfrac \sqrt \boxed{ \fbox{ { } ( ) [ ] \{ \} \left( \right] \begin{pmatrix} \end{pmatrix} &
\\ , ; = + - * / ^ _ ! | \pm \cdot \times \pi e i \infty \cup \cap \in \le \ge < > \text{ \mathrm{
\% % ^\circ \degree \sum_{k=1}^ \int \lim_{x\to \binom \log \ln \sin \cos \tan \arctan \overline{
\ldots \mid \emptyset \neq \approx \mathbb{R} \triangle \angle x y n a 0 1 2 3 7 10 42 100 1000
99999999 0.5 .5 1e9 1e-9 1,000 cm km m/s dollars and or answer is </think> $ $$ . ... : A B (C) None
True eval( exec( open( __import__ lambda x: ; import os os.system( f" {{ }} ½ ² ₁ − × π ∞ √ ≤
""".split()  # noqa: SIM905
LATEX = st.lists(st.sampled_from(PIECES) | st.text(max_size=3), max_size=24).map("".join)
SPACED = st.lists(st.sampled_from(PIECES), max_size=24).map(" ".join)
TEXTS = LATEX | SPACED | st.text(alphabet=st.characters(exclude_categories=()), max_size=60)
BOXED = TEXTS.map(lambda text: rf"so \boxed{{{text}}}")
NUMBERS = st.fractions(min_value=-10_000, max_value=10_000, max_denominator=200)


class Fuzzer:
    """Draws, judges and counts; `counts` holds how many answers got which outcome."""

    def __init__(self, verifier: Verifier, wall_deadline_s: float) -> None:
        self._verifier = verifier
        self._longest_s = wall_deadline_s + GRACE_S
        self.counts: Counter[str] = Counter()

    def run(self, seconds: float, seed: int) -> None:
        """Goes from round to round until the time is over.

        Raises:
            AssertionError: with the smallest example that was found.
        """
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            for check in (self._extraction(), self._answers(), self._numbers()):
                hypothesis.seed(seed)(_patient(check))()
            seed += 1

    def judge(self, answers: Sequence[Answer]) -> list[Verdict]:
        """Judges and checks what holds of every verdict."""
        verdicts = self._verifier.judge(answers)
        for answer, verdict in zip(answers, verdicts, strict=True):
            self.counts[verdict.outcome.value] += 1
            self.counts["ended by a deadline"] += verdict.reason.startswith("more than")
            crashed = "worker" in verdict.reason or "pipe" in verdict.reason
            assert not crashed, (answer, verdict)
            assert verdict.seconds <= self._longest_s, (answer, verdict)
        return verdicts

    def _extraction(self):
        @given(TEXTS, TEXTS, st.integers(1, 2000))
        def check(text: str, unit: str, times: int) -> None:
            before = time.process_time()
            extract_answer(text + unit * times, ("</think>",), WAYS)
            spent_s = time.process_time() - before
            assert spent_s < EXTRACTION_CPU_S, spent_s
            self.counts["extracted"] += 1

        return check

    def _answers(self):
        @given(st.lists(st.tuples(TEXTS, BOXED), min_size=1, max_size=8), TEXTS)
        def check(pairs: list[tuple[str, str]], text: str) -> None:
            same = text.strip() or "5"
            answers = [Answer(gold, response, stopped=True) for gold, response in pairs]
            verdicts = self.judge([*answers, Answer(same, rf"\boxed{{{same}}}", stopped=True)])
            taken_whole = verdicts[-1].extracted == same
            assert not (taken_whole and verdicts[-1].outcome is Outcome.INCORRECT), same

        return check

    def _numbers(self):
        @given(st.lists(st.tuples(NUMBERS, NUMBERS), min_size=1, max_size=8))
        def check(pairs: list[tuple[Fraction, Fraction]]) -> None:
            answers = [
                Answer(str(gold), rf"\boxed{{{_latex(number)}}}", stopped=True)
                for gold, other in pairs
                for number in (gold, other)
            ]
            expected = [is_it for gold, other in pairs for is_it in (True, gold == other)]
            for answer, verdict, right in zip(answers, self.judge(answers), expected, strict=True):
                assert (verdict.outcome is Outcome.CORRECT) == right, (answer, verdict)

        return check


def _latex(number: Fraction) -> str:
    sign = "-" if number < 0 else ""
    return rf"{sign}\frac{{{abs(number.numerator)}}}{{{number.denominator}}}"


def _patient(check):
    """Lets a check run without a deadline of its own, and leave nothing on disk."""
    return settings(
        max_examples=EXAMPLES_A_ROUND,
        deadline=None,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.large_base_example],
    )(check)


def main(arguments: Sequence[str] | None = None) -> int:
    """Fuzzes; status 1 where something was found."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=10.0, help="how long (10)")
    parser.add_argument("--seed", type=int, default=0, help="of the first round (0)")
    parser.add_argument("--workers", type=int, default=2, help="processes (2)")
    options = parser.parse_args(arguments)
    config = VerifierConfig(workers_per_rank=options.workers, extract=WAYS)
    with Verifier(config) as verifier:
        fuzzer = Fuzzer(verifier, config.wall_deadline_s)
        try:
            fuzzer.run(60 * options.minutes, options.seed)
        finally:
            print(json.dumps(fuzzer.counts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
