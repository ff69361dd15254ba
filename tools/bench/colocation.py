"""Times the turns of a GPU between training and an engine that shares it, and what each turn frees.

One engine generates alone. Then one that sleeps lies beside a policy's weights, and goes round:
generate, sleep, a stretch of training that takes most of what the engine gave back, wake weights,
sync, wake cache. The policy's weights are random; the sync is that of a run, in place or as whole
tensors, as the engine allows.

Times are of the slowest rank, medians over rounds, the first left out. Memory is what the driver
says is in use on the device; on a CPU, where only vLLM's scheduler sleeps, the process's own.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import random
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist

from megatron_oreal.checkpoint.run_state import library_versions
from megatron_oreal.config.errors import UserError
from megatron_oreal.config.schema import (
    Config,
    ModelConfig,
    ParallelConfig,
    RolloutConfig,
    SamplingConfig,
)
from megatron_oreal.config.validate import check_layout, check_model
from megatron_oreal.models.registry import read_model
from megatron_oreal.monitor.profile import host_gib
from megatron_oreal.parallel import topology
from megatron_oreal.parallel.collectives import (
    broadcast_bytes,
    start_world,
    stop_world,
    world_rank,
    world_size,
)
from megatron_oreal.parallel.cuda_on_cpu import compute_device, has_gpu
from megatron_oreal.rollout.engine import Request
from megatron_oreal.rollout.vllm_inprocess import VllmInProcess
from megatron_oreal.rollout.weight_sync import WeightSync, open_sync
from megatron_oreal.trainer.engine_memory import agree_on_cache
from megatron_oreal.weights.cluster import MegatronLayout
from megatron_oreal.weights.layout import MegatronPlace

EPILOG = """
examples:
  python tools/bench/colocation.py                                              # a toy, on a CPU
  python tools/bench/colocation.py --model configs/models/qwen2.5-7b --tokens 512   # one GPU
  torchrun --nproc-per-node 4 tools/bench/colocation.py --tensor 4 --engine-tensor 2 --model ...
  python tools/bench/colocation.py --model ... --quantization fp8

The model's folder needs a config.json alone. Must reach on an H100, 7B in bf16: switch_s at most
0.3, decode_over_alone at least 0.95.
"""
GIB = 1 << 30
TOY = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "vocab_size": 512,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
STEPS = ("sleep", "wake_weights", "sync", "wake_cache")
TRAINED_SHARE = 0.9  # of what sleeping gave back
T = TypeVar("T")


@dataclass(frozen=True)
class Bench:
    """What is generated, by which engine, beside which policy."""

    config: Config
    prompt: int

    def requests(self) -> list[Request]:
        """As many as all engines answer at a time."""
        rollout = self.config.rollout
        draw, vocab = random.Random(0), read_model(self.config.model.path)[1].vocab
        count = rollout.max_sequences * world_size() // rollout.tensor_parallel
        return [
            Request(tuple(draw.randrange(2, vocab) for _ in range(self.prompt)), seed)
            for seed in range(count)
        ]

    @contextlib.contextmanager
    def engine(self, *, sleeps: bool, cache: int | None) -> Iterator[VllmInProcess]:
        """An engine with made-up weights; collective over the world."""
        rollout = self.config.rollout
        engine = VllmInProcess(
            self.config.model.path,
            replace(rollout, sleep=sleeps),
            precision=self.config.model.precision,
            max_total_tokens=self.config.sampling.max_total_tokens,
            stop_token_id=1,
            decode=str,
            weights=False,
            kv_cache_bytes=cache,
        )
        with contextlib.closing(engine):
            yield engine
        free()

    def policy(self) -> dict[str, torch.Tensor]:
        """This rank's parameters of a policy, random and small."""
        family, dims = read_model(self.config.model.path)
        layout = MegatronLayout(family, dims, world_size(), self.config.parallel)
        dtype = torch.bfloat16 if self.config.model.precision == "bf16" else torch.float32
        torch.manual_seed(0)
        return {
            name: torch.randn(shape, dtype=dtype, device=compute_device()) * 0.02
            for name, shape in layout.shapes(0).items()
        }

    def sync(self, policy: dict[str, torch.Tensor], engine: VllmInProcess) -> WeightSync:
        """Plans the sync of a run; collective over the world."""
        family, dims = read_model(self.config.model.path)
        here = topology.current()
        place = MegatronPlace(here.tp_rank, here.tp_size)
        round_bytes = self.config.rollout.sync_round_mib << 20
        return open_sync(policy, family, dims, place, engine, round_bytes=round_bytes)

    def decode_rate(self, engine: VllmInProcess, repeats: int) -> float:
        """Returns tokens a second of all engines, the best of some times; collective."""
        requests = self.requests()
        rates = []
        for _ in range(repeats + 1):
            seconds, rollouts = timed(lambda: engine.generate(requests, self.config.sampling, skip))
            rates.append(sum(len(rollout.tokens) for rollout in rollouts) / seconds)
        return max(rates[1:])


def skip(_advanced: int) -> None:
    """Shows no progress."""


def free() -> None:
    """Gives back what nothing holds any more."""
    gc.collect()
    if has_gpu():
        torch.cuda.empty_cache()


def used_gib() -> float:
    """Returns the memory in use: of the device, else of this process."""
    if not has_gpu():
        return host_gib()
    left, total = torch.cuda.mem_get_info()
    return (total - left) / GIB


def timed(call: Callable[[], T]) -> tuple[float, T]:
    """Returns the seconds of the slowest rank, and this rank's result; collective."""
    wait()
    started = time.perf_counter()
    result = call()
    if has_gpu():
        torch.cuda.synchronize()
    took = torch.tensor([time.perf_counter() - started], dtype=torch.float64)
    dist.all_reduce(took, op=dist.ReduceOp.MAX)
    return float(took), result


def wait() -> None:
    """Waits for this rank's device and then for all ranks."""
    if has_gpu():
        torch.cuda.synchronize()
    dist.barrier()


def train(freed_gib: float) -> None:
    """Takes and leaves most of what was given back, as training does: torch keeps it."""
    if has_gpu() and freed_gib > 0:
        torch.empty(int(TRAINED_SHARE * freed_gib * GIB), dtype=torch.uint8, device="cuda")


def go_round(engine: VllmInProcess, sync: WeightSync, rounds: int) -> dict[str, list[float]]:
    """Returns seconds by step and GiB in use after it, one of each a round; collective."""
    found: defaultdict[str, list[float]] = defaultdict(list)
    calls = {
        "sleep": engine.sleep,
        "wake_weights": engine.wake_weights,
        "sync": sync.carry,
        "wake_cache": engine.wake_cache,
    }
    for _ in range(rounds + 1):
        awake = used_gib()
        found["awake_gib"].append(awake)
        for step in STEPS:
            found[f"{step}_s"].append(timed(calls[step])[0])
            found[f"{step}_gib"].append(used_gib())
            if step == "sleep":
                train(awake - used_gib())
    return {name: values[1:] for name, values in found.items()}


def measure(bench: Bench, rounds: int) -> dict[str, float | str]:
    """Returns times, memory and ratios; collective over the world."""
    base = used_gib()
    policy = bench.policy()
    policy_gib = used_gib() - base
    cache = agree_on_cache(bench.config, trains=False)
    with bench.engine(sleeps=False, cache=cache) as engine:
        bench.sync(policy, engine).push()
        alone = bench.decode_rate(engine, rounds)
    beside = used_gib()  # without what an engine that is gone has left behind
    with bench.engine(sleeps=True, cache=cache) as engine:
        sync = bench.sync(policy, engine)
        sync.push()
        engine.generate(bench.requests()[:1], bench.config.sampling, skip)
        found = go_round(engine, sync, rounds)
        shared = bench.decode_rate(engine, rounds)
    medians = {name: statistics.median(values) for name, values in found.items()}
    held = medians["awake_gib"] - beside
    return {
        "device": torch.cuda.get_device_name() if has_gpu() else "cpu",
        **library_versions(),
        "ranks": world_size(),
        "precision": bench.config.model.precision,
        "quantization": bench.config.rollout.quantization,
        "sync": sync.description,
        "sequences": bench.config.rollout.max_sequences,
        "policy_gib": policy_gib,
        "engine_gib": held,
        **medians,
        "switch_s": sum(medians[f"{step}_s"] for step in STEPS),
        "freed_share": (medians["awake_gib"] - medians["sleep_gib"]) / held if held > 0 else 0.0,
        "alone_tokens_per_s": alone,
        "tokens_per_s": shared,
        "decode_over_alone": shared / alone,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures and prints on rank 0."""
    options = parser().parse_args(arguments)
    start_world()
    try:
        with tempfile.TemporaryDirectory() as made:
            toy = Path(broadcast_bytes(made.encode()).decode())
            if world_rank() == 0:
                (toy / "config.json").write_text(json.dumps(TOY))
            dist.barrier()
            found = measure(bench_of(options, toy), options.rounds)
        if world_rank() == 0:
            print(json.dumps(found) if options.json else table(found))
    except UserError as error:
        print(f"colocation: {error}", file=sys.stderr)
        return 2
    finally:
        stop_world()
    return 0


def bench_of(options: argparse.Namespace, toy: Path) -> Bench:
    """Returns what the options ask for and joins the layout's groups; collective over the world.

    Raises:
        UserError: The layout does not fill these ranks or cannot cut the model.
    """
    total = options.prompt + options.tokens
    config = Config(
        model=ModelConfig(path=str(options.model or toy), precision=options.precision),
        parallel=ParallelConfig(tensor=options.tensor),
        sampling=SamplingConfig(top_p=1.0, max_new_tokens=options.tokens, max_total_tokens=total),
        rollout=RolloutConfig(
            tensor_parallel=options.engine_tensor,
            max_sequences=options.sequences,
            gpu_memory_utilization=options.share,
            quantization=options.quantization,
            enforce_eager=options.eager or not has_gpu(),
        ),
    )
    check_layout(config, world_size())
    check_model(config, read_model(config.model.path)[1])
    topology.initialize(config.parallel.tensor, 1)
    return Bench(config, options.prompt)


def table(found: dict[str, float | str]) -> str:
    """Returns a line a number."""
    return "\n".join(
        f"{name:24}{value:14.3f}" if isinstance(value, float) else f"{name:24}{value!s:>14}"
        for name, value in found.items()
    )


def parser() -> argparse.ArgumentParser:
    """Returns the options."""
    options = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--model", type=Path, help="folder with a config.json (a toy Qwen2)")
    options.add_argument("--precision", choices=("fp32", "bf16"), default="bf16")
    options.add_argument("--quantization", choices=("none", "fp8"), default="none")
    options.add_argument("--tensor", type=int, default=1, help="Megatron's tensor parallelism (1)")
    options.add_argument("--engine-tensor", type=int, default=1, help="ranks of one engine (1)")
    options.add_argument("--sequences", type=int, default=16, help="an engine's, at a time (16)")
    options.add_argument("--prompt", type=int, default=32, help="tokens of each prompt (32)")
    options.add_argument("--tokens", type=int, default=64, help="of a response, at most (64)")
    options.add_argument("--share", type=float, default=0.5, help="of a GPU, the engine's (0.5)")
    options.add_argument("--eager", action="store_true", help="without CUDA graphs; always on CPU")
    options.add_argument("--rounds", type=int, default=3, help="after a first one (3)")
    options.add_argument("--json", action="store_true", help="print one JSON object")
    return options


if __name__ == "__main__":
    sys.exit(main())
