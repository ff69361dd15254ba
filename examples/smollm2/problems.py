"""Makes the questions: arithmetic of reasoning-gym that SmolLM2-135M-Instruct solves now and then.

The README has the pass rates that the kinds were chosen by. No problem is in both files. There are
but 1,100 short ones.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import reasoning_gym

# (name in reasoning-gym, its limits) by name in the files
KINDS: dict[str, tuple[str, dict[str, int]]] = {
    "short": ("products", {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 1}),
    "long": ("products", {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2}),
}
STREAM = 100_000  # problems that a seed can yield of a kind: far more than are taken


def questions(seed: int) -> Iterator[dict[str, str]]:
    """Yields different questions, the kinds in turn."""
    streams = {name: _entries(*kind, seed) for name, kind in KINDS.items()}
    seen: set[str] = set()
    while True:
        for name, stream in streams.items():
            entry = next(e for e in stream if e["question"] not in seen)
            seen.add(entry["question"])
            yield {
                "question": entry["question"],
                "gold_answer": str(entry["answer"]),
                "data_source": name,
                "category": name,
            }


def _entries(name: str, limits: dict[str, int], seed: int) -> Iterator[dict[str, Any]]:
    dataset = reasoning_gym.create_dataset(name, seed=seed * STREAM, size=STREAM, **limits)
    yield from (dataset[index] for index in range(STREAM))


def write(folder: Path, seed: int, *, held_out: int, training: int) -> None:
    """Writes `eval.jsonl` and `train.jsonl`, no problem in both."""
    folder.mkdir(parents=True, exist_ok=True)
    stream = questions(seed)
    for name, count in (("eval", held_out), ("train", training)):
        lines = [json.dumps({"id": f"{name}-{i}", **next(stream)}) + "\n" for i in range(count)]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


def main() -> None:
    """Parses the command line and writes the files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the two files")
    parser.add_argument("--seed", type=int, default=0, help="another seed gives other problems")
    parser.add_argument("--held-out", type=int, default=500, help="questions of eval.jsonl")
    parser.add_argument("--training", type=int, default=1500, help="questions of train.jsonl")
    options = parser.parse_args()
    write(options.out, options.seed, held_out=options.held_out, training=options.training)


if __name__ == "__main__":
    main()
