"""One layout's two iterations; started by `layouts.py` under torchrun.

torchrun --nproc-per-node 4 -m tests.integration.layout_program OUT.json key=value...
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from pathlib import Path

from megatron_oreal.config.load import load_config
from megatron_oreal.monitor.metrics import read_metrics
from megatron_oreal.parallel.collectives import (
    all_gather_bytes,
    start_world,
    stop_world,
    world_rank,
)
from megatron_oreal.trainer.setup import training_run
from megatron_oreal.weights.sums import Checksums


def digest(checksums: Checksums) -> str:
    text = json.dumps(checksums, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()


def same_everywhere(text: str) -> str:
    """Returns `text` if every rank came with the same; collective over the world."""
    (only,) = set(all_gather_bytes(text.encode()))
    return only.decode()


def main(out: Path, settings: list[str]) -> None:
    started = time.monotonic()
    config = load_config([], settings)
    start_world()
    with training_run(config) as run:
        assert run.evaluator is not None
        assert run.loop.weight_sync is not None
        run.loop.weight_sync.push(check=True)
        policy_sums = run.exporter.source.stream(run.loop.policy).checksums
        start = same_everywhere(digest(policy_sums()))
        for iteration in range(config.schedule.iterations):
            run.loop.iterate(iteration)
        run.loop.weight_sync.push(check=True)
        end = same_everywhere(digest(policy_sums()))
        # Greedy answers are one a question: where these are few, some engine has nothing to do.
        evaluation = run.evaluator.evaluate(lambda _: None).result
        metrics = run.journal.folder.metrics
    if world_rank() == 0:
        found = {
            "start": start,
            "end": end,
            "iterations": read_metrics(metrics),
            "greedy": evaluation.greedy,
            "seconds": time.monotonic() - started,
        }
        out.write_text(json.dumps(found))
    stop_world()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
