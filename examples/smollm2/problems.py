"""Makes the questions: arithmetic of reasoning-gym that SmolLM2-135M-Instruct solves now and then.

    problems.py pool --out pool.jsonl                    # all kinds in turn, no question twice
    problems.py choose --rated rated.jsonl --out data    # those solved 10 to 60 times in a hundred

Between the two `tools/estimate_pass_rates.py` measures each question: those of a kind differ more
from each other than the kinds do.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import reasoning_gym

# (name in reasoning-gym, its limits) by name in the files
KINDS: dict[str, tuple[str, dict[str, int]]] = {
    "short products": (
        "products",
        {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 1},
    ),
    "products": ("products", {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2}),
    "sums": ("chain_sum", {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2}),
    "long sums": ("chain_sum", {"min_terms": 3, "max_terms": 3, "min_digits": 1, "max_digits": 1}),
}
STREAM = 100_000  # problems that a seed can yield of a kind: far more than are taken
LEAST, MOST = 0.1, 0.6  # of the pass rate


def pool(seed: int, size: int) -> list[dict[str, str]]:
    """Returns different questions, the kinds in turn as long as they have any."""
    streams = {name: _entries(*kind, seed) for name, kind in KINDS.items()}
    seen: set[str] = set()
    found: list[dict[str, str]] = []
    while streams and len(found) < size:
        for name in list(streams):
            entry = next((e for e in streams[name] if e["question"] not in seen), None)
            if entry is None:
                del streams[name]
                continue
            seen.add(entry["question"])
            found.append(
                {
                    "id": f"{name} {len(found)}",
                    "question": entry["question"],
                    "gold_answer": str(entry["answer"]),
                    "data_source": name,
                    "category": name,
                }
            )
    return found[:size]


def _entries(name: str, limits: dict[str, int], seed: int) -> Iterator[dict[str, Any]]:
    dataset = reasoning_gym.create_dataset(name, seed=seed * STREAM, size=STREAM, **limits)
    yield from (dataset[index] for index in range(STREAM))


def choose(
    rated: Sequence[dict[str, Any]], seed: int, held_out: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Returns held-out and training questions, shuffled: those of a pass rate within the bounds.

    Raises:
        ValueError: There are too few; tells how many.
    """
    chosen = [line for line in rated if LEAST <= line.get("pass_rate", 0.0) <= MOST]
    if len(chosen) <= held_out:
        raise ValueError(
            f"{len(chosen)} of {len(rated)} questions have a pass rate of {LEAST} to {MOST},"
            f" too few to hold out {held_out}: make a larger pool or hold out fewer"
        )
    random.Random(seed).shuffle(chosen)
    return chosen[:held_out], chosen[held_out:]


def write_lines(path: Path, lines: Sequence[dict[str, Any]]) -> None:
    """Writes JSON lines, in folders that are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def main() -> int:
    """Parses the command line and writes the files."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("step", choices=("pool", "choose"))
    parser.add_argument("--out", type=Path, required=True, help="file of the pool, folder of data")
    parser.add_argument("--seed", type=int, default=0, help="another seed gives other problems")
    parser.add_argument("--size", type=int, default=12000, help="questions of the pool")
    parser.add_argument("--rated", type=Path, help="the pool with pass rates")
    parser.add_argument("--held-out", type=int, default=500, help="questions of eval.jsonl")
    options = parser.parse_args()
    if options.step == "pool":
        write_lines(options.out, pool(options.seed, options.size))
        return 0
    rated = [json.loads(line) for line in options.rated.read_text(encoding="utf-8").splitlines()]
    try:
        held_out, training = choose(rated, options.seed, options.held_out)
    except ValueError as error:
        print(f"problems: {error}", file=sys.stderr)
        return 2
    write_lines(options.out / "eval.jsonl", held_out)
    write_lines(options.out / "train.jsonl", training)
    print(f"{len(rated)} questions rated, {len(training)} to train on, {len(held_out)} held out")
    return 0


if __name__ == "__main__":
    sys.exit(main())
