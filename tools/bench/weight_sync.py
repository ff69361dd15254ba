"""Times a weight sync by plan against gathering whole tensors, and against a plain copy.

All three leave the same weights in the parameters of a vLLM engine's ranks:

- plan: the bytes that each rank lacks, packed into rounds, straight to where they belong;
- gather: as trainers do that convert on the way: each Megatron parameter is broadcast over the
  pipeline and gathered over tensor parallelism, on every rank, made into whole Hugging Face tensors
  and loaded under their names, each rank cutting out its part;
- copy: each rank copies as many bytes as its engine holds from one place to another.

On the wire count bytes that ranks receive. Times are of the slowest rank, medians over repeats.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_oreal.config.errors import UserError
from megatron_oreal.config.schema import Config, ParallelConfig, RolloutConfig
from megatron_oreal.config.validate import check_layout, check_model
from megatron_oreal.models.family import Family, ModelDims
from megatron_oreal.models.qwen2 import QWEN2
from megatron_oreal.models.registry import read_model
from megatron_oreal.parallel import topology
from megatron_oreal.parallel.collectives import start_world, stop_world, world_rank, world_size
from megatron_oreal.parallel.cuda_on_cpu import compute_device
from megatron_oreal.weights.cluster import MegatronLayout, plan_sync
from megatron_oreal.weights.geometry import Region
from megatron_oreal.weights.layout import MegatronPlace, megatron_regions
from megatron_oreal.weights.transport import execute, region_view
from megatron_oreal.weights.vllm_layout import vllm_regions

EPILOG = """
examples:
  torchrun --nproc-per-node 4 tools/bench/weight_sync.py --tensor 2 --pipeline 2 --engine-tensor 2
  python tools/bench/weight_sync.py --model configs/models/qwen2.5-7b --dtype bfloat16   # one GPU
"""
MIB = 1 << 20
# A Qwen2 of 494 MB in fp32.
DIMS = ModelDims(
    family="qwen2",
    layers=6,
    hidden=1024,
    heads=16,
    kv_heads=4,
    head_dim=64,
    ffn=4096,
    vocab=16384,
    max_positions=4096,
    rope_theta=1e6,
    norm_eps=1e-6,
    tied_embeddings=False,
    qkv_bias=True,
)
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Bench:
    """A model cut for Megatron on these ranks and for the engines inside them."""

    family: Family
    dims: ModelDims
    parallel: ParallelConfig
    engine_tensor: int
    dtype: torch.dtype
    round_bytes: int

    @cached_property
    def layout(self) -> MegatronLayout:
        """Where Megatron's parameters lie."""
        return MegatronLayout(self.family, self.dims, world_size(), self.parallel)

    @cached_property
    def place(self) -> tuple[int, int]:
        """This rank's pipeline stage and its rank in tensor parallelism."""
        per_stage = world_size() // self.parallel.pipeline
        return world_rank() // per_stage, world_rank() % self.parallel.tensor

    @cached_property
    def trained(self) -> Tensors:
        """This rank's Megatron parameters, random: an element has one value on all its holders."""
        hf = self._random_hf()
        params = {
            name: torch.zeros(shape, dtype=self.dtype, device=compute_device())
            for name, shape in self.layout.shapes(self.place[0]).items()
        }
        for region in self.layout.stores[world_rank()]:
            params[region.key][region.local.slices] = hf[region.tensor][region.box.slices]
        return params

    def _random_hf(self) -> Tensors:
        torch.manual_seed(0)
        shapes = self.family.tensors(self.dims)
        return {name: torch.rand(shape).to(self.dtype) for name, shape in shapes.items()}

    @cached_property
    def wanted(self) -> Sequence[Region]:
        """Where the engine's parameters lie on this rank."""
        engine_rank = world_rank() % self.engine_tensor
        return vllm_regions(self.family, self.dims, engine_rank, self.engine_tensor)

    def empty_engine(self) -> Tensors:
        """Returns the engine's parameters on this rank, all zero."""
        extents: dict[str, tuple[int, ...]] = {}
        for region in self.wanted:
            stop = region.local.stop
            extents[region.key] = tuple(map(max, stop, extents.get(region.key, stop)))
        return {
            key: torch.zeros(shape, dtype=self.dtype, device=compute_device())
            for key, shape in extents.items()
        }

    def make_plan_sync(self, engine: Tensors) -> tuple[Callable[[], None], float, int]:
        """Returns a sync by plan, the seconds that planning took, the bytes on the wire."""
        start = time.perf_counter()
        plan = plan_sync(
            self.layout,
            self.engine_tensor,
            dtype=self.dtype,
            round_bytes=self.round_bytes,
            ranks_per_node=world_size(),
        )
        rounds = plan.part_of(world_rank())
        planning = time.perf_counter() - start
        read, write = region_view(self.trained), region_view(engine)

        def sync() -> None:
            execute(rounds, read, write, device=compute_device())

        return sync, planning, plan.summary().bytes_moved

    def make_gather_sync(self, engine: Tensors) -> tuple[Callable[[], None], int]:
        """Returns a sync by whole tensors and the bytes on the wire."""
        gather = Gather(self)
        by_name: defaultdict[str, list[Region]] = defaultdict(list)
        for region in self.wanted:
            by_name[region.tensor].append(region)

        def sync() -> None:
            for name, whole in gather.tensors():
                for region in by_name[name]:
                    engine[region.key][region.local.slices] = whole[region.box.slices]

        received = torch.tensor([sum(gather.received(*p) for p in gather.parameters)])
        dist.all_reduce(received)
        return sync, int(received)


class Gather:
    """Whole Hugging Face tensors on every rank, parameter by parameter; collective."""

    def __init__(self, bench: Bench) -> None:
        """Lists the parameters of all stages; the layout's process groups are there already."""
        self.bench = bench
        tensor, pipeline = bench.parallel.tensor, bench.parallel.pipeline
        self.here = topology.current()
        self.shapes = [bench.layout.shapes(stage) for stage in range(pipeline)]
        self.parameters = [(stage, key) for stage in range(pipeline) for key in self.shapes[stage]]
        self.regions = {
            (stage, rank): self._regions(stage, rank)
            for stage in range(pipeline)
            for rank in range(tensor)
        }

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields every tensor whole; tied embeddings may come twice."""
        for stage, key in self.parameters:
            shards = self._shards(stage, key)
            whole: Tensors = {}
            for rank, shard in enumerate(shards):
                for region in self.regions[stage, rank][key]:
                    if region.tensor not in whole:
                        shape = self.bench.family.tensors(self.bench.dims)[region.tensor]
                        whole[region.tensor] = shard.new_empty(shape)
                    whole[region.tensor][region.box.slices] = shard[region.local.slices]
            yield from whole.items()

    def received(self, stage: int, key: str) -> int:
        """Returns the bytes that this rank receives for a parameter."""
        shape, itemsize = self.shapes[stage][key], self.bench.dtype.itemsize
        shards = (0 if stage == self.here.pp_rank else 1) + len(self._ranks(key)) - 1
        return shards * math.prod(shape) * itemsize

    def _ranks(self, key: str) -> range:
        """The tensor-parallel ranks whose parts make up the whole."""
        row, _ = self.bench.family.find(key)
        return range(1 if row.kind == "replicated" else self.here.tp_size)

    def _shards(self, stage: int, key: str) -> list[torch.Tensor]:
        bench, here = self.bench, self.here
        own = stage == here.pp_rank
        shard = (
            bench.trained[key]
            if own
            else torch.empty(self.shapes[stage][key], dtype=bench.dtype, device=compute_device())
        )
        if here.pp_size > 1:
            dist.broadcast(shard, group=here.pp_group, group_src=stage)
        if len(self._ranks(key)) == 1:
            return [shard]
        shards = [torch.empty_like(shard) for _ in self._ranks(key)]
        dist.all_gather(shards, shard, group=here.tp_group)
        return shards

    def _regions(self, stage: int, rank: int) -> Mapping[str, list[Region]]:
        bench = self.bench
        place = MegatronPlace(rank, bench.parallel.tensor)
        found: defaultdict[str, list[Region]] = defaultdict(list)
        for region in megatron_regions(bench.family, bench.dims, self.shapes[stage], place):
            found[region.key].append(region)
        return found


def seconds(sync: Callable[[], None], repeats: int) -> float:
    """Returns the median time of the slowest rank, the first run left out; collective."""
    found = []
    for _ in range(repeats + 1):
        dist.barrier()
        start = time.perf_counter()
        sync()
        if compute_device().type == "cuda":
            torch.cuda.synchronize()
        took = torch.tensor([time.perf_counter() - start], dtype=torch.float64)
        dist.all_reduce(took, op=dist.ReduceOp.MAX)
        found.append(float(took))
    return statistics.median(found[1:])


def measure(bench: Bench, repeats: int) -> dict[str, float | str]:
    """Returns times, bytes and ratios; collective over the world.

    Raises:
        RuntimeError: The two ways leave different weights behind.
    """
    ours, theirs = bench.empty_engine(), bench.empty_engine()
    plan_sync, planning_s, plan_bytes = bench.make_plan_sync(ours)
    gather_sync, gather_bytes = bench.make_gather_sync(theirs)
    times = {"plan": seconds(plan_sync, repeats), "gather": seconds(gather_sync, repeats)}
    same = all(torch.equal(ours[key], theirs[key]) for key in ours)
    held = sum(tensor.nbytes for tensor in ours.values())

    def copy() -> None:
        for key, tensor in ours.items():
            theirs[key].copy_(tensor)

    times["copy"] = seconds(copy, repeats)
    if not same or not all(bool(tensor.any()) for tensor in ours.values()):
        raise RuntimeError("the ways leave different weights behind, or none")
    shapes = bench.family.tensors(bench.dims).values()
    model = sum(map(math.prod, shapes)) * bench.dtype.itemsize
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "ranks": world_size(),
        "model_mib": model / MIB,
        "engine_rank_mib": held / MIB,
        "planning_s": planning_s,
        "plan_s": times["plan"],
        "gather_s": times["gather"],
        "copy_s": times["copy"],
        "plan_wire_mib": plan_bytes / MIB,
        "gather_wire_mib": gather_bytes / MIB,
        "gather_over_plan_bytes": gather_bytes / plan_bytes if plan_bytes else 1.0,
        "gather_over_plan_time": times["gather"] / times["plan"],
        "plan_over_copy_time": times["plan"] / times["copy"],
    }


def check(config: Config, dims: ModelDims) -> None:
    """Refuses layouts that do not fill these ranks or cannot cut the model."""
    check_layout(config, world_size())
    check_model(config, dims)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures and prints on rank 0."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tensor", type=int, default=1, help="Megatron's tensor parallelism (1)")
    parser.add_argument("--pipeline", type=int, default=1, help="Megatron's pipeline stages (1)")
    parser.add_argument("--engine-tensor", type=int, default=1, help="ranks of one engine (1)")
    parser.add_argument("--model", type=Path, help="folder with a config.json (a Qwen2 of 494 MB)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--round-mib", type=int, default=256, help="bound of a round (256)")
    parser.add_argument("--repeats", type=int, default=5, help="after a first run (5)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(arguments)
    family, dims = read_model(options.model) if options.model else (QWEN2, DIMS)
    parallel = ParallelConfig(tensor=options.tensor, pipeline=options.pipeline)
    start_world()
    try:
        check(
            Config(parallel=parallel, rollout=RolloutConfig(tensor_parallel=options.engine_tensor)),
            dims,
        )
        topology.initialize(parallel.tensor, parallel.pipeline)
        bench = Bench(
            family,
            dims,
            parallel,
            options.engine_tensor,
            getattr(torch, options.dtype),
            options.round_mib * MIB,
        )
        found = measure(bench, options.repeats)
        if world_rank() == 0:
            lines = (
                f"{k:32}{v:12.3f}" if isinstance(v, float) else f"{k:32}{v:>12}"
                for k, v in found.items()
            )
            print(json.dumps(found) if options.json else "\n".join(lines))
    except UserError as error:
        print(f"weight_sync: {error}", file=sys.stderr)
        return 2
    finally:
        stop_world()
    return 0


if __name__ == "__main__":
    sys.exit(main())
