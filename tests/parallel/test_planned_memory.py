"""The planner's bytes against those that policy, reference and token_rm allocate on the CPU.

Torch's own profiler reports the allocations and releases of its CPU allocator: their running sum is
the memory of a rank, temporary buffers inside of operators included.
"""

from __future__ import annotations

import bisect
import gc
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch._C._profiler import _EventType  # the only way to an allocation's address
from torch.profiler import ProfilerActivity, profile

from megatron_oreal.algorithm import objectives
from megatron_oreal.config.schema import Config, OrealConfig, SamplingConfig
from megatron_oreal.models.registry import read_model
from megatron_oreal.parallel import topology
from megatron_oreal.parallel.collectives import world_size
from megatron_oreal.planner.hardware import GPUS, Cluster
from megatron_oreal.planner.memory import Phase, plan_stage
from megatron_oreal.types import Trajectory
from tests.ranks import RankPools
from tests.toy_models import (
    make_config,
    make_policy,
    make_reference,
    make_token_rm,
    open_models,
    pack,
    write_toy,
)

pytestmark = pytest.mark.parallel

VOCAB = 1024
MODEL: dict[str, Any] = {
    "num_hidden_layers": 2,
    "hidden_size": 128,
    "intermediate_size": 352,
    "vocab_size": VOCAB,
    "max_position_embeddings": 512,
}
TRAJECTORIES, LENGTH, SHORT = 4, 256, 8
BUDGET = 2 * LENGTH
ALLOWED = 0.10
PHASES: tuple[Phase, ...] = ("reference", "token_rm", "policy")
NOT_COUNTED = ("CUDA graphs", "reserve")


class Layout(NamedTuple):
    """A layout of two ranks, and what of the engine's section differs."""

    tp: int = 1
    pp: int = 1
    cp: int = 1
    budget: int = BUDGET
    recompute: str = "none"


LAYOUTS = {
    "tp2": Layout(tp=2),
    "pp2": Layout(pp=2),
    "cp2": Layout(cp=2),
    "dp2": Layout(),
    "tp2, half the budget": Layout(tp=2, budget=BUDGET // 2),
    "dp2, MLPs recomputed": Layout(recompute="selective"),
    "pp2, all recomputed": Layout(pp=2, recompute="full"),
}


class Bytes(NamedTuple):
    """The most that a rank held in each phase, as counted and as planned."""

    counted: dict[Phase, int]
    planned: dict[Phase, int]


def make_phases(config: Config) -> Callable[[int], dict[Phase, Callable[[], object]]]:
    """Builds the models; the result turns a length of trajectories into what each phase does."""
    source = open_models(config)
    policy, token_rm = make_policy(source), make_token_rm(source)
    reference = make_reference(source)

    def phases(length: int) -> dict[Phase, Callable[[], object]]:
        tokens = tuple(torch.arange(length).tolist())
        trajectories = [
            Trajectory(str(i), tokens, length // 8, (-1.0) ** i, (-1.0) ** i)
            for i in range(TRAJECTORIES)
        ]
        ones = [torch.ones(trajectory.response_length) for trajectory in trajectories]
        batch = pack(trajectories, config.engine.tokens_per_micro_batch)
        batch = batch.with_fields(**objectives.policy_fields(trajectories, ones, ones))
        counts = objectives.count_tokens(trajectories)
        objective = objectives.policy_objective(OrealConfig(), *counts)
        score_objective = objectives.token_rm_objective(TRAJECTORIES)
        return {
            "reference": lambda: reference.logprobs(batch),
            "token_rm": lambda: token_rm.step(batch, score_objective, 1e-5),
            "policy": lambda: policy.step(batch, objective, 1e-5),
        }

    return phases


def count(config: Config) -> dict[Phase, int]:
    """The most that this rank holds in each phase; collective over the world."""
    phases = make_phases(config)
    for run in phases(SHORT).values():  # optimizers make their moments in their first step
        run()
    return {phase: most_held(run) for phase, run in phases(LENGTH).items()}


def most_held(run: Callable[[], object]) -> int:
    """Bytes, what lay there before `run` began included."""
    before = [(0, *storage) for storage in storages().items()]
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    results: Any = profiler.profiler
    changes = [
        (e.start_time_ns, e.extra_fields.ptr, e.extra_fields.alloc_size)
        for e in walk(results.kineto_results.experimental_event_tree())
        if e.tag == _EventType.Allocation
    ]
    return max(running_sum(before + sorted(changes)))


def storages() -> dict[int, int]:
    """Bytes by address of what all tensors of this process lie in."""
    tensors = [each for each in gc.get_objects() if issubclass(type(each), torch.Tensor)]
    tensors += [each.grad for each in tensors if each.is_leaf and each.grad is not None]
    found = [each.untyped_storage() for each in tensors if each.device.type == "cpu"]
    return {storage.data_ptr(): storage.nbytes() for storage in found if storage.nbytes()}


def walk(trees: Iterable[Any]) -> Iterator[Any]:
    """Events with all that happened within them."""
    waiting = list(trees)
    while waiting:
        event = waiting.pop()
        waiting += event.children
        yield event


def running_sum(changes: Iterable[tuple[int, int, int]]) -> Iterator[int]:
    """Bytes held after each of some times, addresses and bytes, negative where released.

    What gloo's threads release last is not reported: it was, once its place is taken again.
    """
    starts: list[int] = []
    sizes: dict[int, int] = {}
    total = 0
    for _, address, nbytes in changes:
        end = address + max(nbytes, 1)
        first = max(0, bisect.bisect_left(starts, address) - 1)
        for start in starts[first : bisect.bisect_left(starts, end)]:
            if start + sizes[start] > address:
                total -= sizes.pop(start)
                starts.remove(start)
        if nbytes > 0:
            bisect.insort(starts, address)
            sizes[address] = nbytes
            total += nbytes
        yield total


def count_and_plan(folder: Path, layout: Layout) -> Bytes:
    """Both for this rank; collective over the world."""
    config = make_config(
        folder,
        tokens_per_micro_batch=layout.budget,
        recompute=layout.recompute,
        head_chunk_tokens=32,
    )
    sampling = SamplingConfig(max_new_tokens=LENGTH // 2, max_total_tokens=LENGTH)
    config = replace(config, sampling=sampling)
    cluster = Cluster(GPUS["h100-80"], world_size(), "torch")
    _, dims = read_model(folder)
    parts = plan_stage(config, dims, cluster, topology.current().pp_rank).phases
    planned: dict[Phase, int] = {
        phase: sum(size for part, size in parts[phase].items() if part not in NOT_COUNTED)
        for phase in PHASES
    }
    return Bytes(count(config), planned)


def test_what_was_released_unseen_is_released_once_its_place_is_taken() -> None:
    changes = [(0, 100, 50), (1, 200, 10), (2, 140, 20), (3, 200, -10), (4, 140, -20)]
    assert list(running_sum(changes)) == [50, 60, 30, 20, 0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy(tmp_path_factory.mktemp("planned") / "toy", "qwen2", **MODEL)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=list(LAYOUTS))
def test_memory_is_as_planned(ranks: RankPools, folder: Path, layout: Layout) -> None:
    """Weights, gradients, optimizers, activations and heads; the engine is not the trainer's."""
    degrees = {"tp": layout.tp, "pp": layout.pp, "cp": layout.cp}
    found = ranks(2).run(count_and_plan, folder, layout, **degrees)
    for rank in found:
        assert rank.planned == pytest.approx(rank.counted, rel=ALLOWED)
