"""Times the verifier against math-verify called directly, on ordinary answers.

Direct: `parse` and `verify` in this process, without any bound. Ours: extraction, the pool and the
sandbox. Both are timed on the same answers once their tables are built.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import sys
import time
from collections.abc import Sequence

from math_verify import parse, verify

from megatron_oreal.config.schema import VerifierConfig
from megatron_oreal.types import Outcome
from megatron_oreal.verify.cascade import Answer, Verifier

EQUAL_SHARE = 0.75
FORMS = [  # (gold, an answer that is equal to it)
    ("{a}", "{a}"),
    ("{a}", "x = {a}"),
    ("{a}.5", "\\frac{{{twice}}}{{2}}"),
    ("\\frac{{{a}}}{{{prime}}}", "{a}/{prime}"),
    ("{a}\\sqrt{{{prime}}}", "\\sqrt{{{prime}}} \\cdot {a}"),
    ("({a}, {b})", "({a},{b})"),
    ("{a}\\pi", "\\pi \\times {a}"),
    ("x^2+{a}x+{b}", "{b}+{a}x+x^2"),
    ("\\{{{a}, {b}\\}}", "{b}, {a}"),
    ("{a}\\%", "{a}"),
    ("{a}\\text{{ cm}}", "{a}"),
    ("[{a}, \\infty)", "[{a},\\infty)"),
]


def ordinary_answers(count: int, seed: int) -> list[Answer]:
    """Returns answers such as models give, three in four of them equal to the gold answer."""
    chance = random.Random(seed)
    answers = []
    for i in range(count):
        gold, answer = FORMS[i % len(FORMS)]
        a, b = chance.randint(2, 99), chance.randint(100, 999)
        numbers = {"a": a, "b": b, "prime": chance.choice((7, 11, 13)), "twice": 2 * a + 1}
        other = (
            numbers
            if chance.random() < EQUAL_SHARE
            else {**numbers, "a": a + 1, "twice": 2 * a + 3}
        )
        text = f"We add up, and so the answer is $\\boxed{{{answer.format(**other)}}}$."
        answers.append(Answer(gold.format(**numbers), text, stopped=True))
    return answers


def time_direct(answers: Sequence[Answer]) -> tuple[list[float], list[bool]]:
    """Returns seconds and verdict of each answer by math-verify in this process."""
    seconds, verdicts = [], []
    for answer in answers:
        start = time.perf_counter()
        gold = parse(f"${answer.gold}$", parsing_timeout=None)  # pyright: ignore
        given = parse(answer.response, parsing_timeout=None)  # pyright: ignore
        verdicts.append(verify(gold, given, timeout_seconds=None))
        seconds.append(time.perf_counter() - start)
    return seconds, verdicts


def measure(count: int, workers: int, seed: int) -> dict[str, float]:
    """Returns rates, quantiles and their ratio."""
    warm_up, answers = ordinary_answers(2 * len(FORMS), seed + 1), ordinary_answers(count, seed)
    time_direct(warm_up)
    direct, said = time_direct(answers)
    with Verifier(VerifierConfig(workers_per_rank=workers)) as verifier:
        verifier.judge(warm_up * workers)
        start = time.perf_counter()
        verdicts = verifier.judge(answers)
        wall = time.perf_counter() - start
    ours = sorted(verdict.seconds for verdict in verdicts)
    direct.sort()
    rate, direct_rate = count / wall / workers, count / sum(direct)
    same = sum((v.outcome is Outcome.CORRECT) == s for v, s in zip(verdicts, said, strict=True))
    return {
        "answers": count,
        "workers": workers,
        "wall_s": wall,
        "answers_per_s_per_core": rate,
        "direct_answers_per_s_per_core": direct_rate,
        "ratio": rate / direct_rate,
        "p50_ms": 1e3 * ours[count // 2],
        "p99_ms": 1e3 * ours[count * 99 // 100],
        "direct_p50_ms": 1e3 * direct[count // 2],
        "direct_p99_ms": 1e3 * direct[count * 99 // 100],
        "same_verdicts": same,
        "unverified": sum(v.outcome is Outcome.UNVERIFIED for v in verdicts),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--answers", type=int, default=1024, help="how many (1024)")
    parser.add_argument("--workers", type=int, default=2, help="processes (2)")
    parser.add_argument("--seed", type=int, default=0, help="of the answers (0)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(arguments)
    logging.disable()
    found = measure(options.answers, options.workers, options.seed)
    if options.json:
        print(json.dumps(found))
    else:
        for name, value in found.items():
            print(f"{name:32}{value:12.3f}" if isinstance(value, float) else f"{name:32}{value:12}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
