"""Times the stop for a checkpoint that is written behind the training, and for one it awaits.

A policy of a made-up Qwen2 takes one step, so that its optimizer has moments. Then, by turns, its
state is saved both ways: to host memory, to the disk, forced there, read back, renamed. Meanwhile a
thread ticks, which shows what the writing takes from the interpreter. Alone or under torchrun.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from megatron_oreal.algorithm.objectives import sft_objective
from megatron_oreal.checkpoint.checkpointer import Checkpointer
from megatron_oreal.checkpoint.tensors import StoredModel
from megatron_oreal.config.schema import Config, ModelConfig
from megatron_oreal.engine.roles import Policy
from megatron_oreal.models.registry import read_model
from megatron_oreal.parallel.collectives import (
    all_gather_bytes,
    barrier,
    start_world,
    stop_world,
    world_rank,
    world_size,
)
from megatron_oreal.trainer.models import open_source
from megatron_oreal.trainer.packer import Packer
from megatron_oreal.trainer.resume import SftProgress
from megatron_oreal.types import Trajectory

TICK_S = 0.001
MIB = 1 << 20


def write_model(folder: Path, layers: int, hidden: int) -> None:
    """Writes a Qwen2 of random weights."""
    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": 4 * hidden,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": hidden // 64,
        "vocab_size": 32000,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "use_sliding_window": False,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config))
    family, dims = read_model(folder)
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: 0.02 * torch.randn(shape, generator=generator)
        for name, shape in family.tensors(dims).items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def trained_policy(folder: Path) -> tuple[Config, StoredModel]:
    """Returns a policy that has taken one step; collective over the world."""
    config = Config(model=ModelConfig(path=str(folder), precision="fp32"))
    config = replace(config, engine=replace(config.engine, tokens_per_micro_batch=64))
    source = open_source(config)
    policy = Policy(source.dims, config, source.topology, source.load, config.policy_optimizer)
    trajectories = [
        Trajectory(str(i), tuple(range(i, i + 16)), 4, reward=1.0, advantage=1.0)
        for i in range(world_size())
    ]
    packer = Packer.for_layout(source.topology, config.engine.tokens_per_micro_batch)
    policy.step(packer.pack(trajectories), sft_objective(12 * world_size()), 1e-5)
    return config, source.stored(policy.model)


class Ticker(threading.Thread):
    """Sleeps for a tick again and again; `longest_s` is the longest that one has taken."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.longest_s = 0.0
        self._ended = threading.Event()

    def run(self) -> None:
        """Ticks until it is stopped."""
        while not self._ended.is_set():
            started = time.perf_counter()
            time.sleep(TICK_S)
            self.longest_s = max(self.longest_s, time.perf_counter() - started)

    def stop(self) -> float:
        """Returns the longest tick."""
        self._ended.set()
        self.join()
        return self.longest_s


def save(checkpointer: Checkpointer, model: StoredModel, iteration: int) -> dict[str, float]:
    """Saves once; seconds until the copy is taken and until the checkpoint is whole.

    Collective over the world; the slowest rank counts.
    """
    barrier()
    started, ticker = time.perf_counter(), Ticker()
    outcome = checkpointer.save(
        iteration, {"policy": model}, metrics_bytes=0, seconds={}, progress=SftProgress("")
    )
    pause_s = time.perf_counter() - started
    ticker.start()
    outcome = outcome or checkpointer.settle()
    assert outcome is not None
    assert not outcome.problem, outcome.problem
    whole_s = time.perf_counter() - started
    measured = {"pause_s": pause_s, "whole_s": whole_s, "longest_tick_s": ticker.stop()}
    ranks = [json.loads(text) for text in all_gather_bytes(json.dumps(measured).encode())]
    return {name: max(rank[name] for rank in ranks) for name in measured}


def measure(folder: Path, repeats: int, layers: int, hidden: int) -> dict[str, Any]:
    """Returns sizes, medians and ratio; collective over the world."""
    if world_rank() == 0:
        write_model(folder, layers, hidden)
    barrier()
    config, model = trained_policy(folder)
    model.prepare()  # as a run does before its first iteration
    checkpointer = Checkpointer(config, "train", folder / "checkpoints")
    # The same work: what is awaited stops the training until it is whole, the other for the copy.
    rounds = [save(checkpointer, model, number) for number in range(1, 2 * repeats + 1)]
    awaited, behind = rounds[::2], rounds[1::2]
    pause_s = statistics.median(one["pause_s"] for one in behind)
    sync_s = statistics.median(one["whole_s"] for one in awaited)
    files = (folder / "checkpoints" / f"iteration_{2 * repeats:06d}").iterdir()
    return {
        "state_mib": sum(path.stat().st_size for path in files) / MIB,
        "ranks": world_size(),
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "repeats": repeats,
        "load": os.getloadavg()[0],
        "pause_awaited_s": sync_s,
        "pause_behind_s": pause_s,
        "pause_behind_worst_s": max(one["pause_s"] for one in behind),
        "first_pause_s": rounds[0]["pause_s"],
        "ratio": pause_s / sync_s,
        "ratio_worst": max(
            late["pause_s"] / sync["whole_s"] for late, sync in zip(behind, awaited, strict=True)
        ),
        "longest_tick_s": max(one["longest_tick_s"] for one in rounds),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, help="on the disk to be measured (temporary files)")
    parser.add_argument("--repeats", type=int, default=5, help="of each way (5)")
    parser.add_argument("--layers", type=int, default=8, help="of the model (8)")
    parser.add_argument("--hidden", type=int, default=768, help="of the model (768)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(arguments)
    start_world()
    with tempfile.TemporaryDirectory(dir=options.folder) as own:
        name = all_gather_bytes(own.encode())[0].decode()  # rank 0's
        found = measure(Path(name), options.repeats, options.layers, options.hidden)
        barrier()
    stop_world()
    if os.environ["RANK"] == "0":
        if options.json:
            print(json.dumps(found))
        else:
            for key, value in found.items():
                shown = f"{value:.4f}" if isinstance(value, float) else str(value)
                print(f"{key:24}{shown:>12}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
