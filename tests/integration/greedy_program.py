"""Greedy answers of a checkpoint from vLLM, as token ids; started by `test_training_run.py`.

python -m tests.integration.greedy_program OUT.json key=value...
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

from megatron_oreal.config.load import load_config
from megatron_oreal.parallel.collectives import start_world, stop_world
from megatron_oreal.rollout.engine import Request
from megatron_oreal.trainer.setup import read_texts, start_engine


def main(out: Path, settings: list[str]) -> None:
    config = load_config([], settings)
    start_world()
    texts = read_texts(config, training=False)
    engine = start_engine(config, texts)
    greedy = replace(config.sampling, temperature=0.0, top_p=1.0)
    requests = [Request(prompt.tokens, 0) for prompt in texts.held_out]
    rollouts = engine.generate(requests, greedy, lambda _: None)
    answers = [
        {"prompt": request.tokens, "response": rollout.tokens, "text": rollout.text}
        for request, rollout in zip(requests, rollouts, strict=True)
    ]
    out.write_text(json.dumps(answers))
    engine.close()
    stop_world()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
