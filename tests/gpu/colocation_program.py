"""Puts an engine that shares a device through its rounds; `test_colocation.py` judges what it says.

python -m tests.gpu.colocation_program none|fp8 FOLDER

Writes `found.json`. A process of its own, since vLLM's sleeping allocator serves one engine each.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megatron_oreal.config.errors import UserError
from megatron_oreal.config.schema import Config, ModelConfig, RolloutConfig, SamplingConfig
from megatron_oreal.parallel import topology
from megatron_oreal.parallel.collectives import start_world, stop_world
from megatron_oreal.rollout.vllm_inprocess import VllmInProcess
from megatron_oreal.trainer.engine_memory import agree_on_cache
from tools.bench.colocation import TOY, Bench, skip, used_gib

# Qwen2.5-0.5B.
SHAPE = TOY | {
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "vocab_size": 151_936,
    "tie_word_embeddings": True,
}
SHARE = 0.3
TRAINED_SHARE = 0.9


def switches() -> list[Any]:
    """What vLLM turns in a process that computes on a GPU."""
    snapshot: Any = torch.cuda.memory._snapshot()
    return [
        torch.get_float32_matmul_precision(),
        torch.backends.cuda.cudnn_sdp_enabled(),
        str(torch.get_default_dtype()),
        snapshot["allocator_settings"]["expandable_segments"],
    ]


def greedy(bench: Bench, engine: VllmInProcess) -> list[list[int]]:
    sampling = replace(bench.config.sampling, temperature=0.0)
    return [list(r.tokens) for r in engine.generate(bench.requests(), sampling, skip)]


def logprobs(bench: Bench, engine: VllmInProcess) -> list[float]:
    """Of the first token of each answer, which all engines draw after the same prompt."""
    sampling = replace(bench.config.sampling, temperature=0.0)
    return [r.logprobs[0] for r in engine.generate(bench.requests(), sampling, skip)]


def refusal(config: Config) -> str:
    tiny = replace(config, rollout=replace(config.rollout, gpu_memory_utilization=0.01))
    try:
        agree_on_cache(tiny, trains=False)
    except UserError as error:
        return str(error)
    return ""


def rounds(bench: Bench, policy: dict[str, torch.Tensor], cache: int | None) -> dict[str, Any]:
    """Two rounds of an engine that sleeps, with training in between."""
    before, beside = switches(), used_gib()
    with bench.engine(sleeps=True, cache=cache) as engine:
        found: dict[str, Any] = {"switches_kept": switches() == before}
        sync = bench.sync(policy, engine)
        found["sync"] = sync.description
        sync.push()
        addresses = engine._find_addresses()
        found["awake_gib"], found["answers"] = [], []
        found["asleep_gib"], found["trained_gib"] = [], []
        for _ in range(2):
            found["answers"].append(greedy(bench, engine))
            found["awake_gib"].append(used_gib() - beside)
            engine.sleep()
            found["asleep_gib"].append(used_gib() - beside)
            freed = found["awake_gib"][-1] - found["asleep_gib"][-1]
            training = torch.ones(int(TRAINED_SHARE * freed * 2**30), dtype=torch.uint8).cuda()
            found["trained_gib"].append(used_gib() - beside)
            del training  # torch keeps the memory: waking has to get it back
            sync.push(check=True)
        found["answers"].append(greedy(bench, engine))
        found["addresses_stay"] = engine._find_addresses() == addresses
        found["logprobs"] = logprobs(bench, engine)
    return found


def main(quantization: str, folder: Path) -> None:
    start_world()
    topology.initialize(1, 1)
    (folder / "config.json").write_text(json.dumps(SHAPE))
    config = Config(
        model=ModelConfig(path=str(folder), precision="bf16"),
        sampling=SamplingConfig(top_p=1.0, max_new_tokens=64, max_total_tokens=1024),
        rollout=RolloutConfig(max_sequences=64, gpu_memory_utilization=SHARE),
    )
    bench = Bench(config, prompt=32)
    policy = bench.policy()
    found: dict[str, Any] = {"refusal": refusal(config)}
    cache = agree_on_cache(config, trains=False)
    with bench.engine(sleeps=False, cache=cache) as engine:
        bench.sync(policy, engine).push()
        found["fresh"] = {"answers": greedy(bench, engine), "logprobs": logprobs(bench, engine)}
    rollout = replace(config.rollout, quantization=quantization)
    found |= rounds(Bench(replace(config, rollout=rollout), prompt=32), policy, cache)
    total = torch.cuda.mem_get_info()[1]
    (folder / "found.json").write_text(json.dumps(found | {"share_gib": SHARE * total / 2**30}))
    stop_world()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
