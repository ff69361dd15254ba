"""Times the passes of a training step: layers with our head and loss, and with bare products.

Both are Megatron's layers as a run builds them, over one packed micro-batch, forward and backward
into Megatron's gradient buffers, from a model with random weights; no optimizer.

- ours: the chunked head and OREAL's loss on every response token but the first of a sequence;
- bare: the head's three matrix products over the same tokens, at once; no softmax, no loss.

Layers are bf16, and FP8 with each recipe that the device has. Times are medians over repeats, in
turns. Goals on one H100 (4 layers of the 32B shape, 16,384 tokens): ours at most 1.05 of bare, and
fp8 delayed at least 1.4 times the tokens/s of bf16.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib import metadata
from math import ceil
from pathlib import Path
from typing import Any, get_args

import torch
from megatron.core.distributed import DistributedDataParallel

from megatron_oreal.algorithm import objectives
from megatron_oreal.config.device import Device, check_device
from megatron_oreal.config.errors import UserError
from megatron_oreal.config.schema import Config, EngineConfig, ParallelConfig
from megatron_oreal.config.schema_precision import (
    TOKEN_MULTIPLE,
    Fp8Config,
    Fp8Recipe,
    Fp8RoleConfig,
)
from megatron_oreal.engine.heads import LogprobHead, head_settings
from megatron_oreal.engine.megatron_model import Head, HeadResult
from megatron_oreal.engine.micro_batch import MicroBatch, ScorePosition, lay_out
from megatron_oreal.engine.optimizer import wrap_for_training
from megatron_oreal.models.build import PackedGPT, build_stages
from megatron_oreal.models.family import ModelDims
from megatron_oreal.models.kernels import device_here, kernels_here
from megatron_oreal.models.registry import read_model
from megatron_oreal.parallel import topology
from megatron_oreal.parallel.collectives import start_world, stop_world
from megatron_oreal.parallel.cuda_on_cpu import cuda_on_cpu, has_gpu
from megatron_oreal.types import PackedBatch, Trajectory

EPILOG = """
examples:
  python tools/bench/train_step.py                    # on a CPU a toy, seconds; on a GPU the goals
  python tools/bench/train_step.py --vocab 152064     # one GPU, the whole vocabulary
  python tools/bench/train_step.py --recipes none delayed --recompute selective --json
"""
RECIPES: tuple[Fp8Recipe, ...] = get_args(Fp8Recipe)
SHAPE_32B = Path("configs/models/qwen2.5-32b")
TOY = ModelDims(
    family="qwen2",
    layers=2,
    hidden=128,
    heads=4,
    kv_heads=2,
    head_dim=32,
    ffn=352,
    vocab=1000,
    max_positions=4096,
    rope_theta=1e6,
    norm_eps=1e-6,
    tied_embeddings=False,
    qkv_bias=True,
)
WARM_UPS = 3
Result = dict[str, float | str]


@dataclass(frozen=True)
class Bench:
    """A model's shape and one micro-batch of `sequences` equal sequences, `tokens` in all."""

    dims: ModelDims
    tokens: int
    sequences: int
    recompute: str = "none"

    def config(self, recipe: Fp8Recipe) -> Config:
        """Returns a run of the policy alone, on one rank."""
        return Config(
            parallel=ParallelConfig(distributed_optimizer=False),
            engine=EngineConfig(
                tokens_per_micro_batch=self.tokens,
                recompute=self.recompute,  # pyright: ignore[reportArgumentType]  of the parser's choices
            ),
            fp8=Fp8Config(policy=Fp8RoleConfig(recipe)),
        )

    def batch(self) -> PackedBatch:
        """Returns random tokens, rewards +1 and -1 by turns, and what Eq. 11 asks for."""
        generator = torch.Generator().manual_seed(0)
        length = self.tokens // self.sequences
        trajectories = [
            Trajectory(
                prompt_id=str(i),
                tokens=tuple(
                    torch.randint(self.dims.vocab, (length,), generator=generator).tolist()
                ),
                prompt_length=1,
                reward=(-1.0) ** i,
                advantage=(-1.0) ** i,
            )
            for i in range(self.sequences)
        ]
        ones = [torch.ones(t.response_length) for t in trajectories]
        fields = objectives.policy_fields(trajectories, ones, [-10 * one for one in ones])
        return PackedBatch(tuple(trajectories), ((tuple(range(self.sequences)),),), fields)


class _ThreeProducts(torch.autograd.Function):
    """Logits, and the products that a gradient of their size costs: the logits stand in for it."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> torch.Tensor:
        hidden, weight = args
        logits = hidden @ weight.t()
        ctx.save_for_backward(hidden, weight, logits)
        return logits[0, 0].float()

    @staticmethod
    def backward(ctx: Any, *_: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden, weight, logits = ctx.saved_tensors
        return logits @ weight, logits.t() @ hidden


@dataclass(frozen=True)
class BareHead:
    """The head's three matrix products over the tokens that are scored."""

    module: PackedGPT
    names: tuple[str, ...] = ()
    score_position: ScorePosition = "before"

    def __call__(self, hidden: torch.Tensor, micro_batch: MicroBatch) -> HeadResult:
        """Not collective: for one rank."""
        scored = self.module.gathered_hidden(hidden).index_select(0, micro_batch.positions)
        out: Any = _ThreeProducts.apply(scored, self.module.output_weight())
        return HeadResult(out, {})


class Model:
    """Layers and heads of one precision, as a run builds them, with random weights."""

    def __init__(self, bench: Bench, recipe: Fp8Recipe) -> None:
        config, place = bench.config(recipe), topology.current()
        cut = replace(place.cut, token_multiple=TOKEN_MULTIPLE[recipe])
        batch = bench.batch()
        self.laid = lay_out(batch, batch.micro_batches[0][0], cut)
        stages = build_stages(bench.dims, config, place, "policy")
        _fill(stages[0])
        with cuda_on_cpu():
            self.chunk: DistributedDataParallel = wrap_for_training(stages, config)[0]
        objective = objectives.policy_objective(
            config.oreal, *objectives.count_tokens(batch.trajectories)
        )
        words = ceil(bench.dims.vocab / place.tp_size)
        settings = head_settings(config, words)
        self.heads: dict[str, Head] = {
            "ours": LogprobHead(stages[0], place, bench.dims.vocab, settings, objective),
            "bare": BareHead(stages[0]),
        }

    def passes(self, head: Head) -> float:
        """Runs forward and backward once and returns the loss."""
        with cuda_on_cpu():
            self.chunk.zero_grad_buffer()
            self.chunk.set_is_first_microbatch()  # FP8 rounds weights anew, as after a step
            hidden = self.chunk(**PackedGPT.packed_inputs(self.laid.tokens, self.laid.packed))
            loss = head(hidden, self.laid).loss
            loss.backward()
        return float(loss.detach())


def _fill(stage: PackedGPT) -> None:
    """Draws weights as small as trained ones, on the device; norms stay one."""
    generator = torch.Generator(next(stage.parameters()).device).manual_seed(0)
    for name, parameter in stage.named_parameters():
        if "norm" in name:
            torch.nn.init.ones_(parameter)
        else:
            torch.nn.init.normal_(parameter, std=0.02, generator=generator)


def available(bench: Bench, recipes: Sequence[Fp8Recipe], device: Device) -> dict[Fp8Recipe, str]:
    """Returns why each recipe cannot be had, empty where it can."""
    found: dict[Fp8Recipe, str] = {}
    for recipe in recipes:
        try:
            check_device(bench.config(recipe), bench.dims, device)
            found[recipe] = ""
        except UserError as error:
            found[recipe] = str(error)
    return found


def measure(bench: Bench, recipe: Fp8Recipe, repeats: int) -> Result:
    """Returns the milliseconds of both ways in one precision, and tokens per second of ours."""
    model = Model(bench, recipe)
    ways = {name: partial(model.passes, head) for name, head in model.heads.items()}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(WARM_UPS + repeats):
        for name, way in ways.items():
            taken = _timed(way)
            if turn >= WARM_UPS:
                seconds[name].append(taken)
    ours, bare = (1e3 * statistics.median(seconds[name]) for name in ("ours", "bare"))
    tokens = len(model.laid.tokens)
    name = "bf16" if recipe == "none" else f"fp8 {recipe}"
    return {
        "layers": name,
        "ours_ms": ours,
        "bare_ms": bare,
        "ours_over_bare": ours / bare,
        "tokens_per_s": 1e3 * tokens / ours,
    }


def _timed(way: Callable[[], float]) -> float:
    if has_gpu():
        torch.cuda.synchronize()
    start = time.perf_counter()
    way()
    if has_gpu():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure_all(bench: Bench, recipes: Sequence[Fp8Recipe], repeats: int) -> list[Result]:
    """Measures each precision, one model after another; the first is what others are told by."""
    rows: list[Result] = []
    for recipe in recipes:
        rows.append(measure(bench, recipe, repeats))
        rows[-1]["over_first"] = float(rows[-1]["tokens_per_s"]) / float(rows[0]["tokens_per_s"])
        gc.collect()
        if has_gpu():
            torch.cuda.empty_cache()
    return rows


def versions() -> dict[str, str]:
    """Returns the device, what layers are made of, and the libraries that compute them."""
    kernels = kernels_here()
    found = {"device": device_here().name}
    found["modules"] = "Transformer Engine" if kernels.transformer_engine else "plain torch"
    for name in ("torch", "megatron-core", "transformer-engine"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def table(rows: Sequence[Result]) -> str:
    """Returns a line a precision."""
    lines = [
        f"{'layers':16}{'ours ms':>10}{'bare ms':>10}{'ratio':>8}{'tokens/s':>11}{'x first':>9}"
    ]
    lines += [
        f"{row['layers']:16}{row['ours_ms']:10.1f}{row['bare_ms']:10.1f}"
        f"{row['ours_over_bare']:8.3f}{row['tokens_per_s']:11.0f}{row['over_first']:9.2f}"
        for row in rows
    ]
    return "\n".join(lines)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", type=Path, help=f"folder of a config.json ({SHAPE_32B} on a GPU, else a toy)"
    )
    parser.add_argument("--layers", type=int, help="of it (4 on a GPU, else the toy's 2)")
    parser.add_argument("--vocab", type=int, help="rows (19008 on a GPU: a rank's at TP 8)")
    parser.add_argument("--tokens", type=int, help="of the micro-batch (16384 on a GPU, else 256)")
    parser.add_argument("--sequences", type=int, default=4, help="that share them (4)")
    parser.add_argument("--recompute", choices=("none", "selective", "full"), default="none")
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=RECIPES, help="all")
    parser.add_argument("--repeats", type=int, default=5, help=f"after {WARM_UPS} warm-ups (5)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser.parse_args(arguments)


def bench_of(options: argparse.Namespace) -> Bench:
    """Returns what the command line and the device ask for."""
    large = has_gpu()
    folder = options.model or (SHAPE_32B if large else None)
    dims = read_model(folder)[1] if folder else TOY
    dims = replace(
        dims,
        layers=options.layers or (4 if folder else TOY.layers),
        vocab=options.vocab or (19_008 if folder else TOY.vocab),
        tied_embeddings=False,
    )
    tokens = options.tokens or (16_384 if large else 256)
    return Bench(dims, tokens, options.sequences, options.recompute)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures and prints."""
    options = parse(arguments)
    start_world()
    topology.initialize()
    try:
        bench = bench_of(options)
        found = available(bench, options.recipes, device_here())
        rows = measure_all(bench, [r for r, lacks in found.items() if not lacks], options.repeats)
    finally:
        topology.destroy()
        stop_world()
    lacking = {recipe: lacks for recipe, lacks in found.items() if lacks}
    shape = {"tokens": bench.tokens, "sequences": bench.sequences, "recompute": bench.recompute}
    if options.json:
        about = versions() | shape | {"dims": asdict(bench.dims)}
        print(json.dumps(about | {"rows": rows, "lacking": lacking}))
        return 0
    dims = bench.dims
    shape |= {"layers": dims.layers, "hidden": dims.hidden, "ffn": dims.ffn, "vocab": dims.vocab}
    print(", ".join(f"{key} {value}" for key, value in (versions() | shape).items()))
    print(table(rows))
    for why in lacking.values():
        print(f"not measured: {why}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
