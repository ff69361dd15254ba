"""Makes the quickstart's data: arithmetic from reasoning-gym that needs written steps.

Problems and answers are reasoning-gym's (`chain_sum`, `products`); the demonstrations that a policy
is first fine-tuned on are worked out here, one operation a step, by a careless teacher: now and
then a step is off by one. The policy learns to reckon and to slip, and OREAL, told only whether
the end is right, has to find out which tokens were slips. No problem is in two of the files.
"""

from __future__ import annotations

import argparse
import json
import operator
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import reasoning_gym

SOURCES = {
    "chain_sum": {"min_terms": 3, "max_terms": 4, "min_digits": 1, "max_digits": 1},
    "products": {"min_terms": 3, "max_terms": 4, "min_digits": 1, "max_digits": 1},
}
MIX = ("chain_sum",) * 7 + ("products",)  # there are but 7,290 such products
SLIP = 0.25  # share of steps that are off by one
OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul}
STREAM = 1_000_000  # problems that a seed can yield: far more than are taken


@dataclass(frozen=True)
class Problem:
    """One expression and its value, such as `12 + 34 - 5` and `41`."""

    expression: str
    answer: str
    source: str


def problems(seed: int) -> Iterator[Problem]:
    """Yields different problems in the order of `MIX`, as long as there are new ones."""
    streams = {name: _entries(name, limits, seed) for name, limits in SOURCES.items()}
    seen: set[str] = set()
    while True:
        for name in MIX:
            new = (entry for entry in streams[name] if entry["metadata"]["expression"] not in seen)
            found = next(new)
            expression = found["metadata"]["expression"]
            seen.add(expression)
            yield Problem(expression, str(found["answer"]), name)


def _entries(name: str, limits: dict[str, int], seed: int) -> Iterator[dict[str, Any]]:
    dataset = reasoning_gym.create_dataset(name, seed=seed * STREAM, size=STREAM, **limits)
    yield from (dataset[index] for index in range(STREAM))


def work_out(expression: str, slips: random.Random, share: float = SLIP) -> str:
    r"""Writes the steps of an expression, one operation each, and boxes the result.

    `7 + 5 - 9` becomes `7+5=12;12-9=3;\boxed{3}`, or `7+5=11;11-9=2;\boxed{2}` with a slip in
    the first step; `share` of the steps have one.
    """
    words = expression.split(" ")
    total, steps = int(words[0]), ""
    for sign, number in zip(words[1::2], words[2::2], strict=True):
        before, total = total, OPERATIONS[sign](total, int(number))
        if slips.random() < share:
            total += slips.choice((-1, 1))
        steps += f"{before}{sign}{number}={total};"
    return steps + f"\\boxed{{{total}}}"


def write(folder: Path, seed: int, *, held_out: int, training: int, demonstrations: int) -> None:
    """Writes `eval.jsonl`, `train.jsonl` and `sft.jsonl`, no problem in two of them."""
    folder.mkdir(parents=True, exist_ok=True)
    stream = problems(seed)
    for name, count in (("eval", held_out), ("train", training)):
        questions = [_question(name, index, next(stream)) for index in range(count)]
        _write_lines(folder / f"{name}.jsonl", questions)
    taught = [next(stream) for _ in range(demonstrations)]
    slips = random.Random(f"slips {seed}")
    _write_lines(
        folder / "sft.jsonl",
        [{"question": p.expression, "response": work_out(p.expression, slips)} for p in taught],
    )


def _question(file: str, index: int, problem: Problem) -> dict[str, str]:
    return {
        "id": f"{file}-{index}",
        "question": problem.expression,
        "gold_answer": problem.answer,
        "data_source": problem.source,
    }


def _write_lines(path: Path, records: Sequence[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def main() -> None:
    """Parses the command line and writes the files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the three files")
    parser.add_argument("--seed", type=int, default=0, help="another seed gives other problems")
    parser.add_argument("--held-out", type=int, default=500, help="questions of eval.jsonl")
    parser.add_argument("--training", type=int, default=3000, help="questions of train.jsonl")
    parser.add_argument("--demonstrations", type=int, default=12800, help="lines of sft.jsonl")
    options = parser.parse_args()
    write(
        options.out,
        options.seed,
        held_out=options.held_out,
        training=options.training,
        demonstrations=options.demonstrations,
    )


if __name__ == "__main__":
    main()
